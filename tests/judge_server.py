"""A judge behind an OpenAI-compatible endpoint of this machine, for tests."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from posttrain.config.sections import Judge

FIELDS = "{prompt}|{first}|{second}"


def longer(first: str, second: str) -> str:
    """The reply of a judge that prefers the longer answer."""
    word = "A" if len(first) > len(second) else "B" if len(second) > len(first) else "tie"
    return f"Not Verdict: B at once.\nVerdict: {word}"


@contextmanager
def served(judge, status=200, **settings):
    """A judge at an endpoint on this machine; yields its section and the requests that it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            got.append({"path": self.path, "key": self.headers["Authorization"], "text": text, "model": body["model"]})
            reply = judge(*text.split("|")[1:])
            content = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(status(len(got)) if callable(status) else status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield Judge(url=url, model="a judge", prompt=FIELDS, pause=0.0, **settings), got
    finally:
        server.shutdown()
        server.server_close()

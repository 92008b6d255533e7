"""A Hugging Face hub of one's own on 127.0.0.1: enough of its HTTP for huggingface_hub 2.4 and datasets 5.2.

with fake_hub([repo("models", "org/tiny", {SHA: {"config.json": b"{}"}})]) as hub:
    subprocess.run(..., env={**os.environ, "HF_ENDPOINT": hub.url})
    assert hub.downloads() == ["org/tiny/config.json"]
"""

import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".parquet", ".bin")
TOKEN = "hf_the_right_token"
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/]+)")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def repo(kind: str, id: str, commits: dict, refs: dict | None = None, gated: bool = False) -> SimpleNamespace:
    """A repository: commits is {sha: {path: bytes}}; refs is {branch or tag: sha}."""
    return SimpleNamespace(kind=kind, id=id, commits=commits, refs=refs or {}, gated=gated)


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder as a commit."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def tree(files: dict[str, bytes]) -> list[dict]:
    """What /api/…/tree answers: LFS files carry their sha256, the others only git's hash."""
    rows = []
    for path, data in sorted(files.items()):
        row = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
        if path.endswith(LFS):
            row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        rows.append(row)
    return rows


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def fake_hub(repos: list):
    """Serve `repos` until the block ends; yields url, log, sent (bytes), downloads() and knobs for misbehaving.

    hub.slow = seconds between pieces of 1 kB; hub.spoil = {path: function of the bytes sent};
    hub.fail = a status to answer every request with.
    """
    hub = SimpleNamespace(repos={(r.kind, r.id): r for r in repos}, log=[], sent=0, slow=0.0, spoil={}, fail=None)
    hub.downloads = lambda: [path for verb, path in hub.log if verb == "GET" and "/resolve/" in path]
    hub.tokens = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def handler(hub: SimpleNamespace) -> type:
    """The request handler of one hub (http.server wants a class)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            hub.log.append((self.command, unquote(self.path)))
            hub.tokens.add(self.headers.get("Authorization"))
            status, headers, body = answer(hub, unquote(urlsplit(self.path).path), self.headers)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                hub.sent += len(body)
                self.send_slowly(body)

        do_HEAD = do_GET

        def send_slowly(self, body: bytes):
            step = 1024 if hub.slow else len(body) or 1
            for start in range(0, len(body), step):
                try:
                    self.wfile.write(body[start : start + step])
                except OSError:  # the client was killed
                    return
                time.sleep(hub.slow)

        def log_message(self, *args):
            pass

    return Handler


def answer(hub: SimpleNamespace, path: str, headers) -> tuple[int, dict, bytes]:
    """(status, headers, body) of one request."""
    if hub.fail:
        return refused(hub.fail, "", "the hub is unwell")
    if match := API.fullmatch(path):
        kind, id, what, revision = match.groups()
        return in_repo(hub, (kind, id), revision, headers, lambda sha, files: listing(id, sha, files, what))
    if match := FILE.fullmatch(path):
        kind, id, revision, name = match.groups()
        key = ("datasets" if kind else "models", id)
        return in_repo(hub, key, revision, headers, lambda sha, all: content(hub, sha, all, name, headers))
    return refused(404, "", f"no route {path}")


def in_repo(hub, key, revision: str, headers, respond) -> tuple[int, dict, bytes]:
    """The hub's order of refusals: the repository, access to it, the revision; then respond(sha, files)."""
    found = hub.repos.get(key)
    if found is None:
        return refused(401, "RepoNotFound", "Repository not found")
    if found.gated and headers.get("Authorization") != f"Bearer {TOKEN}":
        return refused(403 if headers.get("Authorization") else 401, "GatedRepo", "Access is restricted")
    sha = found.refs.get(revision, revision)
    if sha not in found.commits:
        return refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return respond(sha, found.commits[sha])


def listing(id: str, sha: str, files: dict, what: str) -> tuple[int, dict, bytes]:
    info = {"id": id, "sha": sha, "siblings": [{"rfilename": path} for path in sorted(files)]}
    body = json.dumps(tree(files) if what == "tree" else info)
    return 200, {"Content-Type": "application/json"}, body.encode()


def content(hub, sha: str, files: dict, name: str, headers) -> tuple[int, dict, bytes]:
    """A file, or the part of it that the client asks for (Range)."""
    if name not in files:
        return refused(404, "EntryNotFound", f"no {name}", {"X-Repo-Commit": sha})
    data = files[name]
    etag = hashlib.sha256(data).hexdigest() if name.endswith(LFS) else git_hash(data)
    said = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "Accept-Ranges": "bytes"}
    said["X-Linked-Size"] = str(len(data))
    sent = hub.spoil.get(name, bytes)(data)
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", "")):
        part = sent[int(match[1]) : int(match[2]) + 1 if match[2] else None]
        return 206, {**said, "Content-Range": f"bytes {match[1]}-{int(match[1]) + len(part) - 1}/{len(sent)}"}, part
    return 200, said, sent


def refused(status: int, code: str, message: str, more: dict | None = None) -> tuple[int, dict, bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": message, **(more or {})}, b""

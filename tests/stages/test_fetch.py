"""fetch against a hub of our own: what comes, what is refused, what other stages find without a network."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_hub import TOKEN, fake_hub, files_of, repo

from posttrain.evaluation import benchmarks
from posttrain.ground.errors import UserError
from posttrain.stages.fetch import fetch

SHARED = Path(os.environ.get("POSTTRAIN_SHARED", Path(__file__).parents[3] / "shared"))
MODEL, DATA, GSM8K = "a" * 40, "d" * 40, "e" * 40
CONVERTED, PICKLED, OTHER = "c" * 40, "b" * 40, "f" * 40

RUN = """
import json, sys
from pathlib import Path
from posttrain.data import hub
from posttrain.evaluation import benchmarks
from posttrain.ground.errors import UserError
from posttrain.stages.fetch import fetch
try:
    {}
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def python(code: str, home: Path, url: str, *args, check: bool = False, **env) -> subprocess.CompletedProcess:
    """Run code in a process of its own, with its own cache and the given hub (both are read at import)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    paths = {
        "HF_HOME": str(home),
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }
    command = [sys.executable, "-c", RUN.format(code), *map(str, args)]
    done = subprocess.run(command, env={**clean, **paths, **env}, capture_output=True, text=True, cwd=home.parent)
    assert not check or done.returncode == 0, done.stderr
    return done


def run_fetch(hub, tmp: Path, section: dict, name: str = "manifest.json", **env) -> subprocess.CompletedProcess:
    code = "fetch(section=json.loads(sys.argv[1]), output=Path(sys.argv[2]))"
    return python(code, tmp / "home", hub.url, json.dumps(section), tmp / name, **env)


def locate(hub, tmp: Path, call: str, **env) -> subprocess.CompletedProcess:
    """print(hub.CALL) as a stage would, offline."""
    offline = {"HF_HUB_OFFLINE": "1", **env}
    return python(f"M = Path(sys.argv[1]); print(hub.{call})", tmp / "home", hub.url, tmp / "manifest.json", **offline)


def parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def weights() -> dict[str, bytes]:
    """stories260K where it is at hand, else a file of its shape; with a pickle and a folder."""
    real = SHARED / "data" / "models" / "stories260K"
    files = files_of(real) if real.is_dir() else {"config.json": b"{}", "model.safetensors": bytes(1_044_992)}
    return {**files, "pytorch_model.bin": b"pickle", "a/b/notes.txt": b"deep"}


def questions(split: str, n: int) -> bytes:
    return parquet([{"question": f"{split}: {i}+1?", "answer": f"So it is #### {i + 1}"} for i in range(n)])


CARD = """---
configs:
- {config_name: main, data_files: [{split: train, path: main/train-*}, {split: test, path: main/test-*}]}
- config_name: socratic
  data_files: [{split: train, path: socratic/train-*}, {split: test, path: socratic/test-*}]
---
"""


def gsm8k() -> dict[str, bytes]:
    """The layout of openai/gsm8k: a card that names two configurations of parquet files."""
    files = {f"{c}/{s}-0.parquet": questions(s, n) for c, s, n in [("main", "train", 8), ("main", "test", 3)]}
    files |= {f"socratic/{s}-0.parquet": questions(s, 2) for s in ("train", "test")}
    return {"README.md": CARD.encode(), **files}


def converted() -> dict[str, bytes]:
    """The layout of refs/convert/parquet: a folder per configuration and no card."""
    sizes = [("main", "train", 8), ("main", "test", 3), ("socratic", "train", 2), ("socratic", "test", 2)]
    return {f"{c}/{s}/0000.parquet": questions(f"converted {s}", n) for c, s, n in sizes}


@pytest.fixture(scope="module")
def served():
    """One hub for the module; tests that make it misbehave put it right again (see `hub`)."""
    lines = b"".join(json.dumps({"prompt": f"{i}+1", "completion": str(i + 1)}).encode() + b"\n" for i in range(20))
    tiny = repo("models", "org/tiny", {MODEL: weights(), PICKLED: {"config.json": b"{}", "model.bin": b"x"}})
    tiny.commits |= {SHARDED: sharded()}
    tiny.refs |= {"main": MODEL}
    yours = repo("datasets", "org/lines", {DATA: {"train.jsonl": lines}}, {"main": DATA})
    asked = repo("datasets", "openai/gsm8k", {GSM8K: gsm8k(), CONVERTED: converted(), OTHER: {"gsm8k.py": b"#"}})
    locked = repo("models", "org/locked", {MODEL: {"model.safetensors": b"secret"}}, gated=True)
    with fake_hub([tiny, yours, asked, locked]) as hub:
        yield hub


@pytest.fixture
def hub(served):
    yield served
    served.slow, served.fail, served.spoil = 0.0, None, {}
    served.log.clear()
    served.tokens.clear()


SHARDED = "9" * 40


def sharded() -> dict[str, bytes]:
    """A model in two files, with an adapter, the same weights in another layout and an older copy beside it."""
    parts = {f"model-0000{n}-of-00002.safetensors": bytes(100 + n) for n in (1, 2)}
    places = {f"weight{n}": name for n, name in enumerate(parts)}
    names = ("consolidated.safetensors", "adapter_model.safetensors", "old/model.safetensors")
    others = {name: name.encode() for name in names}
    index = json.dumps({"metadata": {}, "weight_map": places}).encode()
    return parts | others | {"config.json": b"{}", "model.safetensors.index.json": index}


BOTH = {
    "models": [{"id": "org/tiny", "revision": MODEL}],
    "datasets": [{"id": "org/lines", "revision": DATA}],
}


def test_fetch_then_offline(hub, tmp_path):
    """What comes, what the manifest says; a second run transfers nothing; stages open no connection."""
    done = run_fetch(hub, tmp_path, BOTH)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    files = {f["path"]: f for r in manifest["repos"] for f in r["files"]}
    assert [(r["kind"], r["id"], r["revision"]) for r in manifest["repos"]] == [
        ("dataset", "org/lines", DATA),
        ("model", "org/tiny", MODEL),
    ]
    from hashlib import sha256

    for path, data in {**weights(), **hub.repos["datasets", "org/lines"].commits[DATA]}.items():
        if path == "pytorch_model.bin":
            assert path not in files and not any(path in got for got in hub.downloads())
        else:
            assert files[path] == {"path": path, "size": len(data), "sha256": sha256(data).hexdigest()}
    text = (tmp_path / "manifest.json").read_text()
    assert str(tmp_path) not in text and hub.url not in text

    hub.log.clear()
    again = run_fetch(hub, tmp_path, BOTH, name="again.json")
    assert again.returncode == 0 and hub.downloads() == []
    assert hub.log, "negative control: the hub was asked, so that the log would have shown a transfer"
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "manifest.json").read_bytes()

    hub.log.clear()
    cut_off = run_fetch(hub, tmp_path, BOTH, name="cut_off.json", HF_ENDPOINT="http://127.0.0.1:9")
    assert cut_off.returncode == 0, "a whole cache is enough where there is no network: " + cut_off.stderr
    assert (tmp_path / "cut_off.json").read_bytes() == (tmp_path / "manifest.json").read_bytes()
    calls = f"local_repo('model', 'org/tiny', {MODEL!r}, M), hub.local_repo('dataset', 'org/lines', {DATA!r}, M)"
    found = locate(hub, tmp_path, calls.replace(", hub.", "); print(hub."))
    assert found.returncode == 0, found.stderr
    model, data = map(Path, found.stdout.split())
    assert (model / "a/b/notes.txt").read_bytes() == b"deep" and (data / "train.jsonl").exists()
    assert hub.log == []


READ = """import os
    from posttrain.config.sections import Prepare, Source
    from posttrain.data.dropped import Dropped
    from posttrain.data.reading import read_source
    dropped = Dropped(Path(sys.argv[1]).with_name("dropped.jsonl"))
    for keys in ({"subset": "main", "rows": "train[2:4]"}, {"files": ["*/test-*"]}, {"files": ["gone-*"]}):
        source, cards = Source(dataset="openai/gsm8k", revision="e" * 40, **keys), []
        for row in read_source(Prepare(), source, "generation", cards, dropped, [Path(sys.argv[1])]):
            print(row["source"], row["question"])
"""


def test_slices_and_data_files_of_a_data_set(hub, tmp_path):
    """A slice is numbered from 1; data files are read as local ones are, and named without their place in the cache."""
    section = {"datasets": [{"id": "openai/gsm8k", "revision": GSM8K, "allow_patterns": ["*/t*-0.parquet"]}]}
    assert run_fetch(hub, tmp_path, section).returncode == 0
    done = python(READ, tmp_path / "home", hub.url, tmp_path / "manifest.json", HF_HUB_OFFLINE="1")
    expected = [f"openai/gsm8k/main/train[2:4]:{n} train: {n + 1}+1?" for n in (1, 2)]
    expected += [f"openai/gsm8k/main/test-0.parquet:{n + 1} test: {n}+1?" for n in range(3)]
    assert [line for line in done.stdout.splitlines() if line.endswith("?")] == expected, done.stderr
    assert "data set openai/gsm8k: no file matches ['gone-*']; there are README.md, main/test-0.parquet" in done.stderr


def test_offline_negative_control(hub, tmp_path):
    """The request log does see a stage that goes to the hub by id."""
    load = "from huggingface_hub import snapshot_download; snapshot_download('org/tiny', revision=sys.argv[1])"
    assert python(load, tmp_path / "home", hub.url, MODEL, HF_HUB_OFFLINE="1").returncode != 0 and hub.log == []
    assert python(load, tmp_path / "home", hub.url, MODEL).returncode == 0 and hub.log != []


def test_spoilt_cache_is_named_and_mended(hub, tmp_path):
    """Missing, truncated and altered files are named with the command, and that command brings them back."""
    run_fetch(hub, tmp_path, BOTH)
    root = Path(locate(hub, tmp_path, f"local_repo('model', 'org/tiny', {MODEL!r}, M)").stdout.strip())
    big, config, notes = (root / name for name in ("model.safetensors", "config.json", "a/b/notes.txt"))
    data = big.read_bytes()
    os.truncate(big.resolve(), 1000)
    config.resolve().unlink()
    notes.resolve().write_bytes(b"DEEP")  # same size: only the hub's checksum tells

    said = locate(hub, tmp_path, f"local_repo('model', 'org/tiny', {MODEL!r}, M)")
    command = f"posttrain fetch --config {tmp_path}/config.yaml --output {tmp_path}/manifest.json"
    assert said.returncode == 2 and command in said.stderr and "Traceback" not in said.stderr
    assert f"model.safetensors: truncated, 1000 of {len(data)} bytes" in said.stderr
    assert "config.json: missing" in said.stderr and "notes.txt" not in said.stderr

    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    hub.log.clear()
    assert run_fetch(hub, tmp_path, BOTH).returncode == 0
    assert sorted(path.rsplit("/", 1)[1] for path in hub.downloads()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before, "the same manifest is left alone"
    assert big.read_bytes() == data and notes.read_bytes() == b"deep"


def test_not_fetched(hub, tmp_path):
    """No manifest, and a manifest without the repository: both name the command."""
    said = locate(hub, tmp_path, f"local_repo('model', 'org/tiny', {MODEL!r}, M)").stderr
    assert "manifest.json is not a manifest" in said and "posttrain fetch --config" in said
    (tmp_path / "manifest.json").write_text('{"repos": [], "tasks": []}')
    said = locate(hub, tmp_path, f"local_repo('model', 'org/tiny', {MODEL!r}, M)").stderr
    assert f"lists no model org/tiny at {MODEL}" in said and "posttrain fetch --config" in said


def test_floating_revisions(hub, tmp_path):
    """Refused before any connection, all together; where allowed, resolved and both recorded."""
    entries = [{"id": "org/tiny", "revision": r} for r in ("main", MODEL[:7], None, MODEL.upper())]
    said = run_fetch(hub, tmp_path, {"models": entries, "datasets": [{"id": "org/lines", "revision": "v1"}]})
    assert said.returncode == 2 and said.stderr.count("can move") == 5 and hub.log == []
    assert not (tmp_path / "manifest.json").exists()

    entry = {"id": "org/tiny", "revision": "main", "allow_floating": True, "allow_patterns": ["*.json"]}
    assert run_fetch(hub, tmp_path, {"models": [entry]}).returncode == 0
    (row,) = json.loads((tmp_path / "manifest.json").read_text())["repos"]
    assert (row["revision"], row["requested"]) == (MODEL, ["main"])
    assert all(file["path"].endswith(".json") for file in row["files"])
    assert MODEL in locate(hub, tmp_path, "local_repo('model', 'org/tiny', 'main', M)").stdout


REFUSALS = [
    ({"models": [{"id": "org/none", "revision": MODEL}]}, {}, "no such model for this account"),
    ({"models": [{"id": "org/locked", "revision": MODEL}]}, {}, "is gated. Ask for access on"),
    ({"models": [{"id": "org/locked", "revision": MODEL}]}, {"HF_TOKEN": "hf_wrong"}, "is gated"),
    ({"models": [{"id": "org/tiny", "revision": "0" * 40}]}, {}, "no such revision"),
    ({"models": [{"id": "org/tiny", "revision": PICKLED}]}, {}, "has no model.safetensors"),
    ({"models": [{"id": "a/b/c", "revision": MODEL}]}, {}, "Repo id must be"),
    (BOTH, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "no connection to the hub (ConnectError)"),
    (BOTH, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
]


def test_refusals(hub, tmp_path):
    """Each refusal is words with what to do; no traceback, no token, no manifest; all at once."""
    section = {"models": [e for s, env, _ in REFUSALS if not env for e in s["models"]]}
    said = run_fetch(hub, tmp_path, section)
    for _, env, words in REFUSALS:
        assert env or words in said.stderr, said.stderr
    for wrong, env, words in [case for case in REFUSALS if case[1]]:
        said = run_fetch(hub, tmp_path, wrong, **env)
        assert said.returncode == 2 and words in said.stderr and "Traceback" not in said.stderr, said.stderr
        assert not env.get("HF_TOKEN") or env["HF_TOKEN"] not in said.stderr + said.stdout
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("patterns", [None, ["*"]])
def test_only_weights_that_the_index_names_come(hub, tmp_path, patterns):
    """Control: patterns of the user's bring what they match."""
    entry = {"id": "org/tiny", "revision": SHARDED} | ({"allow_patterns": patterns} if patterns else {})
    done = run_fetch(hub, tmp_path, {"models": [entry]})
    assert done.returncode == 0, done.stderr
    files = [file["path"] for file in json.loads((tmp_path / "manifest.json").read_text())["repos"][0]["files"]]
    named = ["config.json", *(f"model-0000{n}-of-00002.safetensors" for n in (1, 2)), "model.safetensors.index.json"]
    assert files == (sorted(sharded()) if patterns else named)
    assert {path.rpartition("/")[2] for path in hub.downloads()} == {name.rpartition("/")[2] for name in files}


def test_token(hub, tmp_path):
    """The token reaches the hub, and nothing else."""
    done = run_fetch(hub, tmp_path, {"models": [{"id": "org/locked", "revision": MODEL}]}, HF_TOKEN=TOKEN)
    assert done.returncode == 0 and hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr + (tmp_path / "manifest.json").read_text()


def test_bad_transfers(hub, tmp_path):
    """Bytes other than the hub's, a body cut short, an unwell hub: words, and no manifest."""
    hub.spoil = {"train.jsonl": lambda data: data.replace(b"prompt", b"PROMPT")}
    said = run_fetch(hub, tmp_path, {"datasets": BOTH["datasets"]})
    assert said.returncode == 2 and "not the hub's" in said.stderr
    hub.spoil = {"model.safetensors": lambda data: data[:5000]}
    said = run_fetch(hub, tmp_path, {"models": BOTH["models"]})
    assert said.returncode == 2 and "arrives truncated" in said.stderr, said.stderr
    hub.spoil = {}
    assert run_fetch(hub, tmp_path, BOTH).returncode == 0, "negative control: well again, it comes"


def test_full_disk():
    """Words for a disk that fills up, before and during the transfer."""
    from posttrain.data import hub
    from posttrain.stages import fetch

    said = hub.in_words(OSError(errno.ENOSPC, "No space left on device"), "model", "org/tiny", MODEL)
    assert "the disk is full" in said and "HF_HOME" in said
    huge = [{"path": "model.safetensors", "size": 10**18}]
    with pytest.raises(fetch.UserError, match="free in"):
        fetch.refuse_unusable("model", "org/tiny", MODEL, huge, None)
    fetch.refuse_unusable("model", "org/tiny", MODEL, [{**huge[0], "size": 1}], None)
    assert hub.in_words(KeyError("ours"), "model", "org/tiny", MODEL) is None, "our own mistakes keep their traceback"


def test_killed_and_continued(hub, tmp_path):
    """Killed in the middle of a file: no manifest; run again, it completes with the same manifest."""
    hub.slow = 0.02
    section, output = json.dumps({"models": BOTH["models"]}), tmp_path / "manifest.json"
    online = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    env = {**os.environ, **online}
    code = RUN.format("fetch(json.loads(sys.argv[1]), Path(sys.argv[2]))")
    process = subprocess.Popen([sys.executable, "-c", code, section, output], env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not any(path.endswith("model.safetensors") for path in hub.downloads()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists() and not list(tmp_path.glob("*.tmp"))
    hub.slow = 0.0
    assert run_fetch(hub, tmp_path, {"models": BOTH["models"]}).returncode == 0
    assert json.loads(output.read_text())["repos"][0]["revision"] == MODEL


# lm-eval ----------------------------------------------------------------------------------------------------

TASK = """task: {name}
tag: [little_tag]
dataset_path: openai/gsm8k
dataset_name: {config}
test_split: test
fewshot_split: train
num_fewshot: 1
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
output_type: generate_until
generation_kwargs: {{until: ["#"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
dataset_kwargs: {{trust_remote_code: true, revision: main}}
"""

LOAD = """
    from lm_eval.tasks import TaskManager
    pack = benchmarks.task_pack(Path(sys.argv[1]), Path(sys.argv[2]))
    tasks = TaskManager(include_path=[str(pack)], include_defaults=False).load(sys.argv[4:])["tasks"]
    from posttrain.config.sections import Evaluate, Task
    section = Evaluate(task_files=["tasks/little_main.yaml"], tasks=[Task(task="little_tag", revision=sys.argv[3])])
    pack = benchmarks.own_pack(section, [Path(sys.argv[1])], Path(sys.argv[2]) / "own")
    (tasks["own"],) = TaskManager(include_path=[str(pack)], include_defaults=False).load("little_tag")["tasks"].values()
    import datasets
    try:
        datasets.load_dataset("openai/gsm8k", "main", revision="e" * 40)
    except ConnectionError:
        print(json.dumps({name: [d["question"] for d in task.test_docs()] for name, task in tasks.items()}))
"""


def task_folder(tmp: Path) -> str:
    """Two tasks of the user's own under a group and a tag, and one that reads files of its own."""
    own = tmp / "tasks"
    own.mkdir()
    for name, config in (("little_main", "main"), ("little_socratic", "socratic")):
        (own / f"{name}.yaml").write_text(TASK.format(name=name, config=config))
    (own / "little.yaml").write_text("group: little\ntask: [little_tag]\n")
    (own / "local.yaml").write_text(of_files("own_file"))
    return str(own)


def of_files(name: str) -> str:
    """A task that reads files of its own, not the hub."""
    return TASK.format(name=name, config="null").replace("openai/gsm8k", "json").replace("little_tag", "")


def gsm8k_folder() -> str:
    from posttrain.evaluation.benchmarks import lm_eval_tasks

    return str(lm_eval_tasks() / "gsm8k")


def questions_of(hub, tmp: Path, *names: str) -> dict[str, list[str]]:
    """What lm-eval loads offline for the names, in the way that `lm_eval.simple_evaluate` does it."""
    paths = tmp / "manifest.json", tmp / "pack"
    done = python(LOAD, tmp / "home", hub.url, *paths, GSM8K, *names, check=True, HF_HUB_OFFLINE="1")
    return json.loads(done.stdout.splitlines()[-1])


def test_tasks_offline(hub, tmp_path):
    """lm-eval's own gsm8k, and a group of one's own, load offline from the fetched bytes of their commits.

    gsm8k is pinned to a commit of refs/convert/parquet, which has no card: the folder of its configuration is
    read, not all of them. By id and revision nothing loads, although every byte is in the cache.
    """
    pins = {"gsm8k": {"openai/gsm8k": CONVERTED}, "little": GSM8K, "own_file": GSM8K}
    entries = [{"task": name, "revision": revision} for name, revision in pins.items()]
    section = {"tasks": entries, "task_dirs": [task_folder(tmp_path), gsm8k_folder()]}
    done = run_fetch(hub, tmp_path, section)
    assert done.returncode == 0, done.stderr
    assert not [p for _, p in hub.log if "/resolve/" in p and GSM8K not in p and CONVERTED not in p]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    rows = {row["name"]: row for row in manifest["tasks"]}
    assert [repo["revision"] for repo in manifest["repos"]] == [CONVERTED, GSM8K]
    assert set(rows) == {"gsm8k", "little", "little_main", "little_socratic", "own_file"}
    assert (rows["gsm8k"]["source"], rows["gsm8k"]["yaml"]) == ("lm_eval", "gsm8k/gsm8k.yaml")
    assert rows["little"]["dataset"] is None and rows["own_file"]["dataset"] is None
    assert str(tmp_path) not in (tmp_path / "manifest.json").read_text()

    hub.log.clear()
    asked = questions_of(hub, tmp_path, "gsm8k", "little")
    assert asked == {
        "gsm8k": [f"converted test: {i}+1?" for i in range(3)],
        "little_main": [f"test: {i}+1?" for i in range(3)],
        "little_socratic": [f"test: {i}+1?" for i in range(2)],
        "own": [f"test: {i}+1?" for i in range(3)],
    }
    assert hub.log == []


def test_tasks_refused(hub, tmp_path):
    """Unknown, unpinned, pinned twice, data from Python, data by address: each in words."""
    from posttrain.evaluation.benchmarks import find_tasks

    folder = Path(task_folder(tmp_path))
    (folder / "python.yaml").write_text("task: of_python\nclass: !function utils.Task\n")
    by_address = of_files("by_address").replace("revision: main", "data_files: 'https://x/y.jsonl'")
    (folder / "address.yaml").write_text(by_address)
    (folder / "inline.yaml").write_text("group: inline\ntask: [{task: little_main, dataset_name: socratic}]\n")
    cases = {
        "openai/gsm8k: COMMIT": [{"task": "little"}],
        "reads no org/other": [{"task": "little", "revision": {"openai/gsm8k": GSM8K, "org/other": GSM8K}}],
        "listed twice": [
            {"task": "little", "revision": GSM8K},
            {"task": "little_main", "revision": OTHER},
        ],
        "in its own Python code": [{"task": "of_python", "revision": GSM8K}],
        "from a URL": [{"task": "by_address", "revision": GSM8K}],
        "defined inline": [{"task": "inline", "revision": GSM8K}],
    }
    from unittest import mock

    from lm_eval.tasks import TaskManager

    only_own = mock.patch("lm_eval.tasks.TaskManager", lambda **k: TaskManager(**{**k, "include_defaults": False}))
    with only_own:  # indexing lm-eval's own tasks takes 12 s
        for words, entries in {
            **cases,
            "near: little_main": [{"task": "little_mani", "revision": GSM8K}],
        }.items():
            with pytest.raises(UserError, match=words):
                find_tasks(entries, [str(folder)])
        assert len(find_tasks([{"task": "little", "revision": GSM8K}], [str(folder)])) == 3


def test_data_that_is_a_loading_script(tmp_path, monkeypatch):
    """`datasets` no longer runs scripts: said at fetch, with what to pin instead."""
    monkeypatch.setattr(benchmarks, "snapshot", lambda repo: tmp_path)
    (tmp_path / "gsm8k.py").write_text("# builder")
    with pytest.raises(UserError, match="refs/convert/parquet"):
        benchmarks.prove_loadable("gsm8k", {"id": "openai/gsm8k", "revision": OTHER}, "main", {})
    (tmp_path / "test.jsonl").write_text('{"question": "1+1?"}\n')
    benchmarks.prove_loadable("gsm8k", {"id": "openai/gsm8k", "revision": OTHER}, None, {})


@pytest.mark.parametrize(
    "section",
    [{"model": [{"id": "a/b", "revision": MODEL}]}, {"models": [{"revision": MODEL}]}, {"datasets": ["a/b"]},
     {"models": [{"id": "a/b", "revison": MODEL}]}, {"path": "a/b"}],
)  # fmt: skip
def test_a_misspelt_section_is_named(section, tmp_path):
    """A manifest that lists nothing would have been written, and nothing said."""
    with pytest.raises(UserError, match=r"fetch: (model|models|datasets|path): (unknown key|found)"):
        fetch(section, tmp_path / "manifest.json")
    assert not (tmp_path / "manifest.json").exists()

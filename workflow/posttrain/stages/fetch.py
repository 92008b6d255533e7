"""Download models, data sets and benchmark data from the hub, at full commits, into the shared cache.

    posttrain fetch --config results/NAME/fetch/config.yaml --output results/NAME/fetch/manifest.json

This is the only stage that opens a connection; it is light enough for a login node. It may be stopped at any moment:
the manifest is written last, and another run transfers only missing or damaged files. The manifest records the bytes,
not their place or time; `posttrain.data.hub` finds them without a network. Only huggingface_hub reads a token
(HF_TOKEN).
"""

import glob
import json
import os
import shutil
from pathlib import Path

from posttrain.config.settings import settings_of_argument
from posttrain.data.hub import COMMIT, FULL, cached, explained, wish
from posttrain.evaluation.benchmarks import find_tasks, task_row
from posttrain.ground import credentials, progress, weights
from posttrain.ground.errors import UserError, gather
from posttrain.ground.files import sha256
from posttrain.ground.identity import canonical

# Pickles run code when they are loaded. The other formats hold the same weights, and nothing here reads them.
PICKLES = ["*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"]
OTHER_WEIGHTS = ["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.ot", "*.gguf"]
IGNORED = {"model": PICKLES + OTHER_WEIGHTS, "dataset": PICKLES}
NAMED = {"model": "id", "dataset": "id", "task": "task"}  # kind of entry -> the key that holds its name
OPTIONS = ("revision", "allow_floating", "allow_patterns")
CARDS = ["README.md", ".huggingface.yaml"]  # they list a data set's configurations and the files of each


def fetch(section: dict, output: Path) -> None:
    """Fetch everything in the section and write the manifest, last and by rename.

    section: `models` and `datasets`, each {id, revision, allow_floating, allow_patterns}; `tasks`, each
    {task, revision, allow_floating, allow_patterns} where revision is a commit or {data set: commit};
    `task_dirs`, folders of the user's own lm-eval YAML.
    Raises UserError with all problems at once, and then writes nothing: floating revisions before any connection, then
    errors of the hub, the network and the disk.
    """
    refuse_unknown(section)
    wishes = [wish(kind, entry) for kind in ("model", "dataset") for entry in section.get(kind + "s") or []]
    tasks = find_tasks(section["tasks"], section.get("task_dirs") or []) if section.get("tasks") else []
    wishes += [task["wish"] for task in tasks if task["wish"]]
    refuse_floating(wishes)
    repos = fetch_all(wishes)
    rows = gather(lambda task: task_row(task, repos.get(task["wish"])), tasks)
    rows.sort(key=lambda row: row["name"])
    write({"repos": merged(list(repos.values())), "tasks": rows}, Path(output))


def run_fetch(config: str, output: Path) -> None:
    """Fetch what a section on the command line names, and write the section beside the manifest."""
    progress.name = "fetch"
    credentials.reveal()
    section = dict(settings_of_argument(config))
    output.parent.mkdir(parents=True, exist_ok=True)
    (output.parent / "config.yaml").write_text(canonical(section) + "\n", encoding="utf-8")
    fetch(section, output)


def refuse_unknown(section: dict) -> None:
    """Raise UserError for an unknown key or entry; a misspelt one would not be fetched."""
    keys = (*(f"{kind}s" for kind in NAMED), "task_dirs")
    problems = [f"fetch: {key}: unknown key; known: {', '.join(keys)}" for key in section if key not in keys]
    for kind, name in NAMED.items():
        for entry in section.get(f"{kind}s") or []:
            if not (isinstance(entry, dict) and name in entry and set(entry) <= {name, *OPTIONS}):
                problems.append(f"fetch: {kind}s: found {entry!r}; an entry has {', '.join((name, *OPTIONS))}")
    if problems:
        raise UserError(*problems)


def refuse_floating(wishes: list[tuple]) -> None:
    """Raise UserError for each revision that is not a full commit and is not allowed to float."""
    problems = [
        f"{kind} {id}: revision {revision!r} can move; give the commit, 40 hexadecimal digits (on the hub "
        "under Files > History), or allow_floating: true"
        for kind, id, revision, floating, _ in dict.fromkeys(wishes)
        if not (floating or is_commit(revision))
    ]
    if problems:
        raise UserError(*problems)


def fetch_all(wishes: list[tuple]) -> dict:
    """{wish: its entry in the manifest}. After an error of one repository the others are still fetched."""
    unique = list(dict.fromkeys(wishes))
    return dict(zip(unique, gather(lambda w: fetch_repo(*w), unique), strict=True))


def fetch_repo(kind: str, id: str, revision: str | None, floating: bool, patterns: tuple | None) -> dict:
    """Download one repository into the cache, check every byte, and return its entry in the manifest.

    Raises UserError for errors of hub, network and disk (`explained`), for a model without safetensors, and for bytes
    that differ from the hub's.
    """
    from huggingface_hub import snapshot_download

    allow = [*patterns, *(CARDS if kind == "dataset" else [])] if patterns else None
    with explained(kind, id, revision):
        commit, files, online = listing(kind, id, revision)
        where: dict = {"repo_type": kind, "revision": commit}
        ignored = IGNORED[kind] + ([] if patterns or kind != "model" else unnamed_weights(id, files, where))
        wanted = selected(files, allow, ignored)
        refuse_unusable(kind, id, commit, wanted, patterns)
        folder = Path(snapshot_download(id, allow_patterns=allow, ignore_patterns=ignored, **where))
        mend(folder, id, wanted, where, online)
        files = [{**file, "sha256": file.get("sha256") or sha256(folder / file["path"])} for file in wanted]
    size = sum(file["size"] for file in files)
    print(f"fetch: {kind} {id} at {commit}: {len(files)} files, {size:,} bytes", flush=True)
    requested = [] if is_commit(revision) else [revision or "main"]
    return {"kind": kind, "id": id, "revision": commit, "requested": requested, "files": files}


def listing(kind: str, id: str, revision: str | None) -> tuple[str, list[dict], bool]:
    """(commit, the hub's list of its files, whether the hub was reached).

    Without a network, a pinned revision has the list that an earlier download left in the cache, with sizes only. A
    copied cache is thus enough on a machine without a network. Raises exceptions of huggingface_hub.
    """
    from httpx2 import TransportError
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    try:
        # repo_info comes first as it is not retried: without a network, list_repo_tree takes 25 s to fail.
        commit = HfApi().repo_info(id, repo_type=kind, revision=revision or "main", timeout=10).sha or ""
        tree = HfApi().list_repo_tree(id, recursive=True, revision=commit, repo_type=kind)
        return commit, [listed_file(item) for item in tree if isinstance(item, RepoFile)], True
    except (TransportError, OfflineModeIsEnabled) as error:
        if revision is None or not is_commit(revision):
            raise
        try:
            cached_files = get_cached_repo_tree(id, repo_type=kind, revision=revision)
        except CachedRepoTreeNotFoundError:
            raise error from None
    return revision, [{"path": file.path, "size": file.size} for file in cached_files], False


def listed_file(file) -> dict:
    """One file of the hub's list (huggingface_hub's RepoFile): path, size and, in LFS, sha256."""
    return {"path": file.path, "size": file.size, **({"sha256": file.lfs.sha256} if file.lfs else {})}


def is_commit(revision: str | None) -> bool:
    return bool(COMMIT.fullmatch(revision or ""))


def unnamed_weights(id: str, files: list[dict], where: dict) -> list[str]:
    """Patterns of the safetensors that a model does not name, such as an adapter's. Fetches what names the others."""
    from huggingface_hub import hf_hub_download

    paths = [file["path"] for file in files]
    if "config.json" not in paths:
        return []
    naming = [hf_hub_download(id, name, **where) for name in ("config.json", weights.INDEX) if name in paths]
    named = weights.named(Path(naming[0]).parent, paths)
    return [glob.escape(path) for path in paths if path.endswith(".safetensors") and path not in named]


def selected(files: list[dict], allow: list[str] | None, ignored: list[str]) -> list[dict]:
    """The files that match the patterns, as in snapshot_download, sorted by path."""
    from huggingface_hub.utils import filter_repo_objects

    return sorted(filter_repo_objects(files, key=path_of, allow_patterns=allow, ignore_patterns=ignored), key=path_of)


def path_of(file: dict) -> str:
    return file["path"]


def refuse_unusable(kind: str, id: str, commit: str, wanted: list[dict], patterns: tuple | None) -> None:
    """Raise UserError, before any transfer, where no file can be used or the disk has too little space."""
    from huggingface_hub.constants import HF_HUB_CACHE

    what = f"{kind} {id} at {commit}"
    if not wanted:
        raise UserError(f"{what}: no file there matches {list(patterns or ['*'])}.")
    if kind == "model" and not patterns and not any(file["path"].endswith(".safetensors") for file in wanted):
        raise UserError(
            f"{what} has no {weights.WHOLE} and no {weights.INDEX}; pickles run code when loaded. Pin a commit that "
            "has them: the hub's converter often offers one as a pull request (refs/pr/N)."
        )
    repo = {"id": id, "kind": kind, "revision": commit}
    missing = sum(file["size"] for file in wanted if cached(repo, file["path"]) is None)
    cache = next(path for path in [Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents] if path.exists())
    free = shutil.disk_usage(cache).free
    if missing > free:
        raise UserError(f"{what}: {missing:,} bytes to fetch, {free:,} free in {cache}. {FULL}")


def mend(folder: Path, id: str, wanted: list[dict], where: dict, online: bool) -> None:
    """Fetch again every cached file that differs from the hub's.

    snapshot_download checks only names, so that a truncated file would stay truncated. Raises UserError where the
    second transfer differs too.
    """
    from huggingface_hub import hf_hub_download

    damaged = differing(folder, id, wanted, where, online)
    for file in damaged:
        hf_hub_download(id, file["path"], force_download=True, **where)
    for file in differing(folder, id, wanted, where, online) if damaged else ():
        size = (folder / file["path"]).stat().st_size
        raise UserError(
            f"{where['repo_type']} {id}: {file['path']} arrives as {size} bytes, not the hub's {file['size']}: "
            "a proxy or a mirror (HF_ENDPOINT) alters them, or the disk is failing."
        )


def differing(folder: Path, id: str, wanted: list[dict], where: dict, online: bool) -> list[dict]:
    """The wanted files whose checksum differs from the hub's; whose size does, where the hub was not reached."""
    from huggingface_hub import HfApi

    if not online:
        return [file for file in wanted if (folder / file["path"]).stat().st_size != file["size"]]
    paths = {mismatch["path"] for mismatch in HfApi().verify_repo_checksums(id, **where).mismatches}
    return [file for file in wanted if file["path"] in paths]


def merged(repos: list[dict]) -> list[dict]:
    """One entry for each repository and commit, with the files of all wishes; sorted."""
    entries: dict[tuple, dict] = {}
    for repo in repos:
        key = repo["kind"], repo["id"], repo["revision"]
        entry = entries.setdefault(key, {**repo, "files": [], "requested": []})
        files = {file["path"]: file for file in entry["files"] + repo["files"]}
        entry["files"] = [files[path] for path in sorted(files)]
        entry["requested"] = sorted({*entry["requested"], *repo["requested"]})
    return [entries[key] for key in sorted(entries)]


def write(manifest: dict, output: Path) -> None:
    """Write the manifest by rename, unless it is unchanged. Raises UserError where it cannot be written."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    try:
        if output.exists() and output.read_text(encoding="utf-8") == text:
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = output.with_name(output.name + ".tmp")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}.") from None

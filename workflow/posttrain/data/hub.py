"""Find fetched models, data sets and benchmark data in the shared cache, without a network.

`fetch` is the only stage that opens a connection. Every other stage passes the manifest of `fetch` to a function here
and gets a directory with all files, or a UserError that names the missing files and the command that fetches them.
"""

import errno
import json
import re
from contextlib import contextmanager
from pathlib import Path

from posttrain.config.sections import Source
from posttrain.ground.errors import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")
FULL = "Free some space, or set HF_HOME to a larger disk (for every stage), and run again: it continues."
SHOWN = 10  # files named in one message; a model has dozens of shards


def fetched_repo(kind: str, id: str, revision: str | None, manifests: list[Path]) -> Path:
    """`local_repo`, by the first manifest that lists the repository. Raises UserError where none does."""
    manifest, _ = listings(kind, id, revision, manifests)[0]
    return local_repo(kind, id, revision or "main", manifest)


def listings(kind: str, id: str, revision: str | None, manifests: list[Path]) -> list[tuple[Path, dict]]:
    """The manifests that list a repository, each with its entry. Raises UserError where none does."""
    entries = [
        (manifest, repo)
        for manifest in manifests
        for repo in read_manifest(manifest)["repos"]
        if (repo["kind"], repo["id"]) == (kind, id) and revision in (None, repo["revision"], *repo["requested"])
    ]
    if not entries:
        raise UserError(f"{kind} {id} at {revision} was not fetched: run snakemake, whose rule `fetch` brings it")
    return entries


def local_repo(kind: str, id: str, revision: str, manifest: Path) -> Path:
    """The directory of a fetched `model` or `dataset`, whose files have the manifest's sizes (fetch compared their
    checksums). Libraries load from it; by an id and a revision, `datasets.load_dataset` finds nothing when offline.

    `revision` is a commit or, with `allow_floating`, a branch or tag.
    Raises UserError naming each missing, truncated or altered file and the command that fetches it.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    repo = find_repo(read_manifest(manifest), kind, id, revision, manifest)
    problems = [fault for file in repo["files"] if (fault := _fault(repo, file))]
    if problems:
        more = [f"  … and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        where = f"the cache {HF_HUB_CACHE} (set by HF_HOME)"
        head = f"{kind} {id} at {repo['revision']} is not complete in {where}:"
        raise UserError(head, *problems[:SHOWN], *more, bring_back(manifest))
    return snapshot(repo)


def snapshot(repo: dict) -> Path:
    """The directory of a cached repository: huggingface_hub's documented layout, snapshots/COMMIT/PATH.

    Raises UserError where the repository is not in the cache.
    """
    first = repo["files"][0]["path"]
    path = cached(repo, first)
    if path is None:
        raise UserError(f"{repo['kind']} {repo['id']} at {repo['revision']}: {first} is not in the cache")
    return path.parents[first.count("/")]


def find_repo(content: dict, kind: str, id: str, revision: str, manifest: Path) -> dict:
    """The manifest's entry of a repository, by commit or floating revision. Raises UserError if there is none."""
    for repo in content["repos"]:
        if (repo["kind"], repo["id"]) == (kind, id) and revision in (repo["revision"], *repo["requested"]):
            return repo
    raise UserError(f"{manifest} lists no {kind} {id} at {revision}: it was not fetched.", bring_back(manifest))


def _fault(repo: dict, file: dict) -> str | None:
    """The defect of a cached file, as one line; None where it has the manifest's size."""
    path = cached(repo, file["path"])
    if path is None:
        return f"  {file['path']}: missing"
    size = path.stat().st_size
    if size == file["size"]:
        return None
    word = "truncated" if size < file["size"] else "altered"
    return f"  {file['path']}: {word}, {size} of {file['size']} bytes ({path})"


def cached(repo: dict, file: str) -> Path | None:
    """The path of a file in the shared cache, None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo["id"], file, revision=repo["revision"], repo_type=repo["kind"])
    return Path(path) if isinstance(path, str) else None


def read_manifest(manifest: Path) -> dict:
    """The content of a manifest of `fetch`. Raises UserError, with the command, where it is missing or invalid."""
    try:
        content = json.loads(Path(manifest).read_text(encoding="utf-8"))
        content["repos"], content["tasks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest} is not a manifest of fetch ({error}).", bring_back(manifest)) from None
    return content


def bring_back(manifest: Path) -> str:
    """The sentence with the command that fetches again, for the end of a message."""
    config = Path(manifest).parent / "config.yaml"
    return f"On a machine with a network run: posttrain fetch --config {config} --output {manifest}"


def wish(kind: str, entry: dict) -> tuple:
    """One repository to fetch, hashable: (kind, id, revision, floating allowed, patterns or None)."""
    patterns = entry.get("allow_patterns")
    floating = bool(entry.get("allow_floating"))
    return kind, entry["id"], entry.get("revision"), floating, tuple(patterns) if patterns else None


def dataset_rows(source: Source, fetched: list[Path]):
    """The rows of a fetched data set, as `datasets` loads them. Raises UserError for a subset or split it lacks."""
    import datasets

    assert source.dataset, "the source is a data set on the hub"
    folder = fetched_repo("dataset", source.dataset, source.revision, fetched)
    try:
        return datasets.load_dataset(str(folder), source.subset, split=source.rows)
    except ValueError as error:
        raise UserError(f"prepare: data set {source.dataset}: {str(error).splitlines()[0]}") from None


def dataset_files(source: Source, fetched: list[Path]) -> dict[str, Path]:
    """The fetched data files that match a source's `files`: name in the data set -> path. Raises UserError for none."""
    from huggingface_hub.utils import filter_repo_objects

    assert source.dataset, "the source is a data set on the hub"
    listed: list[str] = []
    for manifest, repo in listings("dataset", source.dataset, source.revision, fetched):
        listed += [file["path"] for file in repo["files"]]
        if names := sorted(filter_repo_objects(listed, allow_patterns=source.files)):
            folder = local_repo("dataset", source.dataset, source.revision or "main", manifest)
            return {name: folder / name for name in names}
    shown = ", ".join(listed[:SHOWN])
    raise UserError(f"prepare: data set {source.dataset}: no file matches {source.files}; there are {shown}")


@contextmanager
def explained(kind: str, id: str, revision: str | None):
    """Turn an exception of huggingface_hub into a UserError that says what to do and shows no token."""
    from huggingface_hub import get_token

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        words = in_words(error, kind, id, revision)
        if words is None:
            raise
        token = get_token()
        raise UserError(words.replace(token, "***") if token else words) from None


def in_words(error: BaseException, kind: str, id: str, revision: str | None) -> str | None:
    """The message for an exception of huggingface_hub; None for any other exception."""
    from huggingface_hub import errors as hub

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{id}"
    login = "set HF_TOKEN (or run `hf auth login`) on this machine and run again."
    if isinstance(error, (hub.LocalEntryNotFoundError, ValueError)) and error.__cause__:
        error = error.__cause__  # its cause says why the file could not be fetched
    words: str | None
    match error:
        case hub.GatedRepoError():
            words = f"is gated. Ask for access on {page}, {login}"
        case hub.RepositoryNotFoundError():
            words = f"no such {kind} for this account. Check the id; if it is private, {login}"
        case hub.RevisionNotFoundError():
            words = f"no such revision. The commits are listed on {page}/commits/main."
        case hub.HFValidationError():
            words = str(error).splitlines()[0]
        case hub.HfHubHTTPError():
            words = words_for_status(error.response.status_code, login)
        case OSError() if error.errno:
            words = words_for_errno(error)
        case _:
            words = words_for_transport(error)
    return words and f"{kind} {id} at {revision or 'main'}: {words}"


def words_for_status(status: int, login: str) -> str:
    if status in (401, 403):
        return f"the hub refuses access (HTTP {status}). Check the token: {login}"
    return f"the hub answers HTTP {status}. Run again later: it continues."


def words_for_errno(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.strerror}). {FULL}"
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"cannot write {error.filename}. Set HF_HOME to a folder of yours, for every stage."
    return f"{error.strerror} ({error.filename}). Run again: it continues."


def words_for_transport(error: BaseException) -> str | None:
    """The message for a failed connection; None for any other exception."""
    from httpx2 import TransportError
    from huggingface_hub import errors as hub

    if isinstance(error, hub.OfflineModeIsEnabled):
        return "not whole in the cache, and HF_HUB_OFFLINE is set. Unset it for fetch."
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return "a file arrives truncated. Run again; if that does not help, check proxies and HF_ENDPOINT."
    if isinstance(error, (TransportError, hub.LocalEntryNotFoundError, hub.XetDownloadError, OSError)):
        kind = type(error).__name__
        return f"no connection to the hub ({kind}). Check the network and HTTPS_PROXY, run again: it continues."
    return None

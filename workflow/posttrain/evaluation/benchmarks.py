"""Find the hub data sets of lm-eval's tasks, and let lm-eval read the fetched ones without a network."""

import difflib
import importlib.util
import json
import os
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from posttrain.config.sections import Evaluate
from posttrain.config.task_files import DATA_KEYS, LOADERS, allowed, calls, own_of, read
from posttrain.data.hub import listings, local_repo, read_manifest, snapshot, wish
from posttrain.ground.errors import UserError, gather


def task_pack(manifest: Path, folder: Path) -> Path:
    """Write lm-eval YAML for each fetched benchmark: lm-eval's own task, with its data in the shared cache.

    `TaskManager(include_path=[str(task_pack(…))], include_defaults=False)` then has exactly the fetched tasks, groups
    and tags, under their own names, in 10 ms (lm-eval's whole index takes 12 s), and loads them offline. So does
    `lm_eval --include_path FOLDER --tasks NAME`. The YAML holds paths of this machine: `folder` belongs into scratch,
    not into an artifact. Raises UserError as local_repo does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for task in read_manifest(manifest)["tasks"]:
        overlay = {"include": str(task_yaml(task)), **task["overrides"]}
        if task["dataset"]:
            overlay["dataset_path"] = str(local_repo("dataset", task["dataset"], task["revision"], manifest))
        # JSON is YAML
        name = task["name"].replace("/", "--") + ".yaml"
        (folder / name).write_text(json.dumps(overlay, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


def own_pack(section: Evaluate, fetched: list[Path], folder: Path) -> Path:
    """Write lm-eval YAML for each of the user's own files, with its data on the hub, if any, in the shared cache.

    Raises UserError for a function that `task_functions` does not name, and as local_repo does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {file: read(file) for file in section.task_files or []}
    revisions = {
        one.dataset: task.revision for task in section.tasks or [] for one in own_of(task.task, list(own.values()))
    }
    for number, (file, one) in enumerate(own.items()):
        if strange := set(calls(one.values)) - allowed(section):
            raise UserError(f"{file}: runs code, {', '.join(sorted(strange))}: name it in evaluate.task_functions")
        overlay = {"include": str(Path(file).resolve())}
        if one.dataset:
            manifest, repo = listings("dataset", one.dataset, revisions[one.dataset], fetched)[0]
            task = {"name": one.names[0], "source": "local", "yaml": file, "cfg": one.values}
            overlay |= task_row(task, repo)["overrides"]
            overlay["dataset_path"] = str(local_repo("dataset", one.dataset, repo["revision"], manifest))
        (folder / f"{number}.yaml").write_text(json.dumps(overlay, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


def task_yaml(task: dict) -> Path:
    """The YAML that defines a benchmark: lm-eval's own, or the user's, relative to the working directory."""
    return (lm_eval_tasks() / task["yaml"] if task["source"] == "lm_eval" else Path(task["yaml"])).resolve()


def lm_eval_tasks() -> Path:
    """The folder of lm-eval's own tasks, found without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec and spec.origin, "lm_eval is pinned"
    return Path(spec.origin).parent / "tasks"


def find_tasks(entries: list[dict], dirs: list[str]) -> list[dict]:
    """Every task and group of the entries, members of groups and tags included, each with the wish for its data.

    Raises UserError for unknown names, for data without a pin, and for tasks whose data cannot be pinned.
    """
    reach = reached_from([entry["task"] for entry in entries], dirs)
    rows = gather(lambda entry: rows_of(entry, reach[entry["task"]]), entries)
    by_name: dict[str, dict] = {}
    for row in chain.from_iterable(rows):
        if by_name.setdefault(row["name"], row)["wish"] != row["wish"]:
            raise UserError(f"task {row['name']} is listed twice, with different revisions or patterns.")
    return list(by_name.values())


def reached_from(names: list[str], dirs: list[str]) -> dict[str, dict]:
    """{name: {task or group: lm-eval's index entry}}. lm-eval's own 14,000 files (12 s) are read only where needed."""
    from lm_eval.tasks import TaskManager

    for defaults in [False, True] if dirs else [True]:
        if defaults:
            print("fetch: reading lm-eval's index of tasks (about 12 s)", flush=True)
        index = TaskManager(include_path=dirs or None, include_defaults=defaults).task_index
        try:
            return dict(zip(names, gather(partial(reached, index=index), names), strict=True))
        except UserError:
            if defaults:
                raise
    raise AssertionError("the last round includes lm-eval's own tasks: it returns or raises")


def reached(name: str, index: dict) -> dict:
    """{name: entry} of a task, of a group and its members, or of a tag's tasks. Raises UserError if unknown."""
    entry = index.get(name)
    if entry is None:
        near = ", ".join(difflib.get_close_matches(str(name), index, n=3))
        raise UserError(f"task {name!r} is not known to lm-eval" + (f"; near: {near}" if near else ""))
    if entry.kind.name == "TAG":
        return {key: value for task in sorted(entry.tags) for key, value in reached(task, index).items()}
    if entry.kind.name == "GROUP":
        return {name: entry, **members(name, entry.cfg["task"], index)}
    return {name: entry}


def members(group: str, listed: list, index: dict) -> dict:
    """{name: entry} of the members of a group. Raises UserError where its list defines a member's data inline."""
    entries: dict[str, object] = {}
    for member in listed:
        item = member if isinstance(member, dict) else {"task": member}
        child: Any = item.get("group") or item.get("task")
        if "group" in item and child not in index:  # a group defined inside the list
            entries |= members(group, item["task"], index)
        elif DATA_KEYS & set(item) or child not in index:
            raise UserError(f"task group {group}: its member {child!r} is defined inline; name other tasks")
        else:
            entries |= reached(child, index)
    return entries


def rows_of(entry: dict, reach: dict) -> list[dict]:
    """The tasks and groups of one entry of the config, with the wish for each task's data.

    Raises UserError where the entry's revisions do not cover all data sets.
    """
    data = dict(zip(reach, gather(lambda name: dataset_of(name, reach[name]), list(reach)), strict=True))
    sets, revision = sorted({id for id in data.values() if id}), entry.get("revision")
    pins = revision if isinstance(revision, dict) else {id: revision for id in sets[:1]}
    if set(pins) - set(sets):
        raise UserError(f"task {entry['task']} reads no {', '.join(sorted(set(pins) - set(sets)))}, which is pinned")
    if not entry.get("allow_floating") and any(not pins.get(id) for id in sets):
        shape = ", ".join(f"{id}: COMMIT" for id in sets)
        raise UserError(f"task {entry['task']} reads {len(sets)} data set(s): give revision: {{{shape}}}")
    wishes = {id: wish("dataset", {**entry, "id": id, "revision": pins.get(id)}) for id in sets}
    return [row_of(name, reach[name], wishes.get(data[name])) for name in reach]


def row_of(name: str, entry, wish_for_data: tuple | None) -> dict:
    """A task or group as a dict; its YAML is relative to lm-eval or to the working directory."""
    path, folder = Path(entry.yaml_path).resolve(), lm_eval_tasks().resolve()
    inside = path.is_relative_to(folder)
    yaml = path.relative_to(folder).as_posix() if inside else os.path.relpath(path)
    source = "lm_eval" if inside else "local"
    return {"name": name, "source": source, "yaml": yaml, "wish": wish_for_data, "cfg": entry.cfg}


def dataset_of(name: str, entry) -> str | None:
    """The hub data set that a task reads; None for groups and for tasks with local files.

    Raises UserError for data from elsewhere, which no revision can pin.
    """
    if entry.kind.name == "GROUP":
        return None
    path, kwargs = entry.cfg.get("dataset_path"), entry.cfg.get("dataset_kwargs") or {}
    if entry.kind.name == "PY_TASK" or "custom_dataset" in entry.cfg or not path:
        raise UserError(f"task {name} creates or finds its data in its own Python code: it cannot be pinned")
    if "://" in str(kwargs.get("data_files", "")):
        raise UserError(f"task {name} reads data from a URL ({kwargs['data_files']}), which no revision pins")
    return None if path in LOADERS or Path(path).exists() else path


def task_row(task: dict, repo: dict | None) -> dict:
    """A task's or group's entry in the manifest: its YAML, its data set, and keys to override.

    Raises UserError where `datasets` cannot find the task's data among the fetched files.
    """
    row = {"name": task["name"], "source": task["source"], "yaml": task["yaml"], "overrides": {}}
    if repo is None:
        return {**row, "dataset": None, "revision": None}
    name, kwargs = task["cfg"].get("dataset_name"), task["cfg"].get("dataset_kwargs") or {}
    options = {key: value for key, value in kwargs.items() if key not in ("revision", "trust_remote_code")}
    paths = [file["path"] for file in repo["files"]]
    if name and "README.md" not in paths and any(path.startswith(f"{name}/") for path in paths):
        # The hub's parquet conversion (refs/convert/parquet) has a folder per configuration, and no card.
        name, options = None, {**options, "data_dir": task["cfg"]["dataset_name"]}
        row["overrides"] = {"dataset_name": None}
    if options != kwargs:
        row["overrides"]["dataset_kwargs"] = options
    prove_loadable(task["name"], repo, name, options)
    return {**row, "dataset": repo["id"], "revision": repo["revision"]}


def prove_loadable(task: str, repo: dict, name: str | None, kwargs: dict) -> None:
    """Raise UserError where `datasets` cannot load the task's data from the fetched files."""
    from datasets import load_dataset_builder

    chosen = {key: kwargs[key] for key in ("data_dir", "data_files") if key in kwargs}
    try:
        load_dataset_builder(str(snapshot(repo)), name, **chosen)
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(
            f"task {task}: data set {repo['id']} at {repo['revision']} cannot be read as {name or 'it is'}: "
            f"{str(error).splitlines()[0]}. If it is a loading script, which no current `datasets` runs, pin "
            "a commit of its branch refs/convert/parquet. Or allow_patterns leave out needed files."
        ) from None

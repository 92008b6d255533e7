"""The user's own files and the hub items that a section names, and the sides (train, test) that data has."""

import glob
import hashlib
import json
import os
from pathlib import Path

from posttrain.config import task_files
from posttrain.config.sections import (
    DOCUMENTS,
    SOURCES,
    Base,
    Evaluate,
    HubModel,
    Prepare,
    Section,
    Source,
    Task,
    Tokenizer,
)

TOKENIZER = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt"]
SENTENCEPIECE = (
    "has a tokenizer.model and no tokenizer.json; transformers converts it to other tokens than its own library "
    "(sentencepiece) makes. Give another folder or model with a tokenizer.json of the same tokens as prepare.tokenizer"
)
DATA_ENDS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")  # how names of files with rows end
TEXT_ENDS = (".txt", ".text")  # of plain text, which holds documents only
PACKING = (".gz", ".zst")
OF_WORLD = ("text", "long", "sft", "preference")  # kinds of data that the built-in world has rows for


def sides(prepare: Prepare, task: str) -> set[str]:
    """The sides, `train` and `test`, that a kind of data (one of TRAINED) has rows for."""
    generated = prepare.world and task in OF_WORLD and (task != "long" or prepare.world.long)
    uses = {"split"} if generated else {source.use for source in getattr(prepare, task)}
    split = {"train", "test"} if prepare.test_fraction or generated else {"train"}
    return uses - {"split"} | (split if "split" in uses else set())


def is_mixture(prepare: Prepare, task: str) -> bool:
    """Whether a source of a kind of data has a weight."""
    return any(source.weight is not None for source in getattr(prepare, task))


def without_packing(path) -> str:
    """A file's path without .gz or .zst."""
    end = Path(path).suffix.lower()
    return str(path)[: -len(end)] if end in PACKING else str(path)


def data_files(path: str, task: str) -> list[Path]:
    """The files that a source's `path` names, in the order of their names: itself; of a folder those directly in it
    that can be read for the task; or those that match a pattern. The path itself where there is none."""
    if os.path.isdir(path):
        ends = (*DATA_ENDS, *TEXT_ENDS) if task in DOCUMENTS else DATA_ENDS
        named = [os.path.join(path, name) for name in os.listdir(path) if not name.startswith((".", "_"))]
        listed = [file for file in named if os.path.splitext(without_packing(file))[1].lower() in ends]
    else:
        listed = [path] if os.path.lexists(path) else glob.glob(path, recursive=True)
    return [Path(file) for file in sorted(listed) if not os.path.isdir(file)] or [Path(path)]


def own_files(stage: str, section: Section | None) -> list[tuple[str, Path]]:
    """(dotted key, file) of every local file that a section names; for a model's folder, the files read from it."""
    files = []
    if isinstance(section, Prepare):
        for task in SOURCES:
            for number, source in enumerate(getattr(section, task)):
                listed = data_files(source.path, task) if source.path else []
                files += [(f"{stage}.{task}[{number}].path", file) for file in listed]
        if section.chat_template not in (None, "default", "tokenizer"):
            files.append((f"{stage}.chat_template", Path(section.chat_template)))
        if section.tokenizer and section.tokenizer.path:
            folder = Path(section.tokenizer.path)
            there = sorted({name for pattern in TOKENIZER for name in glob.glob(pattern, root_dir=folder)})
            files += [(f"{stage}.tokenizer.path", folder / name) for name in there or ["tokenizer.json"]]
    elif isinstance(section, Base) and section.path:
        from posttrain.ground import weights  # not above: stages import this module, and do not use the files' names

        folder = Path(section.path)
        settings = [name for name in ("generation_config.json",) if os.path.isfile(folder / name)]
        files += [(f"{stage}.path", folder / name) for name in ["config.json", *settings, *weights.named(folder)]]
    elif isinstance(section, Evaluate):
        keys: dict[Path, str] = {}  # a file that several tasks read counts once
        for number, name in enumerate(section.task_files or []):
            for file in task_files.inputs(name):
                keys.setdefault(file, f"{stage}.task_files[{number}]")
        for number, name in enumerate(section.task_functions or []):
            keys.setdefault(Path(name.rpartition(":")[0]), f"{stage}.task_functions[{number}]")
        files = [(key, file) for file, key in keys.items()]
    return files


def hub_items(section: Section) -> dict[str, dict]:
    """The models, data sets and lm-eval tasks on the hub that a section names: folder name -> section of `fetch`."""
    items: dict[str, dict] = {}
    for key in section.__class__.model_fields:
        value = getattr(section, key)
        for part in value if isinstance(value, list) else [value]:
            own = task_files.data_sets(section, part) if isinstance(section, Evaluate) else None
            for one in [part] if own is None else own:
                if isinstance(one, Section):
                    items |= _hub_item(one, isinstance(section, Tokenizer)) or hub_items(one)
    return items


def _hub_item(part: Section, tokenizer: bool) -> dict[str, dict]:
    """The item of a section that names one; of a model whose tokenizer alone is used, the tokenizer's files; of a data
    set the source's `files`, if any, by which the item is named too."""
    kinds = {HubModel: ("models", "id", "id"), Source: ("datasets", "dataset", "id"), Task: ("tasks", "task", "task")}
    kind, key, fetch_key = kinds.get(part.__class__, ("", "", ""))
    if not isinstance(part, HubModel | Source | Task):
        return {}
    if getattr(part, key) is None or not (part.revision or part.allow_floating):
        return {}
    name = f"{kind}--{getattr(part, key).replace('/', '--')}@{(part.revision or 'floating').replace('/', '--')}"
    entry = {fetch_key: getattr(part, key), "revision": part.revision, "allow_floating": part.allow_floating}
    patterns = [*TOKENIZER, "config.json"] if tokenizer else getattr(part, "files", None)
    if patterns and not tokenizer:
        listed = json.dumps(patterns, ensure_ascii=False, separators=(",", ":"))
        name += f"--{hashlib.sha256(listed.encode()).hexdigest()[:8]}"
    return {name: {kind: [entry | ({"allow_patterns": patterns} if patterns else {})]}}

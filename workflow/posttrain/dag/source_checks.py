"""Rules for a source of `prepare`: contradictions between its keys, and what the first rows of its files lack."""

import functools
import os
from itertools import islice

from posttrain.config.mistakes import one_of
from posttrain.config.sections import ANSWERED, ASKED, DOCUMENTS, TRAINED, HubModel, Prepare, Source, Task
from posttrain.config.sources import OF_WORLD, data_files, is_mixture
from posttrain.config.stages import Experiment
from posttrain.dag.rules import Mistakes
from posttrain.data import files, layouts, lines, shape
from posttrain.data.lines import RowError
from posttrain.ground.errors import UserError

FIRST = 100  # rows of a source's first file in which columns and layout are searched for


def pinned(where: str, section: HubModel | Source | Task) -> Mistakes:
    """A hub item needs a full commit, unless `allow_floating` is set."""
    revision = section.revision
    commit = revision is not None and len(revision) == 40 and set(revision) <= set("0123456789abcdef")
    if not commit and not section.allow_floating:
        problem = "is missing" if revision is None else f"{revision!r} can move"
        yield f"{where}.revision", f"{problem}; give the full 40-digit commit, or set allow_floating: true"


def source_mistakes(where: str, task: str, source: Source, group_key: str) -> Mistakes:
    """Mistakes in a source: (dotted key, what is wrong). task: its kind of data, a key of `prepare`."""
    yield from one_of(where, source, "path", "dataset")
    if source.dataset:
        yield from pinned(where, source)
    for key in without_effect(task, source):
        if key in source.model_fields_set:
            yield f"{where}.{key}", "has no effect here"
    allowed = ("auto", *layouts.FORMATS.get(task, ()))
    if source.format not in allowed:
        yield f"{where}.format", f"{source.format} does not hold rows for {task}; allowed: {', '.join(allowed)}"
    if task == "kto" and source.format in ("ranking", "score") and source.threshold is None:
        yield f"{where}.threshold", "is missing: the score from which an answer is wanted"
    yield from unknown_files(f"{where}.path", task, source)
    mistakes = [*unknown_keys(where, task, source, group_key), *broken_templates(where, source)]
    yield from mistakes or [*absent_columns(where, task, source)] or unknown_layout(where, task, source)


def weight_mistakes(task: str, experiment: Experiment) -> Mistakes:
    """Weights of sources that cannot be told apart, or of the only one. task: one of TRAINED."""
    sources = getattr(experiment.prepare, task)
    if not is_mixture(experiment.prepare, task):
        return
    if len(sources) == 1 and not (experiment.prepare.world and task in OF_WORLD):
        yield f"prepare.{task}[0].weight", "has no effect on the only source"
    read = [str(file) for source in sources if source.path for file in data_files(source.path, task)]
    read += ["/".join([source.dataset, *(source.files or [source.subset or "", source.rows])])
             for source in sources if source.dataset]  # fmt: skip
    if twice := [name for name in read if read.count(name) > 1]:
        yield f"prepare.{task}", f"{twice[0]} is read by two sources, and rows are weighed by where they were read"


def mixture_mistakes(experiment: Experiment) -> Mistakes:
    """Settings of all sources that have no effect without a weight, or without a test source."""
    prepare = experiment.prepare
    if prepare.weigh_by and not any(is_mixture(prepare, task) for task in TRAINED):
        yield "prepare.weigh_by", "has no effect without a source with a weight"
    if prepare.overlap and not any(source.use == "test" for task in TRAINED for source in getattr(prepare, task)):
        yield "prepare.overlap", "has no effect without a source of use: test"


def unused_weights(experiment: Experiment) -> Mistakes:
    """Weights of documents that no stage trains on. The caller ignores inherited ones."""
    prepare, longctx = experiment.prepare, experiment.longctx
    for number, source in enumerate(prepare.text if not experiment.base.scratch else ()):
        if source.weight is not None:
            yield f"prepare.text[{number}].weight", "has no effect without base.scratch, which trains on documents"
    for number, source in enumerate(prepare.long if not longctx or longctx.tuning == "none" else ()):
        if source.weight is not None:
            yield f"prepare.long[{number}].weight", "has no effect without a longctx that trains"


def without_effect(task: str, source: Source) -> list[str]:
    """The keys that mean nothing for a source of its kind."""
    keys = ["revision", "subset", "rows", "files", "allow_floating"] if source.path and not source.dataset else []
    keys += ["subset", "rows"] if source.files else []
    keys += [] if source.max_rows else ["sample"]
    keys += ["weight"] * (task in ASKED or source.use == "test")
    if task in ASKED:
        keys.append("use")
    keys += ["threshold"] * (task != "kto" or source.format in ("kto", "preference"))
    return keys + ["separator", "system"] * (task in (*DOCUMENTS, *ASKED))


def unknown_files(where: str, task: str, source: Source) -> Mistakes:
    """Existing files of a kind that is not read."""
    for file in filter(os.path.isfile, data_files(source.path, task) if source.path else ()):
        try:
            files.reader(file, task)
        except UserError as error:
            yield where, str(error)


def unknown_keys(where: str, task: str, source: Source, group_key: str) -> Mistakes:
    """Keys of `columns` and `template` that rows of this kind are not read by."""
    readable = shape.KEYS[task] | {"id", group_key}
    for name in ("columns", "template"):
        for key in getattr(source, name) or ():
            if key not in readable:
                shown = ", ".join(sorted(key for key in readable if "_" not in key))
                yield f"{where}.{name}.{key}", f"is not read in rows of {task}; allowed: {shown}"


def broken_templates(where: str, source: Source) -> Mistakes:
    """Templates that cannot be read, or that name no column."""
    for key, text in (source.template or {}).items():
        try:
            if not shape.placeholders(text):
                yield f"{where}.template.{key}", "names no column, so that every row would have the same text"
        except ValueError as error:
            yield f"{where}.template.{key}", f"{text!r} cannot be read: {error}"


def absent_columns(where: str, task: str, source: Source) -> Mistakes:
    """Columns that none of the first rows of the first local file has. A file that cannot be read is left to
    `prepare`, which names its lines."""
    named = [(f"columns.{key}", column) for key, column in shape.named(source.columns or {})]
    named += [(f"template.{key}", name) for key, text in (source.template or {}).items()
              for name in shape.placeholders(text)]  # fmt: skip
    rows, renamed = first_rows(source, task), source.columns or {}
    for key, column in named if rows else ():
        lacking = [row for row in rows if shape.value_at(row, column) is shape.ABSENT]
        if len(lacking) == len(rows) and not (key.startswith("template.") and column.partition(".")[0] in renamed):
            yield f"{where}.{key}", f"{none_of(rows, source, task)} has {column!r}; {shape.near(column, rows[0])}"


def unknown_layout(where: str, task: str, source: Source) -> Mistakes:
    """A source none of whose first rows has a layout of its kind."""
    kind = layouts.TASKS.get(task, task)
    rows = first_rows(source, task) if source.format == "auto" else []
    shaped = [value for _, value, _ in shape.stream(((0, row, False) for row in rows), source)]
    usable = [row for row in shaped if row and not isinstance(row, RowError)]
    of_rows = {layout for row in usable if (layout := layouts.guess(row, kind))}
    if usable and not of_rows:
        keys, allowed = ", ".join(map(str, usable[0])), ", ".join(layouts.FORMATS[kind])
        what = f"{none_of(rows, source, task)} has a layout of {task} ({allowed}); keys found: {keys}"
        yield where, f"{what}; {way_out(task, usable[0])}"
    if task == "kto" and of_rows and of_rows <= {"ranking", "score"} and source.threshold is None:
        yield f"{where}.threshold", "is missing: the score from which an answer is wanted"


def unanswered(task: str, prepare: Prepare) -> str:
    """Why no row of a kind has an `answer`, as far as the first rows of local files tell; "" where some may."""
    told = ""  # that there are no rows is told where they are needed
    if prepare.world and task in OF_WORLD:
        return ""
    for source in getattr(prepare, task):
        rows = [value for _, value, _ in shape.stream(((0, row, False) for row in first_rows(source, task)), source)]
        if not rows or any(not isinstance(row, dict) or row.get("answer") not in (None, "") for row in rows):
            return ""
        told = f"{none_of(rows, source, task)} has an answer, such as by `columns: {{answer: COLUMN}}`"
    return told


def way_out(task: str, row: dict) -> str:
    """What helps for a row that has no layout of its kind of data."""
    if task == "sft" and {"question", "answer"} <= row.keys():
        names = "prompt: question, completion: answer, answer: answer"
        return f"`columns: {{{names}}}` trains on them, and prepare.answers asks them as a test"
    kinds = {kind: layouts.TASKS.get(kind, kind) for kind in (*ANSWERED, *ASKED) if kind != task}
    others = [kind for kind, of_layouts in kinds.items() if layouts.guess(row, of_layouts)]
    if others:
        return f"prepare.{others[0]} reads such rows"
    hint = ", and `format: text` trains on whole texts" if task == "sft" and "text" in row else ""
    return f"`columns` gives them other names{hint}"


def none_of(rows: list[dict], source: Source, task: str) -> str:
    """The beginning of a sentence on the first rows of a source."""
    return f"none of the first {len(rows)} rows of {data_files(source.path or '', task)[0]}"


def first_rows(source: Source, task: str) -> list[dict]:
    """The first rows of a source's first local file that are objects."""
    if not source.path:
        return []
    file = data_files(source.path, task)[0]
    try:
        return objects_of(str(file), task, os.stat(file).st_mtime_ns)
    except (UserError, OSError):
        return []


@functools.lru_cache(maxsize=64)
def objects_of(file: str, task: str, changed: int) -> list[dict]:
    """The objects among the first rows of a file. changed: its time, so that a change is read."""
    numbered = files.read(file, task, lines.MAX_LINE_BYTES)
    return [value for _, value, _ in islice(numbered, FIRST) if isinstance(value, dict)]

"""Rules across the keys of an experiment: contradictions, and settings that have no effect."""

import contextlib
import datetime
import os
from functools import partial

from posttrain.config.mistakes import one_of
from posttrain.config.sections import (
    ANSWERED,
    ASKED,
    SOURCES,
    TRAINED,
    Prepare,
    Section,
    Training,
    inapplicable,
    subsections,
)
from posttrain.config.sources import SENTENCEPIECE, sides
from posttrain.config.stages import ALIGNED, JUDGES, STAGES, Experiment
from posttrain.config.task_files import all_own, all_read, own_of
from posttrain.dag.files import base_files, evaluate_files, prepare_files
from posttrain.dag.given import given_mistakes
from posttrain.dag.position_checks import position_mistakes
from posttrain.dag.rules import Mistakes, Rule
from posttrain.dag.source_checks import mixture_mistakes, pinned, source_mistakes, unused_weights, weight_mistakes
from posttrain.dag.stage_checks import stage_rules, training_mistakes
from posttrain.dag.task_checks import (
    function_mistakes,
    generation_mistakes,
    metrics_mistakes,
    own_task_mistakes,
    task_file_mistakes,
)
from posttrain.world import tasks as world_tasks

OF_SOURCES = {"test_fraction", "group_key", "allow_empty_user", "max_line_mb"}  # keys of `prepare`
MEASURING = {"seed", "batch_size", "micro_batch_size", "precision"}  # keys of a training that act on its measurements


def contradictions(experiment: Experiment) -> Mistakes:
    """Contradictions between keys: (dotted key, what is wrong and what would be right)."""
    for rule in [*FOUNDATIONS, *RULES]:
        yield from rule(experiment)


def _without_effect(where: str, experiment: Experiment) -> Mistakes:
    """Keys of a stage's section that have no effect with its other keys."""
    if section := getattr(experiment, where):
        yield from _inapplicable(f"{where}.", section)


def _inapplicable(where: str, section: Section) -> Mistakes:
    for key, reason in inapplicable(section):
        if key in section.model_fields_set:
            yield f"{where}{key}", reason
    for key in subsections(section.__class__):
        if isinstance(value := getattr(section, key), Section):
            yield from _inapplicable(f"{where}{key}.", value)
        for number, item in enumerate(value if isinstance(value, list) else []):
            yield from _inapplicable(f"{where}{key}[{number}].", item)


def unused(experiment: Experiment) -> Mistakes:
    """Settings without effect in the experiment: (section or key, reason). The caller ignores inherited ones."""
    present = [name for name in STAGES if getattr(experiment, name) is not None]
    for name, stage in STAGES.items():
        readers = [other for other in STAGES if name in STAGES[other].reads]
        if stage.runs == "where read" and not set(readers) & set(present):
            yield name, f"has no effect without {' or '.join(readers)}"
        aligned = [other for other in STAGES if STAGES[other].aligns]
        if name in JUDGES and "sft" in stage.reads and not set(aligned) & set(present):
            yield name, f"has no effect without {', '.join(aligned[:-1])} or {aligned[-1]}"


def unused_training(experiment: Experiment) -> Mistakes:
    """Settings of a training that does not take place. The caller ignores inherited ones."""
    if experiment.longctx and experiment.longctx.tuning == "none":
        for key in Training.model_fields.keys() - MEASURING:
            yield f"longctx.{key}", "has no effect with tuning: none, which trains nothing"


def _sources(task: str, experiment: Experiment) -> Mistakes:
    for number, source in enumerate(getattr(experiment.prepare, task)):
        yield from source_mistakes(f"prepare.{task}[{number}]", task, source, experiment.prepare.group_key)


def _data(experiment: Experiment) -> Mistakes:
    prepare = experiment.prepare
    if not (prepare.world or any(getattr(prepare, task) for task in TRAINED)):
        yield "prepare", f"has no data: set world, or give sources under {', '.join(TRAINED[:-1])} or {TRAINED[-1]}"
    if prepare.world and not any(getattr(prepare, task) for task in SOURCES):
        for key in sorted(OF_SOURCES & prepare.model_fields_set):
            yield f"prepare.{key}", "has no effect on the built-in world: it applies to sources, and there are none"


def _given_tokenizer(experiment: Experiment) -> Mistakes:
    prepare = experiment.prepare
    if prepare.tokenizer:
        yield from one_of("prepare.tokenizer", prepare.tokenizer, "vocab_size", "path", "hub")
        if prepare.tokenizer.hub:
            yield from pinned("prepare.tokenizer.hub", prepare.tokenizer.hub)
        if prepare.tokenizer.vocab_size and "train" not in sides(prepare, "text"):
            yield "prepare.tokenizer.vocab_size", "needs text to train on: set prepare.world or prepare.text"


def _base(experiment: Experiment) -> Mistakes:
    base = experiment.base
    yield from one_of("base", base, "path", "hub", "scratch")
    if base.hub:
        yield from pinned("base.hub", base.hub)


def _sft(experiment: Experiment) -> Mistakes:
    waiting = [name for name in ALIGNED if getattr(experiment, name)]
    if waiting and experiment.sft is None:
        yield "sft", f"is not set, and {', '.join(waiting)} can only start from the SFT policy: set sft"


def _scratch(experiment: Experiment) -> Mistakes:
    if scratch := experiment.base.scratch:
        width, uneven = divmod(scratch.hidden_size, scratch.heads)
        if uneven or width % 2:
            problem = f"{scratch.heads} does not divide hidden_size {scratch.hidden_size} into even parts"
            yield "base.scratch.heads", problem


def _scratch_training(experiment: Experiment) -> Mistakes:
    if scratch := experiment.base.scratch:
        yield from training_mistakes("base.scratch", scratch)


def _tokenizer(experiment: Experiment) -> Mistakes:
    prepare, base, tokenizer = experiment.prepare, experiment.base, experiment.prepare.tokenizer
    if base.scratch and "train" not in sides(prepare, "text"):
        yield (
            "base.scratch",
            "has no text to train on: set prepare.world, or a prepare.text without `use: test`",
        )
    elif base.scratch and "test" not in sides(prepare, "text"):
        split = any(source.use == "split" for source in prepare.text)
        where, setting = ("prepare.test_fraction", "0") if split else ("prepare.text", "`use: train` alone")
        yield where, f"{setting} leaves no held-out text, which base.scratch needs to check that it learned"
    if tokenizer and tokenizer.vocab_size and not base.scratch and (base.path or base.hub):
        yield "prepare.tokenizer.vocab_size", "a given base needs its own tokenizer; leave this out, or null"
    given = tokenizer and (tokenizer.path or tokenizer.hub)
    if prepare.chat_template == "tokenizer" and base.scratch and not given:
        yield "prepare.chat_template", "a tokenizer trained on the text carries none; use default or a .jinja file"
    if prepare.end_of_turn and base.scratch and not given:
        yield "prepare.end_of_turn", "has no effect on a tokenizer trained on the text, whose turns end with <|end|>"
    folder = (tokenizer.path if tokenizer and given else base.path) or ""
    if os.path.isfile(f"{folder}/tokenizer.model") and not os.path.isfile(f"{folder}/tokenizer.json"):
        yield "prepare.tokenizer", f"{folder} {SENTENCEPIECE}"
    if prepare.date and not is_day(prepare.date):
        yield "prepare.date", f"there is no day {prepare.date}"


def _parts_of_rows(experiment: Experiment) -> Mistakes:
    """The longest prompt and the longest answer, which stand within the longest row."""
    prepare, longest = experiment.prepare, experiment.longest_row
    limits = {key: getattr(prepare, key) for key in ("max_prompt_tokens", "max_answer_tokens")}
    given = {key: limit for key, limit in limits.items() if limit is not None}
    for key, limit in given.items():
        if not any(sides(prepare, task) for task in ANSWERED):
            yield f"prepare.{key}", f"has no effect without rows of {', '.join(ANSWERED)}"
        elif limit >= longest:
            whole = f"prepare.max_tokens ({longest}), the limit of prompt and answer together, is no more"
            yield f"prepare.{key}", f"{limit} has no effect: {whole}"
    if len(given) == 2 and max(given.values()) < longest < sum(given.values()):
        both = (
            f"{prepare.max_prompt_tokens} and {prepare.max_answer_tokens} are more than prepare.max_tokens ({longest})"
        )
        yield "prepare.max_answer_tokens", f"{both}, the limit of prompt and answer together"


def is_day(date: str) -> bool:
    """Whether a date, as 2024-07-26, exists."""
    with contextlib.suppress(ValueError):
        return bool(datetime.date.fromisoformat(date))
    return False


def _tasks(experiment: Experiment) -> Mistakes:
    prepare, tasks = experiment.prepare, experiment.evaluate.tasks
    held = {f"heldout_{task}": task for task in (["text"] if prepare.world else ["text", "sft"])}
    held = {name: task for name, task in held.items() if prepare.world or getattr(prepare, task)}
    empty = {name: task for name, task in held.items() if "test" not in sides(prepare, task)}
    prepared = world_tasks.names(prepare.world) if prepare.world else []
    prepared += [name for name in held if name not in empty] + [key for key in ASKED if getattr(prepare, key)]
    known = all_own(experiment.evaluate)
    if tasks is None and not prepared:
        ways = "hold out rows of prepare.text or prepare.sft, set prepare.choices or prepare.answers, or name tasks"
        yield "evaluate.tasks", f"prepare makes no benchmark task here: {ways}"
    if tasks == []:
        yield "evaluate.tasks", "is empty: leave it out for the built-in tasks, or name one"
    for number, task in enumerate(tasks or []):
        where = f"evaluate.tasks[{number}]"
        if own := own_of(task.task, known):
            yield from own_task_mistakes(where, task, own)
            if task.task in prepared:
                yield f"{where}.task", f"{task.task!r} is made by prepare too; give your own another name"
        elif task.revision is not None or task.allow_floating:
            yield from pinned(where, task)
        elif task.task in empty:
            yield f"{where}.task", f"{task.task!r} has no row: {_no_test_side(prepare, empty[task.task])}"
        elif task.task not in prepared and all_read(experiment.evaluate):
            yield (
                f"{where}.task",
                f"{task.task!r} is not made by prepare here ({', '.join(prepared) or 'none is'}); "
                "for a task of lm-eval give `revision`, the commit of its data set, for your own `task_files`",
            )
        if task.task in [earlier.task for earlier in tasks[:number]]:
            yield f"{where}.task", f"{task.task!r} is named twice"


def _no_test_side(prepare: Prepare, task: str) -> str:
    """Why a kind of data has no held-out rows."""
    split = any(source.use == "split" for source in getattr(prepare, task))
    return "prepare.test_fraction is 0" if split else f"prepare.{task} has `use: train` alone"


def _compare(experiment: Experiment) -> Mistakes:
    """The prompts that policies are compared by are held-out ones."""
    aligned = [name for name, stage in STAGES.items() if stage.aligns and getattr(experiment, name)]
    asked = ("preference", "kto", "sft")
    if aligned and not any("test" in sides(experiment.prepare, task) for task in asked):
        ways = " or ".join(f"prepare.{task}" for task in asked)
        yield "compare", f"has no held-out prompts: give a source of {ways} without `use: train`, and a test_fraction"


FOUNDATIONS: list[Rule] = [_data, _base, _sft]  # what other rules rest on: they say nothing of a base that is none
RULES: list[Rule] = [
    *(partial(_without_effect, stage) for stage in STAGES),
    *(partial(_sources, task) for task in SOURCES),
    *(partial(weight_mistakes, task) for task in TRAINED),
    mixture_mistakes,
    _given_tokenizer,
    _scratch,
    _scratch_training,
    _tokenizer,
    _parts_of_rows,
    *stage_rules(),
    given_mistakes,
    position_mistakes,
    _tasks,
    _compare,
    task_file_mistakes,
    function_mistakes,
    generation_mistakes,
    metrics_mistakes,
    prepare_files,
    base_files,
    evaluate_files,
]
UNUSED: list[Rule] = [unused, unused_training, unused_weights]

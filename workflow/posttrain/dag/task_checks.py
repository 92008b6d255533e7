"""Rules for the user's own tasks in lm-eval's YAML."""

import ast
from collections.abc import Iterator
from dataclasses import fields
from os.path import isfile, normpath
from typing import get_args

from posttrain.config.mistakes import nearest
from posttrain.config.sections import Evaluate, Generation, Task
from posttrain.config.stages import Experiment
from posttrain.config.task_files import (
    DATA_KEYS,
    LOADERS,
    SPLITS,
    Called,
    Own,
    all_own,
    all_read,
    allowed,
    calls,
    own_of,
    read,
)
from posttrain.dag.rules import Mistakes
from posttrain.dag.source_checks import pinned
from posttrain.evaluation.texts import NO_WORDNET, has_wordnet
from posttrain.ground.errors import UserError

PYTHON = "{} makes the task in Python: give YAML, and the functions that it calls in evaluate.task_functions"
SCORED = ("heldout_text", "heldout_sft", "choices")  # tasks of `prepare` that generate nothing


def task_file_mistakes(experiment: Experiment) -> Mistakes:
    """Files that define no task, or one that lm-eval could not load without a network; tasks that nothing names."""
    section = experiment.evaluate
    named = {name for task in section.tasks or [] for own in own_of(task.task, all_own(section)) for name in own.names}
    first: dict[str, str] = {}
    for number, file in enumerate(section.task_files or []):
        where = f"evaluate.task_files[{number}]"
        if not isfile(file):
            continue  # told by `files.evaluate_files`
        try:
            own = read(file)
        except UserError as error:
            yield where, str(error)
            continue
        name = own.names[0]
        if name in first:
            yield where, f"{file} defines {name!r}, as {first[name]} does"
        elif name not in named and all_read(section):
            yield where, f"{file} defines {name!r}, which evaluate.tasks names neither itself nor by a group or tag"
        first.setdefault(name, file)
        for text in _mistakes(own, section):
            yield where, text


def function_mistakes(experiment: Experiment) -> Mistakes:
    """Functions that are not in their file, or that no task calls."""
    section = experiment.evaluate
    called = {str(call) for own in all_own(section) for call in calls(own.values)}
    for number, named in enumerate(section.task_functions or []):
        where, (file, _, name) = f"evaluate.task_functions[{number}]", named.rpartition(":")
        if not file.endswith(".py") or not name.isidentifier():
            yield where, f"found {named!r}, allowed: FILE.py:NAME"
        elif isfile(file) and name not in _functions(file):
            yield where, f"{file} defines no function {name!r}"
        elif f"{normpath(file)}:{name}" not in called and all_read(section):
            yield where, f"no file of evaluate.task_files calls {named}"


def own_task_mistakes(where: str, task: Task, own: list[Own]) -> Mistakes:
    """The revision of an own task's data: needed for a data set on the hub, without effect on local data."""
    sets = sorted({one.dataset for one in own if one.dataset})
    if len(sets) > 1:
        yield f"{where}.task", f"{task.task!r} reads {' and '.join(sets)}, each with its revision: name its tasks"
    elif sets and not (task.revision or task.allow_floating):
        yield f"{where}.revision", f"is missing: {task.task!r} reads the data set {sets[0]} on the hub; give its commit"
    elif sets:
        yield from pinned(where, task)
    else:
        for key in ("revision", "allow_floating"):
            if getattr(task, key):
                yield f"{where}.{key}", f"has no effect: {task.task!r} reads local data"


def generation_mistakes(experiment: Experiment) -> Mistakes:
    """Settings of generation for tasks that generate nothing, or without effect; sampling in batches of any size."""
    section, scratch = experiment.evaluate, experiment.base.scratch
    longest, known = section.max_length or (scratch.context if scratch else None), all_own(section)
    for number, task in enumerate(section.tasks or []):
        where, given = f"evaluate.tasks[{number}].generation", {}
        own = [one.generation for one in own_of(task.task, known) if one.members is None]
        if task.generation:
            given = task.generation.model_dump(exclude_none=True)
            if task.task in SCORED or (own and own.count(None) == len(own)):
                yield where, f"has no effect: the answers to {task.task!r} are not generated"
            yield from _without_effect(where, given, next(filter(None, own), {}) | given, longest)
        sampled = given.get("do_sample", any(one.get("do_sample") for one in filter(None, own)))
        if sampled and section.batch_size == "auto":
            yield "evaluate.batch_size", f"must be a number: the sampled answers to {task.task!r} depend on it"


def _without_effect(where: str, given: dict, whole: dict, longest: int | None) -> Mistakes:
    """Settings of generation that do nothing. given: those of the config; whole: with those of an own task."""
    if not given:
        yield where, f"is empty: leave it out, or set one of {', '.join(Generation.model_fields)}"
    if "length_penalty" in given and whole.get("num_beams", 1) == 1:
        yield f"{where}.length_penalty", "has no effect without num_beams of 2 or more"
    for key in ("temperature", "top_p"):
        if key in given and not whole.get("do_sample"):
            yield f"{where}.{key}", "has no effect without do_sample: true"
    if longest and given.get("max_gen_toks", 0) >= longest:
        yield f"{where}.max_gen_toks", f"{given['max_gen_toks']} leaves no room for a question in {longest} tokens"


def metrics_mistakes(experiment: Experiment) -> Mistakes:
    """Metrics of texts for tasks whose answers are none, and METEOR without its data."""
    section = experiment.evaluate
    for number, task in enumerate(section.tasks or []):
        if task.metrics is None:
            continue
        where, own = f"evaluate.tasks[{number}].metrics", own_of(task.task, all_own(section))
        if not (own or task.task == "answers") and all_read(section):
            yield where, f"are for `answers`, and for tasks of task_files that generate; {task.task!r} is neither"
        for one in own:
            if one.generation is None:
                why = "is a group: name its tasks" if one.members is not None else "does not generate"
                yield where, f"are of generated texts: {one.names[0]!r} {why}"
            elif "process_results" in one.values:
                yield where, f"and process_results of {one.names[0]!r} exclude each other: leave one of the two out"
        if len({*task.metrics}) < len(task.metrics):
            yield where, "names one twice"
        if "meteor" in task.metrics and not has_wordnet():
            yield where, NO_WORDNET


def _functions(file: str) -> set[str]:
    """The functions and classes of a Python file; all that is asked for, where it is not valid, are none."""
    try:
        with open(file, encoding="utf-8") as opened:
            tree = ast.parse(opened.read())
    except (OSError, SyntaxError, ValueError):
        return set()
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _mistakes(own: Own, section: Evaluate) -> Iterator[str]:
    """What is wrong with a task or a group, each with the file and line of its key."""
    from lm_eval.config import GroupConfig, TaskConfig

    keys = [field.name for field in fields(TaskConfig)]
    keys += [field.name for field in fields(GroupConfig)] if own.members is not None else []
    for key in own.values:
        if key in ("class", "custom_dataset"):
            yield f"{own.lines[key]}: {PYTHON.format(key)}"
        elif key not in keys:
            yield f"{own.lines[key]}: {key}: unknown key of lm-eval{nearest(key, keys)}"
        elif key == "unsafe_code" and own.values[key]:
            yield f"{own.lines[key]}: unsafe_code: answers would run as code; that is not done here"
    for key, value in own.values.items():
        for call in dict.fromkeys(calls(value)):
            if key not in ("class", "custom_dataset") and call not in allowed(section):
                yield f"{own.lines[key]}: {key}: runs code, {call}: name it in evaluate.task_functions, as FILE.py:NAME"
    yield from _group_mistakes(own, section) if own.members is not None else _task_mistakes(own)


def _group_mistakes(own: Own, section: Evaluate) -> Iterator[str]:
    """Members that no file defines, or that a group defines itself."""
    known = [other for other in all_own(section) if other.names[0] != own.names[0]]
    listed, line = own.values.get("task"), own.lines.get("task", own.lines["group"])
    if not isinstance(listed, list) or not listed:
        yield f"{line}: task: a group needs a list of names"
        return
    for key in sorted(DATA_KEYS & own.values.keys()):
        yield f"{own.lines[key]}: {key}: is for the members' own files"
    for item, name in zip(listed, own.members or [], strict=True):
        if isinstance(item, dict) and (DATA_KEYS & item.keys() or isinstance(item.get("task"), list)):
            yield f"{line}: task: {name} is defined within the group; give it a file"
        elif not own_of(name, known) and all_read(section):
            yield f"{line}: task: no file of evaluate.task_files defines {name!r}"


def _task_mistakes(own: Own) -> Iterator[str]:
    """What lm-eval could not load: its kind, its prompts, its numbers, its data."""
    from lm_eval.api.instance import OutputType

    values, at = own.values, next(iter(own.lines.values()))
    kind, kinds = values.get("output_type", "generate_until"), get_args(OutputType)
    if kind not in kinds:
        yield f"{own.lines['output_type']}: output_type: found {kind!r}, allowed: {', '.join(kinds)}"
    for key in ("doc_to_text", "doc_to_target"):
        if values.get(key) is None and not (key == "doc_to_target" and values.get("process_results")):
            yield f"{at}: has no {key}"
    if not (values.get("test_split") or values.get("validation_split")):
        yield f"{at}: has no test_split and no validation_split, so that it asks nothing"
    yield from _template_mistakes(own)
    yield from _metric_mistakes(own)
    yield from _data_mistakes(own, at)


def _template_mistakes(own: Own) -> Iterator[str]:
    """Texts that are no Jinja templates."""
    import jinja2

    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "description"):
        if isinstance(text := own.values.get(key), str):
            try:
                jinja2.Environment().parse(text)
            except jinja2.TemplateSyntaxError as error:
                yield f"{own.lines[key]}: {key}: is no Jinja template: {error.message}"


def _metric_mistakes(own: Own) -> Iterator[str]:
    """Metrics and aggregations that lm-eval would look for on the hub, or nowhere."""
    import lm_eval.api.metrics
    from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY

    assert lm_eval.api.metrics, "its import fills the registries"
    listed, own_results = own.values.get("metric_list"), own.values.get("process_results")
    if listed is None:
        return
    if not isinstance(listed, list) or not all(isinstance(item, dict) and item.get("metric") for item in listed):
        yield f"{own.lines['metric_list']}: metric_list: it should be a list of `metric: NAME` sections"
        return
    metrics, aggregations, at = {*METRIC_REGISTRY.keys()}, {*AGGREGATION_REGISTRY.keys()}, own.lines["metric_list"]
    for item in listed:
        name, aggregation = item["metric"], item.get("aggregation")
        known = name in metrics or isinstance(name, Called)
        if item.get("hf_evaluate") or not (known or own_results):
            names = ", ".join(sorted(metrics))
            yield f"{at}: metric_list: {name} would come from the hub; lm-eval itself has {names}"
        elif aggregation is None and name not in metrics:
            yield f"{at}: metric_list: {name} has no aggregation"
        elif aggregation and not isinstance(aggregation, Called) and aggregation not in aggregations:
            names = ", ".join(sorted(aggregations))
            yield f"{at}: metric_list: found aggregation {aggregation!r}, allowed: {names}"


def _data_mistakes(own: Own, at: str) -> Iterator[str]:
    """Data that cannot be read without a network, and splits that they do not have."""
    path, kwargs = own.values.get("dataset_path"), own.values.get("dataset_kwargs") or {}
    line = own.lines.get("dataset_kwargs", own.lines.get("dataset_path", at))
    if not isinstance(path, str) or not isinstance(kwargs, dict):
        yield f"{line}: needs a dataset_path, such as json, and its dataset_kwargs"
        return
    files = kwargs.get("data_files")
    if "://" in f"{path} {files} {kwargs.get('data_dir')}":
        yield f"{line}: its data are at an address, which no revision pins; save them here"
    elif path in LOADERS and not (files or kwargs.get("data_dir")):
        yield f"{line}: dataset_path: {path} needs dataset_kwargs: {{data_files: {{SPLIT: FILE}}}}"
    elif isfile(path):
        yield f"{line}: dataset_path: {path} is a file: give json or csv, and it in dataset_kwargs.data_files"
    elif path in LOADERS and files:
        splits = list(files) if isinstance(files, dict) else ["train"]
        for key in SPLITS:
            name = own.values.get(key)
            if isinstance(name, str) and name not in splits:
                yield f"{own.lines[key]}: {key}: dataset_kwargs.data_files has no {name!r}: {', '.join(splits)}"

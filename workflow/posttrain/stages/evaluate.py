"""Benchmark a policy with lm-eval.

python -m posttrain evaluate --config results/NAME/evaluate/config.yaml --data results/NAME/prepare/manifest.json \
    --policy results/NAME/sft/manifest.json --base results/NAME/base/manifest.json \
    --output results/NAME/evaluate/sft/manifest.json
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from posttrain.config.sections import Evaluate, Generation, Task
from posttrain.ground.errors import UserError
from posttrain.ground.files import write_json, write_jsonl
from posttrain.ground.progress import say


def evaluate(
    section: Evaluate,
    data: Path,
    policy: Path,
    work: Path,
    checkpoints: Path,
    base: Path | None = None,
    fetched: Sequence[Path] = (),
) -> dict:
    """Write lm-eval's own result (`lm_eval.json`, `data/samples`) into `work` and return the table's rows.

    fetched: manifests of the lm-eval tasks with data on the hub.
    """
    from posttrain.models.policy import load_policy, quantize_warnings

    manager, names = load_tasks(section, data, list(fetched), work / ".packs")
    foreign = fetched or section.task_files
    leaks = contamination_warnings(manager, names, data, work) if foreign else []
    model, tokenizer = load_policy(policy, base, section.merge, section.four_bits)
    shown = [name if isinstance(name, str) else getattr(name, "name", None) or name.task_name for name in names]
    say(f"{len(names)} tasks or groups: {', '.join(shown)}")
    warnings = leaks + form_warnings(section, tokenizer, policy) + quantize_warnings(section, policy)
    result, template = measure(section, model, tokenizer, manager, names, policy)
    for task, rows in result.pop("samples").items():
        write_jsonl(work / "data" / "samples" / f"{task}.jsonl", [as_json(row) for row in rows])
    write_json(work / "lm_eval.json", as_json(result))
    rows = table_rows(result)
    for row in rows:
        say(f"{row['task']}  {row['metric']} {row['value']:.4f}")
    metrics: dict = {"policy": policy.parent.name, "rows": rows, "limit": section.limit, "chat_template": template}
    if generation := generation_of(section, result.get("group_subtasks", {})):
        metrics["generation"] = generation
    return metrics | ({"warnings": warnings} if warnings else {})


def contamination_warnings(manager, names: list, data: Path, work: Path) -> list[str]:
    """Warnings, which are printed, of tasks of lm-eval with questions that training rows hold too; `data/overlap.jsonl`
    lists these questions, each with the training row's place."""
    from posttrain.evaluation.contamination import contaminated

    warnings, listed = [], []
    for task, (count, findings) in contaminated(manager, names, data).items():
        say(f"{task}: {len(findings):,} of {count:,} questions are in the training rows too")
        listed += [finding._asdict() for finding in findings]
        if findings:
            what = f"{len(findings):,} of {count:,} questions of {task} are in the training rows too"
            warnings.append(f"{what}, the first {findings[0]}")
            say(f"warning: {warnings[-1]}")
    if listed:
        write_jsonl(work / "data" / "overlap.jsonl", listed)
    return warnings


def form_warnings(section: Evaluate, tokenizer, policy: Path) -> list[str]:
    """Warnings, which are printed, of questions in another form than that of the policy's training rows."""
    from posttrain.models.policy import read_contract

    form, asked = read_contract(policy).get("form"), section.chat_template
    warnings = []
    if form == "plain" and asked:
        warnings.append("questions are put through the chat template, while the training rows are plain text")
    if form is None and asked is False and tokenizer.chat_template and policy.parent.name not in ("base", "longctx"):
        warnings.append("questions are plain text, while the training rows went through the chat template")
    for warning in warnings:
        say(f"warning: evaluate.chat_template: {warning}")
    return warnings


def measure(
    section: Evaluate, model, tokenizer, manager, names: list, policy: Path, picked: dict[str, list[int]] | None = None
) -> tuple[dict, str | None]:
    """lm-eval's result, and the sha256 of the chat template applied to questions; None for no template.

    picked: task -> the numbers of the questions to ask, ascending; in place of the section's limit.
    Raises UserError, before the first question, where it is not the template that the policy was trained with.
    """
    import lm_eval

    from posttrain.evaluation.harness import Harness
    from posttrain.models import positions
    from posttrain.models.policy import read_contract
    from posttrain.training import parallel

    contract = read_contract(policy)
    longest = positions.make_room(model, section.max_length or contract["positions"]["context"])
    # PEFT puts virtual tokens before the padding of a batch, farther from the prompt than in training. And lm-eval
    # passes no mask of the padding, by which to know each row's length.
    far = contract["method"] == "prompt" or (contract["method"] == "prefix" and not positions.skip_padding(model))
    alone = far or positions.depend_on_length(contract["positions"], longest)
    batch_size = 1 if alone else parallel.requests_at_once(section)
    if not alone:
        refuse_any_batch(section, manager, names, batch_size)
    harness = Harness(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest)
    templated = section.chat_template
    if templated is None:  # the form of training
        templated = tokenizer.chat_template is not None and contract.get("form") != "plain"
    template = digest(harness.chat_template(templated)) if templated else None
    refuse_other_template(template, policy)
    result = lm_eval.simple_evaluate(
        model=harness,
        tasks=names,
        task_manager=manager,
        limit=None if picked else section.limit,
        samples=picked,
        apply_chat_template=templated,
        bootstrap_iters=1000,
        random_seed=section.seed,
        numpy_random_seed=section.seed,
        torch_random_seed=section.seed,
        fewshot_random_seed=section.seed,
        log_samples=True,
    )
    return result, template


def refuse_any_batch(section: Evaluate, manager, names: list, batch_size: int) -> None:
    """Raise UserError where a task samples and the number of requests at once follows from the memory."""
    objects = [name for name in names if not isinstance(name, str)]
    for name, task in manager.load(objects)["tasks"].items() if objects else ():
        if (task.config.generation_kwargs or {}).get("do_sample") and section.batch_size != batch_size:
            fits = f"set evaluate.batch_size to a number that fits, such as {batch_size}"
            raise UserError(f"evaluate: the sampled answers to {name} depend on the requests at once: {fits}")


def digest(template: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(template.encode()).hexdigest()


def refuse_other_template(used: str | None, policy: Path) -> None:
    """Raise UserError where the chat template used differs from the one that the policy was trained with."""
    from posttrain.models.policy import read_contract

    trained = read_contract(policy)["chat_template"]
    if used is not None and used != trained:
        raise UserError(f"evaluate: the chat template of questions is {used}, {policy} was trained with {trained}")


def load_tasks(section: Evaluate, data: Path, fetched: list[Path], packs: Path):
    """lm-eval's task manager with the prepared, the fetched and the user's own tasks, and the tasks to run.

    Raises UserError for a task that was neither prepared nor fetched, and for one of the user's own that lm-eval cannot
    load.
    """
    from lm_eval.tasks import TaskManager

    from posttrain.evaluation import texts
    from posttrain.evaluation.benchmarks import own_pack, task_pack

    prepared = data.parent / "data" / "tasks"
    folders = [str(prepared)] + [str(task_pack(manifest, packs / str(n))) for n, manifest in enumerate(fetched)]
    folders += [str(own_pack(section, fetched, packs / "own"))] if section.task_files else []
    folders = [folder for folder in folders if Path(folder).is_dir()]
    manager = TaskManager(include_path=folders, include_defaults=False)
    names = json.loads((prepared / "default.json").read_text()) if prepared.is_dir() else []
    wanted = section.tasks or [Task(task=name) for name in names]
    if not wanted:
        raise UserError("evaluate.tasks: prepare made no task from this data; name tasks of lm-eval")
    problems = [
        f"evaluate.tasks: {task.task!r} was neither prepared (prepared: {', '.join(names) or 'none'}) nor fetched; "
        "for a task of lm-eval give `task:` and `revision:`, the commit of its data set"
        for task in wanted
        if task.task not in manager.all_tasks
    ]
    if problems:
        raise UserError(*problems)
    if any(task.metrics for task in wanted):
        measured = texts.pack(manager.task_index, wanted, packs / "texts")
        manager = TaskManager(include_path=[*folders, str(measured)], include_defaults=False)
    return manager, [chosen for task in wanted for chosen in as_asked(manager, task, prepared)]


def as_asked(manager, task: Task, prepared: Path) -> list:
    """A task, group or tag for lm-eval: the name of a prepared one that is asked as it is, else the loaded task, group
    or tasks, with the number of examples, the settings of generation and the metrics.

    Raises UserError where lm-eval cannot load it, for settings of generation of a task that generates nothing, and as
    `texts.measure` does.
    """
    from posttrain.evaluation import texts

    name, shots, generation = task.task, task.shots, task.generation
    if shots is None and generation is None and task.metrics is None and (prepared / f"{name}.yaml").is_file():
        return [name]
    try:
        loaded = manager.load([name])
    except Exception as error:  # of lm-eval, of datasets, or of a function of the user's own
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UserError(f"evaluate.tasks: lm-eval cannot load {name!r}: {reason}") from None
    generating = [one for one in loaded["tasks"].values() if one.OUTPUT_TYPE == "generate_until"]
    if generation and not generating:
        raise UserError(f"evaluate.tasks: {name}: generation has no effect: its answers are not generated")
    for one in loaded["tasks"].values() if shots is not None else ():
        one.set_config(key="num_fewshot", value=shots)
    if generation:
        for one in generating:
            one.set_config(key="generation_kwargs", value=kwargs_of(generation, one.config.generation_kwargs))
    for one in generating:
        texts.measure(name, one, list(task.metrics or []))
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def kwargs_of(generation: Generation, own: dict) -> dict:
    """lm-eval's settings of generation: those given, over a task's own. Sampling is from all tokens, at temperature 1,
    unless one of the two says otherwise: transformers' default would be the 50 likeliest tokens."""
    kwargs = own | generation.model_dump(exclude_none=True)
    if kwargs.get("do_sample"):
        kwargs = {"top_k": 0, "top_p": 1.0} | kwargs | {"temperature": kwargs.get("temperature") or 1.0}
    return kwargs


def generation_of(section: Evaluate, members: dict[str, list[str]]) -> dict[str, dict]:
    """Task or group, and each of a group's members -> the settings of generation that the config gives it."""
    return {
        name: task.generation.model_dump(exclude_none=True)
        for task in section.tasks or []
        if task.generation
        for name in [task.task, *members.get(task.task, [])]
    }


def table_rows(result: dict) -> list[dict]:
    """lm-eval's results as rows: task, metric, value, stderr, n; of groups and of their members.

    lm-eval's keys are `METRIC,FILTER`; a row names the filter only where a metric has several.
    """
    rows = []
    for task, values in result["results"].items():
        filters: dict[str, list[str]] = {}
        for key in values:
            metric, _, name = key.partition(",")
            if name and not metric.endswith("_stderr"):
                filters.setdefault(metric, []).append(name)
        for metric, names in filters.items():
            for name in names:
                label = metric if len(names) == 1 else f"{metric},{name}"
                rows.append(
                    {
                        "task": task,
                        "metric": label,
                        "value": values[f"{metric},{name}"],
                        "stderr": finite(values.get(f"{metric}_stderr,{name}")),
                        "n": questions(result, task),
                        "higher_is_better": result.get("higher_is_better", {}).get(task, {}).get(metric),
                    }
                )
    return rows


def finite(value) -> float | None:
    """A finite number, or None for lm-eval's "N/A"."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def questions(result: dict, task: str) -> int | None:
    """Number of questions asked: of a task, or of all tasks of a group."""
    if task in result["n-samples"]:
        return result["n-samples"][task]["effective"]
    members = result.get("group_subtasks", {}).get(task, [])
    return sum(questions(result, member) or 0 for member in members) or None


def as_json(value):
    """A part of lm-eval's result as plain JSON values; arrays and functions become text."""
    return json.loads(json.dumps(value, default=str))

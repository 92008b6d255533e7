"""What the types alone cannot say: contradictions between keys, and defaults that follow from other sections."""

import re
from collections.abc import Iterator
from operator import itemgetter

from posttrain.config.experiment import Experiment
from posttrain.config.sections import (
    SOURCES,
    TRAINED,
    WHOLE_BATCH,
    Base,
    Optimisation,
    Prepare,
    Section,
    Source,
    Tokenizer,
    conditional,
    subsections,
)
from posttrain.config.sources import sides
from posttrain.data.formats import FORMATS
from posttrain.ground.code import fingerprint, function_file
from posttrain.ground.errors import UserError
from posttrain.world import tasks as world_tasks

GOLD_OF_WORLD = "posttrain.world.gold:gold_reward"
OF_SOURCES = {"test_fraction", "group_key", "allow_empty_user", "max_line_mb"}  # keys of `prepare`


def inapplicable(section: Section) -> Iterator[tuple[str, str]]:
    """Keys of a section that have no effect under its other settings, each with the reason."""
    for key, condition in conditional(type(section)).items():
        for other, allowed in condition.items():
            value = getattr(section, other)
            if value not in allowed:
                yield key, f"has no effect with {other}: {value} (only with {' or '.join(allowed)})"


def contradictions(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Dotted keys that contradict one another, each with what is wrong and what would be right."""
    yield from _without_effect("", experiment)
    yield from _prepare(experiment.prepare)
    yield from _base(experiment.base)
    yield from _tokenizer(experiment)
    if experiment.sft:
        yield from _sft(experiment)
    yield from _aligned(experiment)
    if experiment.longctx:
        yield from _longctx(experiment)
    if experiment.lengths and "test" not in sides(experiment.prepare, "long"):
        yield "lengths", "has no held-out long documents: set prepare.world.long or prepare.long"
    for number, task in enumerate(experiment.evaluate.tasks or []):
        if task.revision is not None or task.allow_floating:
            yield from _pinned(f"evaluate.tasks[{number}]", task)
    yield from _tasks(experiment)
    if experiment.evaluate.tasks == []:
        yield "evaluate.tasks", "is empty: leave it out for the built-in tasks, or name one"


def _without_effect(where: str, section: Section) -> Iterator[tuple[str, str]]:
    for key, reason in inapplicable(section):
        if key in section.model_fields_set:
            yield f"{where}{key}", reason
    for key in subsections(type(section)):
        if isinstance(value := getattr(section, key), Section):
            yield from _without_effect(f"{where}{key}.", value)


def unused(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Sections that no stage of the experiment reads. Inherited ones may be: a child may do without their stage."""
    if experiment.dpo is None:
        yield "reference", "has no effect without dpo"
    if not (experiment.reward or experiment.ppo or experiment.dpo):
        yield "compare", "has no effect without reward, ppo or dpo"


def _one_of(where: str, section: Section, *keys: str) -> Iterator[tuple[str, str]]:
    found = [key for key in keys if getattr(section, key) is not None]
    if len(found) != 1:
        mend = "; set an inherited one to null" if found else ""
        yield where, f"exactly one of {', '.join(keys)} must be set, found {' and '.join(found) or 'none'}{mend}"


def _pinned(where: str, section: Section) -> Iterator[tuple[str, str]]:
    """`section` names something on the hub with `revision` and `allow_floating`."""
    revision = section.revision
    commit = revision is not None and len(revision) == 40 and set(revision) <= set("0123456789abcdef")
    if not commit and not section.allow_floating:
        found = "is missing" if revision is None else f"{revision!r} can move"
        yield f"{where}.revision", f"{found}; give the full 40-digit commit, or set allow_floating: true"


def _prepare(prepare: Prepare) -> Iterator[tuple[str, str]]:
    for task in SOURCES:
        for number, source in enumerate(getattr(prepare, task)):
            yield from _source(f"prepare.{task}[{number}]", task, source)
    if not (prepare.world or any(getattr(prepare, task) for task in TRAINED)):
        yield "prepare", "has no data: set world, or give sources under text, sft, preference or kto"
    if not any(getattr(prepare, task) for task in SOURCES):
        for key in sorted(OF_SOURCES & prepare.model_fields_set):
            yield f"prepare.{key}", "has no effect on the built-in world: it is about sources, and there are none"
    if prepare.tokenizer:
        yield from _one_of("prepare.tokenizer", prepare.tokenizer, "vocab_size", "path", "hub")
        if prepare.tokenizer.hub:
            yield from _pinned("prepare.tokenizer.hub", prepare.tokenizer.hub)
        if prepare.tokenizer.vocab_size and "train" not in sides(prepare, "text"):
            yield "prepare.tokenizer.vocab_size", "needs text to train on: set prepare.world or prepare.text"


def _source(where: str, task: str, source: Source) -> Iterator[tuple[str, str]]:
    yield from _one_of(where, source, "path", "dataset")
    if source.dataset:
        yield from _pinned(where, source)
    useless = ["revision", "subset", "rows", "allow_floating"] if source.path and not source.dataset else []
    useless += {"choices": ["use", "separator"], "text": ["separator"], "long": ["separator"]}.get(task, [])
    for key in useless:
        if key in source.model_fields_set:
            yield f"{where}.{key}", "has no effect here"
    allowed = ("auto", *FORMATS.get(task, ()))
    if source.format not in allowed:
        yield f"{where}.format", f"{source.format} does not hold rows for {task}; allowed: {', '.join(allowed)}"


def _base(base: Base) -> Iterator[tuple[str, str]]:
    yield from _one_of("base", base, "path", "hub", "scratch")
    if base.hub:
        yield from _pinned("base.hub", base.hub)
    if base.scratch:
        width, uneven = divmod(base.scratch.hidden_size, base.scratch.heads)
        if uneven or width % 2:
            found = f"{base.scratch.heads} does not divide hidden_size {base.scratch.hidden_size} into even parts"
            yield "base.scratch.heads", found
        yield from _training("base.scratch", base.scratch)


def _tokenizer(experiment: Experiment) -> Iterator[tuple[str, str]]:
    prepare, base, tokenizer = experiment.prepare, experiment.base, experiment.prepare.tokenizer
    if base.scratch and "train" not in sides(prepare, "text"):
        yield "base.scratch", "has no text to train on: set prepare.world, or prepare.text not for `use: test` alone"
    elif base.scratch and "test" not in sides(prepare, "text"):
        split = any(source.use == "split" for source in prepare.text)
        where, found = ("prepare.test_fraction", "0") if split else ("prepare.text", "`use: train` alone")
        yield where, f"{found} leaves no held-out text, on which base.scratch must show that it learned"
    if tokenizer and tokenizer.vocab_size and not base.scratch:
        yield "prepare.tokenizer.vocab_size", "a given base needs its own tokenizer; leave this out, or null"
    if (
        tokenizer
        and (base.path or base.hub)
        and (tokenizer.path, tokenizer.hub) not in ((base.path, base.hub), (None, None))
    ):
        yield "prepare.tokenizer", "is not the base's; leave it out, or null"
    if prepare.chat_template == "tokenizer" and base.scratch and not (tokenizer and (tokenizer.path or tokenizer.hub)):
        yield "prepare.chat_template", "a tokenizer trained on the text carries none; use default or a .jinja file"


def _tasks(experiment: Experiment) -> Iterator[tuple[str, str]]:
    prepare = experiment.prepare
    sources = {"heldout_text": prepare.world or prepare.text, "heldout_sft": prepare.sft and not prepare.world}
    sources |= {"choices": prepare.choices}
    prepared = world_tasks.names(prepare.world) if prepare.world else []
    prepared += [name for name, source in sources.items() if source]
    tasks = experiment.evaluate.tasks or []
    for number, task in enumerate(tasks):
        if task.task in [earlier.task for earlier in tasks[:number]]:
            yield f"evaluate.tasks[{number}].task", f"{task.task!r} is named twice"
        if task.task not in prepared and task.revision is None and not task.allow_floating:
            yield (
                f"evaluate.tasks[{number}].task",
                f"{task.task!r} is not made by prepare here ({', '.join(prepared) or 'none is'}); "
                "for a task of lm-eval give `revision`, the commit of its data set",
            )


def _sft(experiment: Experiment) -> Iterator[tuple[str, str]]:
    sft, prepare, base = experiment.sft, experiment.prepare, experiment.base
    longest = prepare.max_tokens or longest_row(base)
    yield from _training("sft", sft)
    if "train" not in sides(prepare, "sft"):
        yield "sft", "has no rows to train on: set prepare.world, or prepare.sft not for `use: test` alone"
    if sft.max_length is not None and sft.max_length < longest:
        yield "sft.max_length", f"{sft.max_length} would cut rows that prepare.max_tokens ({longest}) lets through"
    if base.scratch and longest > base.scratch.context:
        yield "prepare.max_tokens", f"{longest} is longer than base.scratch.context ({base.scratch.context})"
    if sft.packing and base.scratch and base.scratch.positions == "alibi":
        yield "sft.packing", "cannot be combined with base.scratch.positions: alibi, which ignores where a row begins"
    if sft.method in ("prefix", "prompt") and base.scratch and sft.virtual_tokens >= base.scratch.context:
        yield "sft.virtual_tokens", f"{sft.virtual_tokens} leave no room in a context of {base.scratch.context}"
    if sft.method == "prefix" and sft.gradient_checkpointing:
        yield "sft.gradient_checkpointing", "cannot be combined with method: prefix (PEFT crashes)"


def _training(where: str, training: Optimisation) -> Iterator[tuple[str, str]]:
    micro = training.micro_batch_size
    if micro and training.batch_size % micro:
        yield f"{where}.micro_batch_size", f"{micro} does not divide batch_size {training.batch_size}"
    if (training.warmup_steps or 0) > training.steps:
        yield f"{where}.warmup_steps", f"{training.warmup_steps} is more than steps ({training.steps})"
    if training.schedule == "constant" and training.warmup_steps:
        yield f"{where}.warmup_steps", "has no effect with schedule: constant (use constant_with_warmup)"


def _aligned(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Contradictions of `reward`, `ppo` and `dpo`, which begin with the SFT policy."""
    sft, prepare, ppo, dpo = experiment.sft, experiment.prepare, experiment.ppo, experiment.dpo
    for where in ("reward", "ppo", "dpo"):
        section = getattr(experiment, where)
        if section is None:
            continue
        yield from _training(where, section)
        if sft is None:
            yield where, "begins with the SFT policy: set sft"
        elif sft.method in ("prefix", "prompt"):
            yield where, f"cannot follow sft.method: {sft.method}, which cannot be merged (use lora, qlora or full)"
        elif sft.method != "full" and (section.rank or sft.rank) < sft.rank:
            yield f"{where}.rank", f"{section.rank} is under sft.rank ({sft.rank}), whose adapter it begins as"
        longest = getattr(section, "max_length", None)
        if longest and longest < (prepare.max_tokens or longest_row(experiment.base)):
            yield f"{where}.max_length", f"{longest} would cut pairs that prepare.max_tokens lets through"
        pairs = where != "ppo" or section.prompts == "preference"
        if pairs and not (prepare.world or prepare.preference):
            yield where, "has no preference pairs: set prepare.world or prepare.preference"
    if ppo:
        yield from _ppo(experiment)
    written = {"ppo": ("reward_code", "gold_code"), "compare": ("reward_function", "reward_code", "gold_code")}
    for where, keys in written.items():
        section = getattr(experiment, where)
        for key in keys:
            if section and key in section.model_fields_set:
                yield f"{where}.{key}", "is written by the workflow; leave it out"
        if section and section.gold_function:
            yield from _function(f"{where}.gold_function", section.gold_function)
    if dpo and dpo.loss_weights and len(dpo.loss_weights) != len(dpo.loss):
        yield "dpo.loss_weights", f"has {len(dpo.loss_weights)} weights for {len(dpo.loss)} losses"
    smoothed = {"robust", "exo_pair", "aot", "aot_unpaired"}
    if dpo and dpo.label_smoothing and not smoothed & set(dpo.loss):
        yield "dpo.label_smoothing", f"has no effect with loss: {dpo.loss} (only with {', '.join(sorted(smoothed))})"
    whole = WHOLE_BATCH & set(dpo.loss if dpo else ())
    if whole and dpo.micro_batch_size and dpo.micro_batch_size < dpo.batch_size:
        found = f"would change what is learned: TRL takes the loss {' and '.join(sorted(whole))} over a micro-batch"
        yield "dpo.micro_batch_size", f"{found}; leave it out, or leave out that loss"
    if dpo and "exo_pair" in dpo.loss and not dpo.label_smoothing:
        yield "dpo.label_smoothing", "must be over 0 with loss exo_pair (its paper: 1e-3)"


def _ppo(experiment: Experiment) -> Iterator[tuple[str, str]]:
    ppo = experiment.ppo
    named = ppo.reward_function
    if named is None and experiment.reward is None:
        yield "ppo", "has nothing to be rewarded by: set reward, or ppo.reward_function"
    if named is not None:
        yield from _function("ppo.reward_function", named)
    if ppo.kl_target is None and "kl_horizon" in ppo.model_fields_set:
        yield "ppo.kl_horizon", "has no effect without ppo.kl_target"
    if ppo.kl_target is not None and not ppo.kl_coefficient:
        yield "ppo.kl_coefficient", "0 can never adapt to ppo.kl_target; give beta a first value over 0"
    if ppo.kl_target is not None and ppo.kl_horizon < ppo.batch_size:
        yield "ppo.kl_horizon", f"{ppo.kl_horizon} is under batch_size ({ppo.batch_size}); beta could turn negative"
    if ppo.snapshot_steps >= ppo.steps and "snapshot_steps" in ppo.model_fields_set:
        yield "ppo.snapshot_steps", f"{ppo.snapshot_steps} makes no snapshot in {ppo.steps} iterations"
    if ppo.minibatches > ppo.batch_size:
        yield "ppo.minibatches", f"{ppo.minibatches} is more than the {ppo.batch_size} answers of an iteration"
    if ppo.value_warmup >= ppo.steps:
        yield "ppo.value_warmup", f"{ppo.value_warmup} leaves none of the {ppo.steps} iterations to the policy"


def _longctx(experiment: Experiment) -> Iterator[tuple[str, str]]:
    longctx, prepare, base = experiment.longctx, experiment.prepare, experiment.base
    policy = longctx.policy
    yield from _training("longctx", longctx)
    if getattr(experiment, policy) is None:
        yield "longctx.policy", f"{policy!r} is not made here: set {policy}, or name another"
    elif policy == "sft" and experiment.sft.method in ("prefix", "prompt"):
        yield "longctx.policy", f"cannot follow sft.method: {experiment.sft.method}, which cannot be merged"
    if {"train", "test"} - sides(prepare, "long"):
        yield "longctx", "has no long documents, trained on and held out: set prepare.world.long or prepare.long"
    if base.scratch and base.scratch.positions == "alibi":
        yield "longctx.method", "cannot be combined with base.scratch.positions: alibi, which has no RoPE to rescale"
    long = prepare.world and prepare.world.long
    if long and base.scratch and (long.context, long.factor) != (base.scratch.context, longctx.factor):
        found = f"{long.context} x {long.factor}, base.scratch.context x longctx.factor "
        found += f"{base.scratch.context} x {longctx.factor:g}"
        yield "prepare.world.long", f"makes documents of {found}; they must be equal"


def _function(where: str, named: str) -> Iterator[tuple[str, str]]:
    """`named` must be `file.py:function` or `package.module:function` of a function that is there."""
    place, _, function = named.rpartition(":")
    if not place or not function.isidentifier():
        yield where, f"found {named!r}, allowed: file.py:function or package.module:function"
        return
    file = function_file(named)
    if not file.is_file():
        yield where, f"there is no module {place!r}"
    elif not re.search(rf"^def {re.escape(function)}\(", file.read_text(encoding="utf-8", errors="replace"), re.M):
        yield where, f"{file} defines no function {function!r}"
    else:
        try:
            fingerprint(file)
        except UserError as error:
            yield where, str(error)


def _function_code(named: str) -> str | None:
    """Fingerprint of the file of a function that the config names; None where `_function` finds a mistake."""
    return None if list(_function("", named)) else fingerprint(function_file(named))


def longest_row(base: Base) -> int:
    """Default of `prepare.max_tokens`, in tokens."""
    return base.scratch.context if base.scratch else 512


def resolve(experiment: Experiment) -> Experiment:
    """Fill in the defaults that follow from other sections: seeds, tokenizer, longest row, adapters, KL's horizon."""
    base, prepare, seeded = experiment.base, experiment.prepare, []
    max_tokens = prepare.max_tokens or longest_row(base)
    tokenizer = prepare.tokenizer or Tokenizer(path=base.path, hub=base.hub, vocab_size=1024 if base.scratch else None)
    prepare = prepare.model_copy(update={"max_tokens": max_tokens, "tokenizer": tokenizer})
    if base.scratch and base.scratch.seed is None:
        base = base.model_copy(update={"scratch": base.scratch.model_copy(update={"seed": experiment.seed})})
        seeded.append("base")
    filled = {"base": base, "prepare": prepare}
    for stage in ("sft", "reward", "ppo", "dpo", "longctx"):
        if section := getattr(experiment, stage):
            seeded += [stage] if section.seed is None else []
            update = {"seed": experiment.seed if section.seed is None else section.seed}
            if "max_length" in type(section).model_fields:
                update["max_length"] = section.max_length or max_tokens
            filled[stage] = section.model_copy(update=update)
    filled["compare"] = experiment.compare
    if filled.get("ppo") and (named := filled["ppo"].reward_function):
        update = {"reward_function": named, "reward_code": _function_code(named)}
        filled |= {stage: filled[stage].model_copy(update=update) for stage in ("ppo", "compare")}
    for stage in ("ppo", "compare"):
        named = filled.get(stage) and (filled[stage].gold_function or (GOLD_OF_WORLD if prepare.world else None))
        if named:
            update = {"gold_function": named, "gold_code": _function_code(named)}
            filled[stage] = filled[stage].model_copy(update=update)
    resolved = experiment.model_copy(update=filled)
    resolved._seeded = frozenset(seeded)
    return resolved


def incomplete(stage: str, section: Section) -> Iterator[tuple[str, str]]:
    """What a section written by hand lacks, since only the workflow resolves it."""
    if stage == "base":
        yield from _one_of("base", section, "path", "hub", "scratch")
    trained = dict.fromkeys(("sft", "reward", "dpo"), ("seed", "max_length"))
    filled = {"prepare": ("tokenizer", "max_tokens"), **dict.fromkeys(("base", "ppo", "longctx"), ("seed",)), **trained}
    part = section.scratch if stage == "base" else section
    for key in filled.get(stage, ()) if part else ():
        if getattr(part, key) is None:
            yield f"base.scratch.{key}" if stage == "base" else f"{stage}.{key}", "missing; the workflow writes it"


def slice_of(section: Section) -> dict:
    """A section as plain values, without the keys that have no effect and without those that are unset."""
    useless = {key for key, _ in inapplicable(section)}
    values = {}
    for key, value in sorted(section, key=itemgetter(0)):
        if key in useless:
            continue
        if isinstance(value, list):
            values[key] = [slice_of(item) if isinstance(item, Section) else item for item in value]
        elif value is not None:
            values[key] = slice_of(value) if isinstance(value, Section) else value
    return values

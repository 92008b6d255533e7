"""Rules across keys for the stages that train, chosen by the class of a stage's section, not by its name."""

from collections.abc import Callable
from functools import partial
from urllib.parse import urlsplit

from posttrain.config.mistakes import nearest
from posttrain.config.sections import (
    WHOLE_BATCH,
    Adapter,
    Compare,
    Dpo,
    Grpo,
    Lengths,
    Longctx,
    Optimisation,
    Passes,
    Ppo,
    Reference,
    Referenced,
    Sampled,
    Scratch,
    Section,
    Sft,
    method_of,
    trains_on_whole,
)
from posttrain.config.sources import OF_WORLD, sides
from posttrain.config.stages import POLICIES, STAGES, Experiment
from posttrain.dag import functions
from posttrain.dag.reward_checks import grpo_mistakes, reward_mistakes, same_function, sampled_mistakes
from posttrain.dag.rules import Mistakes, Rule
from posttrain.dag.targets import adapter_mistakes, target_mistakes
from posttrain.training.schedule import warmup


def stage_rules() -> list[Rule]:
    """The rules of each stage's section, by its class. A rule ends at a key whose value is wrong (`rules.broken`), so
    that those of different keys are functions of their own."""
    kinds: list[tuple[type[Section], Callable]] = [
        (Section, _functions), (Optimisation, training_mistakes), (Sft, _sft_rows), (Sft, _sft_lengths),
        (Sft, _sft_method), (Sft, _sft_adapter), (Adapter, _adapter_start), (Referenced, _reference_start),
        (Reference, _written), (Compare, _written), (Compare, _judge),
        (Adapter, _adapter_length), (Adapter, _adapter_rows),
        (Sampled, sampled_mistakes), (Sampled, same_function), (Ppo, _value_start), (Ppo, _ppo),
        (Grpo, grpo_mistakes), (Grpo, reward_mistakes), (Dpo, _dpo), (Longctx, _longctx_policy),
        (Longctx, _longctx_documents), (Longctx, _longctx_positions), (Lengths, _lengths),
    ]  # fmt: skip
    return [
        partial(_of_stage, name, mistakes)
        for name, stage in STAGES.items()
        for kind, mistakes in kinds
        if issubclass(stage.section, kind)
    ]


def _of_stage(stage: str, mistakes: Callable, experiment: Experiment) -> Mistakes:
    """The mistakes in a stage's section; none where it is unset."""
    if section := getattr(experiment, stage):
        yield from mistakes(stage, section, experiment)


def _functions(where: str, section: Section, experiment: Experiment) -> Mistakes:
    yield from functions.mistakes(where, section)


def training_mistakes(where: str, training: Optimisation, experiment: Experiment | None = None) -> Mistakes:
    """Contradictions within the settings of a training loop."""
    micro = training.micro_batch_size
    if micro and training.batch_size % micro:
        yield f"{where}.micro_batch_size", f"{micro} does not divide batch_size {training.batch_size}"
    epochs = training.epochs if isinstance(training, Passes) else None
    if epochs is not None and getattr(training, "packing", False):
        yield f"{where}.epochs", "counts rows, of which packing makes fewer sequences: set steps"
    if epochs is None and (training.warmup_steps or 0) > training.steps:
        yield f"{where}.warmup_steps", f"{training.warmup_steps} is more than steps ({training.steps})"
    whole = isinstance(training, Scratch) or (isinstance(training, Longctx) and training.tuning == "full")
    if training.optimizer == "muon" and not whole:
        yield f"{where}.optimizer", "muon is only for base.scratch, and for longctx with tuning: full"
    for key in ("warmup_steps", "warmup_ratio", "warmup_start_ratio"):
        if training.schedule == "constant" and getattr(training, key):
            yield f"{where}.{key}", "has no effect with schedule: constant (use constant_with_warmup)"
    if epochs is None and training.schedule != "constant" and not warmup(training):
        if training.warmup_start_ratio:
            yield f"{where}.warmup_start_ratio", "has no effect without warm-up: set warmup_steps or warmup_ratio"
        if training.schedule == "inverse_sqrt":
            yield f"{where}.schedule", "inverse_sqrt needs warm-up: set warmup_steps or warmup_ratio"


def _sft_rows(where: str, sft: Sft, experiment: Experiment) -> Mistakes:
    if "train" not in sides(experiment.prepare, "sft"):
        yield where, "has no rows to train on: set prepare.world, or a prepare.sft without `use: test`"


def _sft_lengths(where: str, sft: Sft, experiment: Experiment) -> Mistakes:
    scratch, longest = experiment.base.scratch, experiment.longest_row
    if sft.max_length is not None and sft.max_length < longest:
        yield f"{where}.max_length", f"{sft.max_length} would cut rows that prepare.max_tokens ({longest}) lets through"
    if scratch and longest > scratch.context:
        yield "prepare.max_tokens", f"{longest} is longer than base.scratch.context ({scratch.context})"


def _sft_method(where: str, sft: Sft, experiment: Experiment) -> Mistakes:
    scratch = experiment.base.scratch
    if sft.packing and scratch and scratch.positions == "alibi":
        yield (
            f"{where}.packing",
            "cannot be combined with base.scratch.positions: alibi, which cannot separate packed rows",
        )
    if sft.packing and sft.group_by_length:
        yield f"{where}.group_by_length", "has no effect with packing, which leaves no padding"
    if sft.packing and sft.neftune_alpha:
        yield f"{where}.neftune_alpha", "cannot be combined with packing: noise would shrink by all rows of a sequence"
    if sft.group_by_length and sft.order:
        yield f"{where}.group_by_length", "cannot be combined with order: file, which keeps the rows in their order"
    if sft.method in ("prefix", "prompt") and scratch and sft.virtual_tokens >= scratch.context:
        yield f"{where}.virtual_tokens", f"{sft.virtual_tokens} leave no room in a context of {scratch.context}"
    if sft.method == "prefix" and sft.gradient_checkpointing:
        yield f"{where}.gradient_checkpointing", "cannot be combined with method: prefix (PEFT crashes)"
    if sft.method in ("lora", "qlora"):
        yield from target_mistakes(where, sft.target_modules, experiment)


def _sft_adapter(where: str, sft: Sft, experiment: Experiment) -> Mistakes:
    if sft.method in ("lora", "qlora"):
        yield from _twice(f"{where}.layers", sft.layers or [])
        yield from adapter_mistakes(where, sft, experiment)


def _adapter_start(where: str, section: Adapter, experiment: Experiment) -> Mistakes:
    """A stage whose adapter starts as the SFT policy."""
    sft = experiment.sft
    if sft is None:
        return
    if sft.method in ("prefix", "prompt"):
        yield where, f"cannot follow sft.method: {sft.method}, which cannot be merged (use lora, qlora or full)"
    elif section.method not in (None, sft.method) and sft.method != "full":
        problem = f"{section.method} cannot follow sft.method: {sft.method}, whose adapter is continued"
        yield f"{where}.method", f"{problem}; leave it out, or set sft.method: full"
    elif sft.method != "full" and (section.rank or sft.rank) < sft.rank:
        yield f"{where}.rank", f"{section.rank} is under sft.rank ({sft.rank}), the rank of the adapter it starts from"
    elif sft.method != "full":
        yield from target_mistakes(where, section.target_modules, experiment, earlier=sft.target_modules)
    elif section.method != "full":
        yield from target_mistakes(where, section.target_modules, experiment)


def _reference_start(where: str, section: Referenced, experiment: Experiment) -> Mistakes:
    """Stages that read one reference are trained on the same weights of the SFT policy."""
    earlier = [name for name, stage in STAGES.items() if issubclass(stage.section, Referenced)]
    for name in earlier[: earlier.index(where)]:
        other = getattr(experiment, name)
        if other and trains_on_whole(experiment.sft, other) != trains_on_whole(experiment.sft, section):
            problem = f"must be on the same weights as {name}.method, since both read one reference"
            yield f"{where}.method", f"{problem}: qlora (the default) trains on the SFT policy in NF4, others do not"


def _written(where: str, section: Reference | Compare, experiment: Experiment) -> Mistakes:
    for key in ("method", "checks", "reward_seconds"):
        if key in section.model_fields_set:
            yield f"{where}.{key}", "is written by the workflow; leave it out"


def _judge(where: str, compare: Compare, experiment: Experiment) -> Mistakes:
    judge = compare.judge
    if judge is None:
        return
    missing = [field for field in ("{prompt}", "{first}", "{second}") if field not in (judge.prompt or field)]
    if missing:
        yield f"{where}.judge.prompt", f"lacks {', '.join(missing)}"
    host = urlsplit(judge.url).hostname
    if judge.key_variable and judge.url.startswith("http:") and host not in ("localhost", "127.0.0.1", "::1"):
        yield f"{where}.judge.url", "would carry the key unencrypted: use https, or leave key_variable out"


def _value_start(where: str, ppo: Ppo, experiment: Experiment) -> Mistakes:
    reward = experiment.reward
    if ppo.value_from is None:
        return
    if reward is None or ppo.reward_function:
        yield f"{where}.value_from", "needs a reward model: set section reward, without ppo.reward_function"
    elif experiment.sft and method_of(experiment.sft, reward) != method_of(experiment.sft, ppo):
        yield f"{where}.value_from", "needs a reward model of the same kind: let reward.method be ppo.method"


def _adapter_length(where: str, section: Adapter, experiment: Experiment) -> Mistakes:
    longest = getattr(section, "max_length", None)
    if longest and longest < experiment.longest_row:
        yield f"{where}.max_length", f"{longest} would cut rows that prepare.max_tokens lets through"


def _adapter_rows(where: str, section: Adapter, experiment: Experiment) -> Mistakes:
    prepare = experiment.prepare
    if "train" not in sides(prepare, section.task):
        rows = "preference pairs" if section.task == "preference" else f"{section.task} rows"
        world = "prepare.world or " if section.task in OF_WORLD else ""
        given = "a source without `use: test` in " if getattr(prepare, section.task) else ""
        yield where, f"has no {rows} to train on: set {world}{given}prepare.{section.task}"


def _ppo(where: str, ppo: Ppo, experiment: Experiment) -> Mistakes:
    if ppo.kl_target is None and "kl_horizon" in ppo.model_fields_set:
        yield f"{where}.kl_horizon", f"has no effect without {where}.kl_target"
    if ppo.kl_target is not None and not ppo.kl_coefficient:
        yield f"{where}.kl_coefficient", f"0 cannot adapt to {where}.kl_target; give beta an initial value over 0"
    if ppo.kl_target is not None and ppo.kl_horizon < ppo.batch_size:
        problem = f"{ppo.kl_horizon} is under batch_size ({ppo.batch_size}); beta could turn negative"
        yield f"{where}.kl_horizon", problem
    if ppo.value_warmup >= ppo.steps:
        yield f"{where}.value_warmup", f"{ppo.value_warmup} leaves none of the {ppo.steps} iterations to the policy"


def _dpo(where: str, dpo: Dpo, experiment: Experiment) -> Mistakes:
    if dpo.loss_weights and len(dpo.loss_weights) != len(dpo.loss):
        yield f"{where}.loss_weights", f"has {len(dpo.loss_weights)} weights for {len(dpo.loss)} losses"
    if dpo.loss_weights and not any(dpo.loss_weights):
        yield f"{where}.loss_weights", "are all 0, so that nothing is learned"
    yield from _twice(f"{where}.loss", dpo.loss)
    smoothed = {"robust", "exo_pair", "aot", "aot_unpaired"}
    if dpo.label_smoothing and not smoothed & set(dpo.loss):
        only = f"only with {', '.join(sorted(smoothed))}"
        yield f"{where}.label_smoothing", f"has no effect with loss: {dpo.loss} ({only})"
    whole = WHOLE_BATCH & set(dpo.loss)
    if whole and dpo.micro_batch_size and dpo.micro_batch_size < dpo.batch_size:
        problem = f"would change what is learned: TRL computes {' and '.join(sorted(whole))} over a micro-batch"
        yield f"{where}.micro_batch_size", f"{problem}; leave it out, or leave out that loss"
    if "exo_pair" in dpo.loss and not dpo.label_smoothing:
        yield f"{where}.label_smoothing", "must be over 0 with loss exo_pair (its paper: 1e-3)"


def _longctx_policy(where: str, longctx: Longctx, experiment: Experiment) -> Mistakes:
    policy = longctx.policy
    earlier = [name for name in POLICIES if not issubclass(STAGES[name].section, Longctx)]
    if policy not in earlier:
        hint = nearest(policy, earlier)
        yield f"{where}.policy", f"found {policy!r}, it should be {', '.join(earlier[:-1])} or {earlier[-1]}{hint}"
    elif getattr(experiment, policy) is None:
        yield f"{where}.policy", f"this experiment has no {policy!r}: set {policy}, or name another policy"
    elif policy == "sft" and experiment.sft.method in ("prefix", "prompt"):
        yield f"{where}.policy", f"cannot follow sft.method: {experiment.sft.method}, which cannot be merged"
    if longctx.tuning in ("lora", "qlora"):
        yield from target_mistakes(where, longctx.target_modules, experiment)


def _longctx_documents(where: str, longctx: Longctx, experiment: Experiment) -> Mistakes:
    if {"train", "test"} - sides(experiment.prepare, "long"):
        yield where, "needs long documents to train on and held-out ones: set prepare.world.long or prepare.long"


def _longctx_positions(where: str, longctx: Longctx, experiment: Experiment) -> Mistakes:
    prepare, scratch = experiment.prepare, experiment.base.scratch
    if scratch and scratch.positions == "alibi" and longctx.method != "none":
        yield (
            f"{where}.method",
            "cannot be combined with base.scratch.positions: alibi, which has no RoPE to rescale (set method: none)",
        )
    long = prepare.world and prepare.world.long
    if long and scratch and (long.context, long.factor) != (scratch.context, longctx.factor):
        generated = f"{long.context} x {long.factor}"
        needed = f"{scratch.context} x {longctx.factor:g}"
        yield (
            "prepare.world.long",
            (f"makes documents of {generated}, base.scratch.context x longctx.factor is {needed}; they must be equal"),
        )


def _lengths(where: str, lengths: Lengths, experiment: Experiment) -> Mistakes:
    yield from _twice(f"{where}.tokens", lengths.tokens)
    if (lengths.stride_tokens or 0) >= min(lengths.tokens):
        problem = f"{lengths.stride_tokens} must be under the shortest window ({min(lengths.tokens)})"
        yield f"{where}.stride_tokens", f"{problem}: tokens would be skipped"
    if "test" not in sides(experiment.prepare, "long") and not lengths.passkey:
        yield where, "has no held-out long documents: set prepare.world.long or prepare.long, or lengths.passkey"


def _twice(where: str, values: list) -> Mistakes:
    """Values that a list has twice."""
    for value in dict.fromkeys(value for value in values if values.count(value) > 1):
        yield where, f"names {value} twice"

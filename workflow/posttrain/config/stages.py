"""The table of stages: each stage's inputs, output and section. Every other list of stages follows from it, and the
class of an experiment.

No module in a stage's code fingerprint may import this one: a new line here must make no artifact stale.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field, create_model

from posttrain.config import sections
from posttrain.config.claims import Claim
from posttrain.config.sections import Adapter, Base, Chain, Name, Optimisation, Section, has_hub_items

Kind = Literal["data", "policy", "reward", "judgement", "identities"]

# The inputs of stages by role. A role is an option of a stage's command; its value is the manifest of the artifact.
ROLES = {
    "data": "the prepared data",
    "base": "the frozen weights under an adapter",
    "sft": "the SFT policy",
    "reward": "the reward model, where there is one",
    "reference": "the reference log-probabilities",
    "policy": "the policy",
    "beside": "the SFT policy's judgement, for judging any other policy",
}


class Stage(NamedTuple):
    """One stage. Its module, function, section, rule, results folder, caption and test all have its name."""

    section: type[Section]
    makes: Kind
    help: str
    reads: tuple[str, ...] = ()
    """Roles (`ROLES`). A role is the name of the stage that makes the artifact, but for `data` (made by `prepare`),
    `policy` (the judged policy, or the one that the section's key `policy` names) and `beside` (the same judgement of
    the SFT policy)."""
    optional: tuple[str, ...] = ()
    """Roles that the command can do without; read where the experiment has their stage."""
    runs: Literal["always", "by default", "where read", "if set"] = "if set"
    """`always`: the section is required. `by default`: an unset section has its defaults. `where read`: only where
    another stage of the experiment reads it. `if set`: only where the section is set."""
    shards: bool = False
    """Whether its weights can be sharded over processes (FSDP)."""
    threads: int = 1
    any_batch: bool = False
    """Whether its result is the same however many rows are in memory at once; that of a stage that trains is."""
    any_threads: bool = False
    """Whether its result is the same however many threads it has, so that it gets as many as its data is worth."""

    @property
    def trains(self) -> bool:
        """Whether it makes optimiser steps: such a stage runs on several processes and resumes from checkpoints."""
        return issubclass(self.section, Optimisation | Base)

    @property
    def aligns(self) -> bool:
        """Whether it trains an adapter that starts as the SFT policy."""
        return issubclass(self.section, Adapter)

    @property
    def fetches(self) -> bool:
        """Whether its section can name models, data sets or tasks on the hub."""
        return has_hub_items(self.section)


STAGES: dict[str, Stage] = {
    "prepare": Stage(sections.Prepare, "data", "read, check and split the data", runs="always", any_threads=True),
    "base": Stage(sections.Base, "policy", "the untouched model", ("data",), runs="always", threads=2),
    "sft": Stage(sections.Sft, "policy", "supervised fine-tuning", ("data", "base"), shards=True),
    "reward": Stage(
        sections.Reward, "reward", "a reward model from preference pairs", ("data", "base", "sft"), shards=True
    ),
    "reference": Stage(
        sections.Reference, "data", "log-probabilities of the judged answers under the SFT policy",
        ("data", "base", "sft"), runs="where read",
    ),
    "ppo": Stage(
        sections.Ppo, "policy", "proximal policy optimisation against a reward",
        ("data", "base", "sft", "reward"), optional=("reward",),
    ),
    "grpo": Stage(
        sections.Grpo, "policy", "group relative policy optimisation against a reward",
        ("data", "base", "sft", "reward"), optional=("reward",),
    ),
    "dpo": Stage(
        sections.Dpo, "policy", "direct preference optimisation", ("data", "base", "sft", "reference"), shards=True
    ),
    "kto": Stage(
        sections.Kto, "policy", "Kahneman-Tversky optimisation", ("data", "base", "sft", "reference"), shards=True
    ),
    "longctx": Stage(
        sections.Longctx, "policy", "a longer context by rescaled positions",
        ("data", "base", "policy"), optional=("base",), shards=True,
    ),
    "evaluate": Stage(
        sections.Evaluate, "judgement", "benchmark a policy with lm-eval",
        ("data", "base", "policy"), optional=("base",), runs="by default", any_batch=True,
    ),
    "compare": Stage(
        sections.Compare, "judgement", "a policy's own answers beside the SFT policy's",
        ("data", "base", "sft", "policy", "reward", "beside"), optional=("reward", "beside"), runs="by default",
    ),
    "lengths": Stage(
        sections.Lengths, "judgement", "perplexity by length and position, passkeys",
        ("data", "base", "policy"), optional=("base",),
    ),
    "algebra": Stage(sections.Algebra, "identities", "identities of the papers, by the code of the stages"),
}  # fmt: skip

POLICIES = tuple(name for name, stage in STAGES.items() if stage.makes == "policy")
JUDGES = tuple(name for name, stage in STAGES.items() if stage.makes == "judgement")
ON_CPU = tuple(name for name, stage in STAGES.items() if not stage.reads)
"""Stages that read no artifact, and so no model: they prepare data, or compute identities on the CPU."""
REPORTED = tuple(name for name, stage in STAGES.items() if stage.makes in ("judgement", "identities"))
"""Stages whose artifacts the report reads, since no other stage does."""
BUILDERS = tuple(name for name in STAGES if name not in JUDGES)
"""Stages that run once in an experiment; judges run once for each policy."""
ALIGNED = tuple(name for name, stage in STAGES.items() if stage.aligns)
TRAINERS = tuple(name for name, stage in STAGES.items() if stage.trains)
SHARDED = tuple(name for name, stage in STAGES.items() if stage.shards)
FETCHERS = tuple(name for name, stage in STAGES.items() if stage.fetches)


def upstream(stage: str) -> set[str]:
    """The stages that a stage depends on, directly or not, in an experiment that has them all."""
    direct = {source(role) for role in STAGES[stage].reads} - {""}
    return direct.union(*map(upstream, direct))


def source(role: str) -> str:
    """The stage that a role is read from; "" for `policy` and `beside`, which depend on the experiment."""
    return {"data": "prepare", "policy": "", "beside": ""}.get(role, role)


def _field(stage: Stage) -> tuple:
    """Type, default and description of a stage's section in an experiment."""
    help = stage.help[0].upper() + stage.help[1:]
    if stage.runs == "always":
        return stage.section, Field(description=f"{help}.")
    if stage.runs in ("by default", "where read"):
        return stage.section, Field(default=stage.section(), description=f"{help}.")
    return stage.section | None, Field(default=None, description=f"{help}; unset or `null`: the stage does not run.")


CLAIMS = "What the experiment's results should show, by id: `snakemake verify` rules on it. Not inherited."

if TYPE_CHECKING:
    Experiment = Chain
else:
    Experiment = create_model(
        "Experiment",
        __base__=Chain,
        __doc__=Chain.__doc__,
        **{name: _field(stage) for name, stage in STAGES.items()},
        claims=(dict[Name, Claim], Field(default={}, description=CLAIMS)),
    )

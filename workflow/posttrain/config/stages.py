"""The table of stages: what each reads, makes and is set by; every other list of stages follows from it.

Nothing that a stage computes may import this module: a new line here must make no artifact stale.
"""

from typing import Literal, NamedTuple

from posttrain.config import sections
from posttrain.config.sections import Adapter, Base, Optimisation, Section, has_hub_items

Kind = Literal["data", "policy", "reward", "judgement"]

# What a stage reads, by role: the option of its command, and what the manifest is of.
ROLES = {
    "data": "the prepared data",
    "base": "the frozen weights that an adapter belongs to",
    "sft": "the SFT policy",
    "reward": "the reward model, where there is one",
    "reference": "the reference log-probabilities",
    "policy": "the policy",
    "beside": "the SFT policy's judgement, for all other policies",
}


class Stage(NamedTuple):
    """One stage; its name is that of its module, function, section, rule, results folder, caption and test."""

    section: type[Section]
    makes: Kind
    help: str
    reads: tuple[str, ...] = ()
    """Roles (`ROLES`). A role is the name of the stage that it is read from; `data` is made by `prepare`, `policy` is
    the policy that is judged or that the section's key `policy` names, `beside` this judgement of the SFT policy."""
    optional: tuple[str, ...] = ()
    """Roles without which the command runs too; read where the experiment has their stage."""
    runs: Literal["always", "by default", "where read", "if set"] = "if set"
    """`always`: its section must be given. `by default`: with the section's defaults too. `where read`: only where a
    stage of the experiment reads it. `if set`: where its section is given."""
    shards: bool = False
    """Whether its processes can share the weights out among them (FSDP)."""
    threads: int = 1

    @property
    def trains(self) -> bool:
        """Whether it makes optimiser steps, which it can share among processes and continue after an interruption."""
        return issubclass(self.section, Optimisation | Base)

    @property
    def aligns(self) -> bool:
        """Whether it trains an adapter that begins as the SFT policy."""
        return issubclass(self.section, Adapter)

    @property
    def fetches(self) -> bool:
        """Whether its section can name models, data sets or tasks on the hub."""
        return has_hub_items(self.section)


STAGES: dict[str, Stage] = {
    "prepare": Stage(sections.Prepare, "data", "read, check and split the data", runs="always"),
    "base": Stage(sections.Base, "policy", "the untouched model", ("data",), runs="always", threads=2),
    "sft": Stage(sections.Sft, "policy", "supervised fine-tuning", ("data", "base"), shards=True),
    "reward": Stage(sections.Reward, "reward", "a reward model from preference pairs", ("data", "base", "sft")),
    "reference": Stage(
        sections.Reference, "data", "log-probabilities of the judged answers under the SFT policy",
        ("data", "base", "sft"), runs="where read",
    ),
    "ppo": Stage(
        sections.Ppo, "policy", "proximal policy optimisation against a reward",
        ("data", "base", "sft", "reward"), optional=("reward",),
    ),
    "dpo": Stage(
        sections.Dpo, "policy", "direct preference optimisation", ("data", "base", "sft", "reference"), shards=True
    ),
    "longctx": Stage(
        sections.Longctx, "policy", "a longer context by rescaled positions",
        ("data", "base", "policy"), optional=("base",),
    ),
    "evaluate": Stage(
        sections.Evaluate, "judgement", "benchmark a policy with lm-eval",
        ("data", "base", "policy"), optional=("base",), runs="by default",
    ),
    "compare": Stage(
        sections.Compare, "judgement", "a policy's own answers beside the SFT policy's",
        ("data", "base", "sft", "policy", "reward", "beside"), optional=("reward", "beside"), runs="by default",
    ),
    "lengths": Stage(
        sections.Lengths, "judgement", "perplexity by length and position",
        ("data", "base", "policy"), optional=("base",),
    ),
}  # fmt: skip

POLICIES = tuple(name for name, stage in STAGES.items() if stage.makes == "policy")
JUDGES = tuple(name for name, stage in STAGES.items() if stage.makes == "judgement")
BUILDERS = tuple(name for name in STAGES if name not in JUDGES)
"""Stages that run once in an experiment; judges run once for each policy."""
ALIGNED = tuple(name for name, stage in STAGES.items() if stage.aligns)
TRAINERS = tuple(name for name, stage in STAGES.items() if stage.trains)
SHARDED = tuple(name for name, stage in STAGES.items() if stage.shards)
FETCHERS = tuple(name for name, stage in STAGES.items() if stage.fetches)


def upstream(stage: str) -> set[str]:
    """The stages that a stage is built from in every experiment that has them all."""
    direct = {source(role) for role in STAGES[stage].reads} - {""}
    return direct.union(*map(upstream, direct))


def source(role: str) -> str:
    """The stage that a role is read from; "" for `policy` and `beside`, which depend on the experiment."""
    return {"data": "prepare", "policy": "", "beside": ""}.get(role, role)

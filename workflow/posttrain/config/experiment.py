"""The classes of an experiment and a campaign, the files of `config/`. An experiment has one section for each stage."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model

from posttrain.config.sections import Name, Section, Seed
from posttrain.config.stages import STAGES, Stage


class Settings(Section):
    """One chain of stages. A stage runs when its section is set; a section inherits from that of `extends`."""

    question: str = ""
    """What the experiment asks, in one sentence."""
    extends: Name | None = None
    """Experiment whose settings this one inherits; stages with equal settings share their artifacts."""
    seed: Seed = 0
    """Default seed of the training stages."""
    grid: dict[str, Annotated[list, Field(min_length=1)]] | None = None
    """Dotted keys, each with a list of values. Each combination is an experiment, `NAME@beta=0.5@seed=1`, which
    replaces this one. Inherited key by key; `null`: no grid."""

    _seeded: frozenset[str] = frozenset()  # the stages that use the experiment's seed

    if TYPE_CHECKING:  # the sections, which `create_model` adds below

        def __getattr__(self, stage: str) -> Any: ...


def _field(stage: Stage) -> tuple:
    """Type, default and description of a stage's section in an experiment."""
    help = stage.help[0].upper() + stage.help[1:]
    if stage.runs == "always":
        return stage.section, Field(description=f"{help}.")
    if stage.runs in ("by default", "where read"):
        return stage.section, Field(default=stage.section(), description=f"{help}.")
    return stage.section | None, Field(default=None, description=f"{help}; unset or `null`: the stage does not run.")


if TYPE_CHECKING:
    Experiment = Settings
else:
    Experiment = create_model(
        "Experiment",
        __base__=Settings,
        __doc__=Settings.__doc__,
        **{name: _field(stage) for name, stage in STAGES.items()},
    )


class Wandb(Section):
    """Weights & Biases. Stages write offline; `posttrain wandb-sync` uploads."""

    mode: Literal["disabled", "offline"] = "disabled"
    """`offline` writes runs to `results/wandb`."""
    project: Name = "posttrain"
    """Project of the runs."""


class Campaign(Section):
    """What one `snakemake` call covers."""

    title: str = ""
    """Heading of the report."""
    experiments: Annotated[list[Name], Field(min_length=1)]
    """Names of the experiments; NAME is read from `experiments/NAME.yaml` beside the campaign's file."""
    grid: dict[str, Annotated[list, Field(min_length=1)]] | None = None
    """Grid of every experiment, such as `seed: [0, 1, 2]`; a key of the experiment's own `grid` has precedence."""
    keep_gb: Annotated[float, Field(ge=0)] = 20.0
    """GB of replaced artifacts to keep. A kept one is reused when a stage has its settings, inputs and code again;
    0 keeps none."""
    strict: bool = False
    """Rerun every stage when the software versions (`envs/requirements.txt`) change."""
    wandb: Wandb = Wandb()
    """Experiment tracker."""

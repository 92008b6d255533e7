"""An experiment and a campaign: the files that `config/` holds. An experiment has one section for each stage."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model

from posttrain.config.sections import Name, Section, Seed
from posttrain.config.stages import STAGES, Stage


class Settings(Section):
    """One chain of stages. A stage runs when its section is there; a section inherits from `extends`."""

    question: str = ""
    """What the experiment asks, in one sentence."""
    extends: Name | None = None
    """Experiment whose settings this one starts from; equal stages share their artifacts."""
    seed: Seed = 0
    """Default seed of the training stages."""
    grid: dict[str, Annotated[list, Field(min_length=1)]] | None = None
    """Dotted keys with the values that they take: an experiment for each combination, `NAME@beta=0.5@seed=1`, in place
    of this one. Inherited axis by axis; `null` for none."""

    _seeded: frozenset[str] = frozenset()  # the stages whose seed is the experiment's

    if TYPE_CHECKING:  # the sections, which follow from the table of stages

        def __getattr__(self, stage: str) -> Any: ...


def _field(stage: Stage) -> tuple:
    """The type and the default of a stage's section in an experiment, with its description."""
    help = stage.help[0].upper() + stage.help[1:]
    if stage.runs == "always":
        return stage.section, Field(description=f"{help}.")
    if stage.runs in ("by default", "where read"):
        return stage.section, Field(default=stage.section(), description=f"{help}.")
    return stage.section | None, Field(default=None, description=f"{help}; leave out (or `null`) for none.")


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
    """Weights & Biases; nothing is sent by a stage, `posttrain wandb-sync` sends what was written offline."""

    mode: Literal["disabled", "offline"] = "disabled"
    """`offline` writes runs under `results/wandb`."""
    project: Name = "posttrain"
    """Project of the runs."""


class Campaign(Section):
    """What one `snakemake` call covers."""

    title: str = ""
    """Heading of the report."""
    experiments: Annotated[list[Name], Field(min_length=1)]
    """Names; NAME stands in `experiments/NAME.yaml` beside the campaign's file."""
    grid: dict[str, Annotated[list, Field(min_length=1)]] | None = None
    """Axes that every experiment gets, where its own `grid` does not say otherwise: `seed: [0, 1, 2]`."""
    keep_gb: Annotated[float, Field(ge=0)] = 20.0
    """Artifacts that were replaced are kept up to so many GB, and taken again when a stage comes to the same settings,
    inputs and code; 0 keeps none and makes everything anew."""
    strict: bool = False
    """Count the software versions (`envs/requirements.txt`) as part of what a stage is."""
    wandb: Wandb = Wandb()
    """Experiment tracker."""

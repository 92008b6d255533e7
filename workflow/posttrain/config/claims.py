"""Claims: what a paper or an experiment states, with what is measured, expected and tolerated, and a control.

A claim belongs to the experiment whose file declares it. It is in no stage's section: editing it retrains nothing.
"""

from typing import Annotated, Literal

from pydantic import Field

from posttrain.config.sections import LARGEST, Day, Name, Section, Text

Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
SCALES = ("toy", "reduced", "paper")
Scale = Literal["toy", "reduced", "paper"]


class Term(Section):
    """One number of an artifact, of a file, or of the plan."""

    of: Text | None = None
    """The artifact, named as its folder below `results/`: `sft`, `evaluate/sft`, and `tiny-lora/evaluate/sft` for
    another experiment's, which need not be listed in the campaign."""
    value: Text | None = None
    """The number: `TASK METRIC` of a judgement's table (`world exact_match`, `answers gold_reward`), or a dotted key of
    another stage's `metrics.json` (`summary.trainable_parameters`), or of `file`."""
    file: Text | None = None
    """A JSON file of the project that has the number, such as a model's `config.json`, instead of an artifact."""
    depends_on: Name | None = None
    """A stage. The number is 1 if the artifact `of` depends on the stage's, else 0: no artifact is needed."""


class Measured(Term):
    """What is measured: a number, a difference or ratio of two, or a slope over a grid."""

    minus: Term | None = None
    """The number to subtract; its unset keys are those of the first number. Answers to the same questions are
    paired."""
    over: Term | None = None
    """The number to divide by; its unset keys are those of the first number."""
    slope: Text | None = None
    """An axis of the experiment's grid (`dpo.beta`): the least-squares slope of the number over the axis's values."""
    cluster: Text | None = None
    """Key of a question's record (`answer`, `prompt`) by which questions belong together: the standard error is then
    over clusters (Miller 2024, arXiv 2411.00640, section 2.2)."""


class Control(Measured):
    """The negative control: what differs from what is measured. The claim must not hold for it."""


class Protocol(Section):
    """How a recorded value was measured. A result that was measured otherwise is not compared with it."""

    version: str | float | None = None
    """The task's version."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Number of few-shot examples."""
    template: Text | None = None
    """sha256 of the chat template that was applied to questions; `none` where none was."""
    dtype: Text | None = None
    """Type of the weights, as lm-eval records it."""
    items: Annotated[int, Field(ge=1)] | None = None
    """Number of questions."""


class Expected(Section):
    """The expected value: exactly one of `exactly`, `about`, `at_least`, `at_most`, and where it was measured."""

    exactly: Number | None = None
    """The value, which has no standard error: algebra."""
    about: Number | None = None
    """The value, up to the tolerance in both directions."""
    at_least: Number | None = None
    """The least value, less the tolerance."""
    at_most: Number | None = None
    """The largest value, plus the tolerance."""
    seeds: list[Number] | None = None
    """Values measured on several training seeds."""
    batches: dict[str, list[Number]] | None = None
    """Such values for each of several global batch sizes, where they depend on it. At another one the claim is not
    compared."""
    spread: Annotated[float, Field(ge=0, le=LARGEST)] | None = None
    """Standard deviation of the value where a paper prints it and not its seeds."""
    version: Annotated[int, Field(ge=1)] = 1
    """Number of the expected value, raised when it is replaced."""
    date: Day
    """Day on which the expected value was set."""
    protocol: Protocol | None = None
    """How it was measured."""


class Tolerance(Section):
    """How far a value may lie from the expected one, and why so far."""

    value: Annotated[float, Field(ge=0, le=LARGEST)] = 0.0
    """The tolerance, in units of what is measured."""
    basis: Text
    """Where it comes from: repeats in the paper, seeds measured here with the command, algebra."""


class Claim(Section):
    """One statement, what is measured for it, and when it counts as reproduced."""

    sentence: Text
    """The statement, in one sentence."""
    paper: Text
    """Its source, such as `arXiv 2305.14314`."""
    table: Text | None = None
    """Table, figure, equation or section of the source."""
    measured: Measured
    """What is measured."""
    expected: Expected
    """What is expected."""
    tolerance: Tolerance
    """How much less, or more, is tolerated."""
    control: Control
    """The negative control."""
    scope: Literal["evaluation", "training"] = "training"
    """`evaluation` of given weights, which is ruled on first, or `training`."""
    scale: Scale = "toy"
    """The smallest scale at which the claim can be tested; a campaign has its own (`scale`)."""
    family: Name | None = None
    """Claims that are tested together (Holm 1979). Default: those of the same paper."""
    noise_floor: bool = False
    """Whether what is measured is the noise floor, the difference between two evaluations of one policy: it is shown
    beside the verdict."""

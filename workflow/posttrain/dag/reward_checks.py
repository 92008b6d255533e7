"""Rules across keys for the stages that sample answers and score them."""

from collections.abc import Iterator

import regex

from posttrain.config.sections import Grpo, RewardPart, Sampled
from posttrain.config.stages import STAGES, Experiment
from posttrain.dag.rules import Mistakes
from posttrain.dag.source_checks import unanswered

NEEDED = {
    "pattern": "pattern",
    "tags": "tags",
    "length": "words",
}  # kind of a term -> the key that it cannot do without


def sampled_mistakes(where: str, section: Sampled, experiment: Experiment) -> Mistakes:
    """A reward must be there, and the answers of an iteration must fill its minibatches."""
    if "reward" not in section.without and experiment.reward is None:
        yield where, f"has no reward: set section reward, or {where}.reward_function"
    if section.minibatches > section.batch_size:
        answers = f"the {section.batch_size} answers of an iteration"
        yield f"{where}.minibatches", f"{section.minibatches} is more than {answers}"


def same_function(where: str, section: Sampled, experiment: Experiment) -> Mistakes:
    """`compare` scores every policy of an experiment by one function."""
    sampling = [name for name, stage in STAGES.items() if issubclass(stage.section, Sampled)]
    for name in sampling[: sampling.index(where)]:
        other = getattr(experiment, name)
        if other and other.reward_function and section.reward_function not in (None, other.reward_function):
            problem = f"differs from {name}.reward_function, and compare scores all policies by one function"
            yield f"{where}.reward_function", f"{problem}; make two experiments"


def grpo_mistakes(where: str, section: Grpo, experiment: Experiment) -> Mistakes:
    """Groups must fill the batch, and a clip from below must leave a ratio over 0."""
    if section.batch_size % section.group:
        yield f"{where}.group", f"{section.group} does not divide batch_size {section.batch_size}"
    if section.clip_high is not None and section.clip_high < section.clip:
        yield f"{where}.clip_high", f"{section.clip_high} is under clip ({section.clip}), the bound of lower ratios"


def reward_mistakes(where: str, section: Grpo, experiment: Experiment) -> Mistakes:
    """Terms of a reward that lack what they need, or that count for nothing."""
    parts = section.rewards or []
    kinds = [part.kind for part in parts]
    for number, part in enumerate(parts):
        for problem in _of_part(part):
            yield f"{where}.rewards[{number}].{problem[0]}", problem[1]
    if "exact" in kinds and (why := unanswered(section.prompts, experiment.prepare)):
        yield f"{where}.rewards[{kinds.index('exact')}].kind", f"exact compares with the rows' `answer`: {why}"
    if "reward_seconds" in section.model_fields_set and section.reward_function is None:
        yield f"{where}.reward_seconds", f"has no effect without {where}.reward_function"
    if "function" in kinds and section.reward_function is None:
        yield f"{where}.rewards[{kinds.index('function')}].kind", f"function needs {where}.reward_function"
    if parts and section.reward_function and "function" not in kinds:
        yield f"{where}.reward_function", f"has no effect: no term of {where}.rewards is of kind function"
    if parts and not any(part.weight for part in parts):
        yield f"{where}.rewards", "have weights of 0, so that nothing is learned"


def _of_part(part: RewardPart) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it) of one term."""
    needed = NEEDED.get(part.kind)
    if needed and getattr(part, needed) is None:
        yield needed, f"is missing: kind {part.kind} needs it"
    if part.kind in ("exact", "pattern") and part.pattern is not None:
        try:
            groups = regex.compile(part.pattern).groups
        except regex.error as error:
            yield "pattern", f"is no regular expression: {error}"
        else:
            if part.kind == "exact" and not groups:
                yield "pattern", "has no group: put the part of it that is the answer in parentheses"

"""Let a policy answer some prompts of a recorded comparison again, and compare answers and scores with the record."""

from collections.abc import Iterator
from pathlib import Path

from posttrain.config.sections import Compare
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_jsonl
from posttrain.jobs import recorded
from posttrain.jobs.recorded import Recorded
from posttrain.maths.intervals import most_differing
from posttrain.reporting.text import visible
from posttrain.tools import asked

KEYS = ("prompt", "answer", "reply", "length", "ended", "kl", "reward", "gold_reward")


def check(artifact: Recorded, count: int, seed: int) -> tuple[list[str], bool]:
    """Compute the table's numbers again from the recorded answers, and have `count` prompts, drawn by `seed`, answered
    again; returns the lines to print, and whether all agrees. Best-of-n and snapshots are left out."""
    before = answers_of(artifact.folder)
    drawn = asked.draw(list(before), count, seed)
    asked_for, now = recorded.run(artifact, lambda section, **inputs: again(set(drawn), section, **inputs))
    tolerance = asked.TOLERANCE[recorded.arithmetic(artifact)]
    if asked_for == before.keys():
        problems = [*other_numbers(artifact, before), *differences([before[key] for key in drawn], now, tolerance)]
    else:
        answers = len(asked_for & before.keys())
        problems = [f"{len(asked_for)} prompts were to be answered, {answers} of them have answers"]
    most = most_differing(len(before), len(drawn))
    worth = f"{len(drawn)} of {len(before)} answers are equal: with 95 % confidence at most {most} of them differ"
    lines = [f"answered again: {len(drawn):,} of {len(before):,} prompts (--seed {seed} draws the same)"]
    return asked.told(artifact, lines, problems, [f"confidence: {worth}"])


def answers_of(folder: Path) -> dict[str, dict]:
    """The recorded answers by the ids of their prompts. Raises UserError where the file holds something else."""
    file = folder / "data" / "answers.jsonl"
    try:
        return {row["id"]: row for row in read_jsonl(file)}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{file}: holds a line that is no answer") from None


def again(
    ids: set[str],
    section: Compare,
    data: Path,
    base: Path,
    sft: Path,
    policy: Path,
    reward: Path | None = None,
    beside: Path | None = None,
) -> tuple[set[str], list[dict]]:
    """(ids of all prompts, the answers to those with the given ids, now); each has random numbers of its own."""
    from posttrain.models import adapters
    from posttrain.rl.prompts import held_out_prompts
    from posttrain.stages import compare

    foundation = adapters.foundation_of(base, sft)
    measures = compare.load_measures(section, foundation, reward)
    rows = held_out_prompts(section, data, measures.tokenizer, measures.model)
    speaker = compare.load_speaker(measures, policy, foundation, section.four_bits)
    chosen = [row for row in rows if row["id"] in ids]
    return {row["id"] for row in rows}, compare.answer(section, measures, chosen, speaker)


def other_numbers(artifact: Recorded, answers: dict[str, dict]) -> Iterator[str]:
    """The table's numbers that are not those of the recorded answers."""
    from posttrain.evaluation import comparison, judging

    rows = comparison.summarise(list(answers.values()))
    if beside := artifact.inputs.get("beside"):
        rows += comparison.gains(list(answers.values()), list(answers_of(Path(str(beside)).parent).values()))
    if (verdicts := artifact.folder / "data" / "verdicts.jsonl").is_file():
        rows += judging.rows_of(read_jsonl(verdicts))
    values = {row["metric"]: row["value"] for row in rows}
    for row in artifact.metrics["rows"]:
        value = values.get(row["metric"])
        if not asked.same(row["value"], value, 1e-9):
            yield f"{row['metric']}: {row['value']} is reported, the answers make {value}"


def differences(before: list[dict], now: list[dict], tolerance: float) -> Iterator[str]:
    """The first thing that differs of each answer."""
    for one, other in zip(before, now, strict=True):
        for key in dict.fromkeys([*KEYS, *one, *other]):
            if not asked.same(one.get(key), other.get(key), tolerance):
                values = " recorded, ".join(visible(repr(side.get(key))) for side in (one, other))
                yield f"prompt {one['id']}: {key} {values} now"
                break

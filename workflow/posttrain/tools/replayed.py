"""Replay some steps of a recorded training, and compare what they come to with the record."""

import contextlib
import math
import pickle
import random
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from posttrain.config.sections import Sampled
from posttrain.ground.errors import Diverged, Interrupted, UserError
from posttrain.ground.files import manifest_of, read_json, write_json
from posttrain.jobs import recorded
from posttrain.jobs.recorded import Recorded
from posttrain.training import spotchecks
from posttrain.training.spotchecks import Stretch

# Largest relative difference that another execution shape may make in a figure of the replayed steps, by the type of
# the arithmetic; docs/spotcheck.md has what was measured.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}
SHARES = (0.1, 0.5, 0.9)  # of steps that may be false, for which the chance of missing them is printed
LOADING = (RuntimeError, ValueError, KeyError, pickle.UnpicklingError)  # raised where a state's bytes make no sense


class Place(NamedTuple):
    """A place from which steps can be replayed."""

    stretch: Stretch
    state: Path | None  # the folder of the stored state; None for the beginning
    steps: list[dict]  # the recorded figures
    sha256: dict[str, str]  # of the trained weights and the optimizer's state after the last step

    @property
    def words(self) -> str:
        """The steps and where they start."""
        first, last = self.stretch.after + 1, self.stretch.last
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        return f"{steps}, from " + (f"the state stored after step {first - 1}" if self.state else "the beginning")


def check(artifact: Recorded, numbers: list[int], seed: int) -> tuple[list[str], bool]:
    """Replay a training at places, and compare; returns the lines to print, and whether all agrees.

    numbers: of the places, from 1, and 0 for the beginning; if empty, one is drawn by `seed`. Raises UserError for a
    place that there is not, and where the artifact's stage did not train.
    """
    stored = places(artifact)
    if wrong := [number for number in numbers if number > len(stored)]:
        raise UserError(f"--place {wrong[0]}: {artifact.folder} has states of {len(stored)} places (0: the beginning)")
    chosen = numbers or [random.Random(seed).randint(1, len(stored)) if stored else 0]
    lines, agreed = [], True
    for number in dict.fromkeys(chosen):
        place = stored[number - 1] if number else beginning(artifact)
        of_place, equal = replay(artifact, place)
        lines += [f"replayed: {place.words}" + (f" (place {number} of {len(stored)})" if number else ""), *of_place]
        agreed = agreed and equal
    return lines + (confidence(artifact, len({*chosen} - {0}), len(stored)) if agreed else []), agreed


def places(artifact: Recorded) -> list[Place]:
    """The places of which the state was kept, in order."""
    folder = artifact.folder / spotchecks.FOLDER
    kept = []
    for state in (folder / spotchecks.name_of(step) for step in spotchecks.complete(folder)):
        after = read_json(state.with_suffix(".json"))
        kept.append(Place(Stretch(after["after"], after["last"]), state, after["steps"], after["sha256"]))
    return kept


def beginning(artifact: Recorded) -> Place:
    """The training's beginning, up to the first point of its published curve."""
    point = next((point for point in artifact.metrics.get("history", []) if "loss" in point or "reward" in point), None)
    if point is None:
        raise UserError(f"{artifact.folder}: its stage trained nothing, so that there is no step to replay")
    return Place(Stretch(0, point["step"]), None, [point], {})


def replay(artifact: Recorded, place: Place) -> tuple[list[str], bool]:
    """Replay one place; returns what agrees or differs, in lines, and whether all agrees."""
    try:
        now = repeated(artifact, place)
    except (Diverged, *LOADING) as error:
        reason = str(error).partition("\n")[0]
        return [f"  differs: the training does not go on from the stored state: {reason}"], False
    steps = now["steps"] if place.state or isinstance(artifact.section, Sampled) else curve(artifact, now["steps"])[-1:]
    other = recorded.otherwise(artifact)
    difference = first_difference(place.steps, steps, 0.0)
    for what, digest in sorted(place.sha256.items(), reverse=True):  # weights, optimizer
        if not difference and digest != now["sha256"][what]:
            difference = f"{what} after the last step: sha256 {digest[:16]} recorded, {now['sha256'][what][:16]} now"
    lines = [f"  not as recorded here: {change}" for change in other]
    tolerance = TOLERANCE[recorded.arithmetic(artifact)]
    if difference and (not other or first_difference(place.steps, steps, tolerance)):
        return [*lines, f"  differs: {difference}"], False
    if difference:
        lines.append(f"  agrees to {tolerance:g} of each figure, as another machine may differ; first: {difference}")
    else:
        figures = [*sorted(place.steps[0].keys() - {"step"}), *sorted(place.sha256, reverse=True)]
        lines.append(f"  equal to the byte: {', '.join(figures)}")
    return curve_agrees(artifact, place, lines)


def repeated(artifact: Recorded, place: Place) -> dict:
    """What the steps of a place come to now, as `spotchecks.record` writes it. Nothing of the artifact is touched."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"work": Path(scratch, "work"), "checkpoints": Path(scratch, "checkpoints")}
        for folder in folders.values():
            folder.mkdir()
        if place.state:
            copy = shutil.copytree(place.state, folders["checkpoints"] / f"checkpoint-{place.stretch.after}")
            write_json(copy / "manifest.json", manifest_of(copy, [part.name for part in copy.iterdir()]))
        spotchecks.replayed = place.stretch
        try:
            with contextlib.suppress(Interrupted):
                recorded.run(artifact, lambda section, **inputs: artifact.function(section, **inputs, **folders))
        finally:
            spotchecks.replayed = None
        return read_json(spotchecks.file_of(folders["checkpoints"], place.stretch))


def curve(artifact: Recorded, entries: list[dict]) -> list[dict]:
    """The points of the published curve, from the figures of steps."""
    from posttrain.training import trainers

    section = getattr(artifact.section, "scratch", artifact.section)
    return entries if isinstance(section, Sampled) else trainers.curve(entries, section.log_steps)


def curve_agrees(artifact: Recorded, place: Place, lines: list[str]) -> tuple[list[str], bool]:
    """Compare the published curve, up to a place, with the figures of all steps that the stored state holds."""
    if place.state is None:
        return lines, True
    file, key = (
        ("state.json", "history") if isinstance(artifact.section, Sampled) else ("trainer_state.json", "log_history")
    )
    every = getattr(getattr(artifact.section, "scratch", artifact.section), "log_steps", 1)
    last = place.stretch.after // every * every  # the end of the last point that has all its steps
    if not last:
        return lines, True
    held = curve(artifact, [entry for entry in read_json(place.state / file)[key] if entry["step"] <= last])
    published = [point for point in artifact.metrics["history"] if point["step"] <= last]
    if difference := first_difference(held, published, 0.0):
        return [*lines, f"  differs: the published curve: {difference}"], False
    return [*lines, f"  equal: the published curve up to step {last}, by the stored state"], True


def first_difference(before: list[dict], now: list[dict], tolerance: float) -> str | None:
    """The first figure of the steps `before` that another has `now`; None where all that both hold are equal.

    tolerance: relative; 0 for equal bytes.
    """
    if len(before) != len(now):
        return f"{len(before)} steps are recorded, {len(now)} were made now"
    for one, other in zip(before, now, strict=True):
        for key in ["step", "loss", *sorted(one)]:
            if key in one and key in other and not same(one[key], other[key], tolerance):
                return f"step {one['step']}: {key} {one[key]} recorded, {other[key]} now"
    return None


def same(one, other, tolerance: float) -> bool:
    """Whether two figures are equal or, with a tolerance, close."""
    if tolerance and isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=1e-6)
    return one == other or (one != one and other != other)


def confidence(artifact: Recorded, replayed: int, stored: int) -> list[str]:
    """What the agreement is worth, and what it does not show.

    replayed: number of places. A place is drawn evenly in each of as many equal parts of the training as are stored, so
    that with the share f_i of part i false, all miss it with probability prod(1 - f_i) <= (1 - f)^stored, f being the
    mean; of some places drawn among them, the mean of such products is at most (1 - f)^replayed (Maclaurin).
    """
    if not stored:
        todo = "with `spotchecks: 2` in the campaign, a training stores some (docs/spotcheck.md)"
        return [f"confidence: only the beginning can be replayed, as no later state is stored; {todo}"]
    if not replayed:
        return [f"confidence: only the beginning was replayed; there are states of {stored} places (--place)"]
    chances = ", ".join(f"{(1 - share) ** replayed:.2g} for {share:.0%}" for share in SHARES)
    return [
        f"confidence: if a share of the steps was not trained as recorded, a check of {replayed} of {stored} places "
        f"misses it with a probability of at most {chances}",
        "not shown: that the steps between were trained, and that the last ones made the published weights; who forges "
        "a run knows its places, which follow from the seed",
    ]

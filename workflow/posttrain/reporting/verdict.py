"""Rule on the claims of a campaign: reproduced or not, by how much, and how far the numbers carry.

posttrain verdict
"""

import math
import textwrap
from pathlib import Path
from typing import Any

from posttrain.maths.intervals import over_seeds
from posttrain.maths.significance import against, holm, smallest_effect
from posttrain.reporting.departure import departure, other_settings
from posttrain.reporting.measured import Estimate, NotMade, Refused, measure
from posttrain.reporting.text import short

LEVEL = 0.05  # of the tests, after Holm's correction within a family
TOO_GOOD = 3.0  # standard deviations by which a result may be better than the recorded ones
REPRODUCED, NOISE, FAILED, UNTESTABLE, NOT_RUN = VERDICTS = (
    "reproduced", "consistent-within-noise", "not-reproduced", "not-testable-at-this-scale", "not-run",
)  # fmt: skip


def verdict(
    claims: list[dict],
    results: Path,
    registered: dict[str, str] | None = None,
    recorded: dict[str, dict] | None = None,
) -> dict:
    """The rulings on claims, those of evaluations first, with their number by verdict and whether all of them hold.

    registered: id of a claim -> why it does not count as stated before its results, "" where it does. recorded: folder
    -> `departure.snapshot` of the artifacts on which the expected values rest.
    """
    recorded = recorded or {}
    in_order = sorted(claims, key=lambda claim: claim["scope"] != "evaluation")
    rulings = [_measured(claim, results, recorded) for claim in in_order]
    for family in dict.fromkeys(ruling["family"] for ruling in rulings):
        _judge([ruling for ruling in rulings if ruling["family"] == family])
    for ruling in rulings:
        ruling["registered"] = (registered or {}).get(ruling["id"], "")
        unsettled = failed(ruling) or ruling["verdict"] == NOISE
        ruling["departs"] = departure(ruling["artifacts"], recorded, results.parent) if unsettled else ""
        for key in ("estimates", "low", "high"):
            del ruling[key]
    floors = [ruling for ruling in rulings if ruling["noise_floor"] and ruling["got"] is not None]
    return {
        "rulings": rulings,
        "counts": {word: sum(ruling["verdict"] == word for ruling in rulings) for word in VERDICTS},
        "holds": not any(failed(ruling) for ruling in rulings),
        "noise_floor": [{key: one[key] for key in ("id", "sentence", "got", "stderr", "over")} for one in floors],
    }


def failed(ruling: dict) -> bool:
    """Whether a ruling makes the whole verdict fail: not reproduced, not comparable, or a control that passed."""
    return ruling["verdict"] == FAILED or ruling["refused"] or ruling["control"]["verdict"] == REPRODUCED


def _measured(claim: dict, results: Path, recorded: dict[str, dict]) -> dict[str, Any]:
    """A ruling before it is judged: the claim's words, what was measured, or why nothing was."""
    keys = ("id", "experiment", "question", "sentence", "paper", "table", "scope", "scale", "family", "noise_floor")
    ruling: dict[str, Any] = {key: claim.get(key) for key in keys}
    low, high = region(claim)
    ruling |= {"expected": expectation(claim), "tolerance": claim["tolerance"], "low": low, "high": high}
    ruling |= {"verdict": UNTESTABLE, "reason": "", "refused": False, "too_good": "", "unpublishable": False}
    ruling |= {"got": None, "stderr": None, "over": "", "smallest_effect": None, "p": None, "estimates": {}}
    ruling["control"] = {"got": None, "stderr": None, "verdict": NOT_RUN}
    above = claim["measured"]["above"] | claim["control"]["above"]
    ruling["artifacts"] = [*dict.fromkeys(folder for folders in above.values() for folder in folders)]
    if not claim["tested"]:
        ruling["reason"] = f"it needs the scale {claim['scale']}"
        return ruling
    ruling["verdict"] = NOT_RUN
    try:
        got = ruling["estimates"]["measured"] = measure(claim["measured"], results)
        ruling |= {"got": got.value, "stderr": got.stderr, "over": got.over, "unpublishable": got.limited}
        refuse_other_than_recorded(claim, got)
        if other := other_settings(ruling["artifacts"], recorded, results.parent):
            raise Refused(f"{other}; the expected value was measured there: posttrain verdict --record records anew")
        control = ruling["estimates"]["control"] = measure(claim["control"], results)
        ruling["control"] |= {"got": control.value, "stderr": control.stderr}
    except (NotMade, Refused) as problem:
        ruling |= {"reason": str(problem), "refused": isinstance(problem, Refused), "estimates": {}}
        return ruling
    if got.stderr:
        ruling["smallest_effect"] = smallest_effect(got.stderr, got.freedom)
    ruling["too_good"] = too_good(claim, got)
    return ruling


def region(claim: dict) -> tuple[float, float]:
    """The values that a claim tolerates, from the least to the largest; infinite where it has no bound."""
    expected, tolerance = claim["expected"], claim["tolerance"]["value"]
    both = expected.get("exactly", expected.get("about"))
    low = both if both is not None else expected.get("at_least")
    high = both if both is not None else expected.get("at_most")
    return -math.inf if low is None else low - tolerance, math.inf if high is None else high + tolerance


def expectation(claim: dict) -> str:
    """What a claim expects, in words: `at least 0, tolerance 0.03`."""
    expected, tolerance = claim["expected"], claim["tolerance"]["value"]
    key = next(key for key in ("exactly", "about", "at_least", "at_most") if key in expected)
    return f"{key.replace('_', ' ')} {plain(expected[key])}" + (f", tolerance {plain(tolerance)}" if tolerance else "")


def plain(value: float) -> str:
    """A number in as few digits as it has: 0.3, 32,768, 1e-05."""
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e12 else f"{value:g}"


def refuse_other_than_recorded(claim: dict, got: Estimate) -> None:
    """Raise Refused where the expected value was recorded for another protocol, or for other global batch sizes."""
    expected = claim["expected"]
    for key, value in (expected.get("protocol") or {}).items():
        here = (got.protocol or {}).get(key)
        if str(here) != str(value):
            raise Refused(f"{key} differs: {here} here, {value} where the expected value was measured")
    batches, batch = expected.get("batches"), claim["measured"]["batch"]
    if batches and str(batch) not in batches:
        raise Refused(f"the global batch size is {batch} here; expected values are for {', '.join(batches)}")


def too_good(claim: dict, got: Estimate) -> str:
    """Why a result is better than the recorded ones allow; "" where it is not."""
    expected = claim["expected"]
    values, spread = expected.get("seeds"), expected.get("spread")
    if batches := expected.get("batches"):
        values = batches[str(claim["measured"]["batch"])]
    bound = expected.get("at_least", expected.get("at_most"))
    if bound is None or (spread is None and len(values or ()) < 2):
        return ""
    mean, deviation = (bound, spread) if spread is not None else over_seeds(values or ())
    better = got.value - mean if "at_least" in expected else mean - got.value
    if better <= TOO_GOOD * math.hypot(deviation or 0.0, got.stderr or 0.0):
        return ""
    return f"better than the recorded {short(mean)} ± {short(deviation)} by over {TOO_GOOD:g} of their deviations: why?"


def _judge(rulings: list[dict]) -> None:
    """The verdicts of one family of claims."""
    for part in ("measured", "control"):
        judged = [ruling for ruling in rulings if part in ruling["estimates"]]
        for ruling, outside, inside in _tested(judged, part):
            word = REPRODUCED if outside <= LEVEL else FAILED if inside <= LEVEL else NOISE
            if part == "measured":
                ruling |= {"verdict": word, "p": {"inside": inside, "outside": outside}}
            else:
                ruling["control"]["verdict"] = word
    for ruling in rulings:
        if ruling["estimates"] and ruling["control"]["verdict"] == REPRODUCED:
            ruling["reason"] = "its control holds too: this shows nothing"
        elif ruling["verdict"] == REPRODUCED and ruling["control"]["verdict"] == NOISE:
            ruling |= {"verdict": NOISE, "reason": "its control cannot be told from it"}


def _tested(rulings: list[dict], part: str) -> list[tuple[dict, float, float]]:
    """(ruling, p of the value lying outside its region, p of its lying inside), corrected over those with an error."""
    tests = []
    for ruling in rulings:
        estimate = ruling["estimates"][part]
        tests.append(against(estimate.value, estimate.stderr or 0.0, estimate.freedom, ruling["low"], ruling["high"]))
    noisy = [number for number, ruling in enumerate(rulings) if ruling["estimates"][part].stderr]
    for side in (0, 1):
        for number, p in zip(noisy, holm([tests[number][side] for number in noisy]), strict=True):
            tests[number] = (p, tests[number][1]) if side == 0 else (tests[number][0], p)
    return [(ruling, *test) for ruling, test in zip(rulings, tests, strict=True)]


def table(verdict: dict, width: int = 100) -> str:
    """The verdict as text of at most `width` columns: each claim, the noise floor, and the answer in the last line."""
    lines = []
    for ruling in verdict["rulings"]:
        words = f"{ruling['verdict']:26}  {ruling['id']}: {ruling['sentence']}"
        lines += textwrap.wrap(words, width, subsequent_indent=" " * 28)
        lines += [
            text
            for part in details(ruling)
            for text in textwrap.wrap(part, width, initial_indent=" " * 28, subsequent_indent=" " * 30)
        ]
    for floor in verdict["noise_floor"]:
        lines.append(f"noise floor: {figure(floor['got'], floor['stderr'])}, {floor['sentence']}")
    return "\n".join([*lines, headline(verdict)])


def headline(verdict: dict) -> str:
    """The answer in one line: how many claims were reproduced, and how many were not."""
    parts = [f"{count} {word}" for word, count in verdict["counts"].items() if count]
    passed = sum(ruling["control"]["verdict"] == REPRODUCED for ruling in verdict["rulings"])
    refused = sum(ruling["refused"] for ruling in verdict["rulings"])
    parts += [f"{passed} with a control that holds"] * bool(passed) + [f"{refused} not comparable"] * bool(refused)
    return f"{len(verdict['rulings'])} claims: {', '.join(parts) or 'none'}"


def answer(verdict: dict) -> str:
    """Whether it reproduced, in a sentence."""
    rulings, counts = verdict["rulings"], verdict["counts"]
    if failing := [ruling["id"] for ruling in rulings if failed(ruling)]:
        return f"No: {', '.join(failing)}"
    if counts[REPRODUCED] + counts[NOISE] == 0:
        return "Not known: no claim was run"
    noise = f", {counts[NOISE]} within noise only" if counts[NOISE] else ""
    if counts[NOT_RUN]:
        return f"As far as it was run, yes{noise}; {counts[NOT_RUN]} claims were not run"
    return f"Yes, every claim that can be tested here{noise}"


def details(ruling: dict) -> list[str]:
    """What a person needs beside a verdict: source, numbers, tolerance with its basis, and every reservation."""
    source = ", ".join(filter(None, (ruling["paper"], ruling["table"])))
    lines = [f"{source}; expected {ruling['expected']} ({ruling['tolerance']['basis']})"]
    if ruling["got"] is not None:
        over = f" over {ruling['over']}" if ruling["over"] else ""
        text = f"got {figure(ruling['got'], ruling['stderr'])}{over}"
        if ruling["control"]["got"] is not None:
            text += f"; control {figure(ruling['control']['got'], ruling['control']['stderr'])}"
        if ruling["smallest_effect"]:
            text += f"; smallest effect to be seen {short(ruling['smallest_effect'])}"
        lines.append(text)
    reservations = [ruling["reason"], ruling["too_good"]]
    reservations += [f"first departure: {ruling['departs']}"] * bool(ruling["departs"])
    reservations += ["unpublishable: evaluate.limit leaves questions out"] * ruling["unpublishable"]
    reservations += [f"not preregistered: {ruling['registered']}"] * bool(ruling["registered"])
    return lines + [text for text in reservations if text]


def figure(value: float, stderr: float | None) -> str:
    """A value with its standard error."""
    if stderr is None:
        return plain(value) if float(value).is_integer() else short(value)
    return f"{short(value)} ± {short(stderr)}"

"""Single mistakes in valid campaigns: each is refused in one line with its place, and none ends in a traceback."""

import pytest
from fuzzing import judged, survey
from mutations import KINDS, Fuzzer, Mistake, dumped
from valid_campaigns import SITUATIONS, project

from posttrain.dag import campaign
from posttrain.ground.errors import UserError


@pytest.mark.slow
def test_each_of_a_thousand_mistakes_is_told_once_at_its_place():
    surveyed = survey(seed=0, count=1000)
    assert len({mistake.kind for mistake, _, _ in surveyed}) == len(KINDS)
    faults = [(fault, mistake.kind, mistake.key, said) for mistake, fault, said in surveyed if fault]
    assert not faults, f"{len(faults)} of 1000: python tests/fuzzing.py --seed 0\n{faults[:3]}"


def test_the_campaigns_are_valid_before_they_are_changed(tmp_path):
    with project(tmp_path) as folder:
        for situation in SITUATIONS:
            files = {name: dumped(settings) for name, settings in situation.items()}
            assert judged(folder, Mistake("", files, "", "config.yaml", 0, forbidden=False)) == ("", [])


def raising(error: Exception):
    def load(*_):
        raise error

    return load


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (lambda *_: None, "accepted"),
        (raising(KeyError("sft")), "traceback"),
        (raising(UserError("FILE:LINE: sft.rank: found 'x'", "FILE:1: dpo: set sft")), "further messages"),
        (raising(UserError("FILE:1: sft.rank: found 'x'")), "wrong place"),
        (raising(UserError("FILE:LINE: sft: found 'x'")), "wrong place"),
        (raising(UserError("FILE:LINE: sft.rank: found True")), "words of Python"),
        (raising(UserError("FILE:LINE: sft.rank: found 'x'")), ""),
    ],
)
def test_a_wrong_answer_is_a_fault(tmp_path, monkeypatch, answer, fault):
    """Controls: of a check that accepts, crashes, says more than one thing, or names another line or key."""
    with project(tmp_path) as folder:
        situation = {name: {**settings} for name, settings in SITUATIONS[0].items()}
        situation["experiments/one.yaml"]["sft"] = situation["experiments/one.yaml"]["sft"] | {"rank": "x"}
        mistake = Fuzzer(0).said(situation, "experiments/one.yaml", "sft.rank")
        assert mistake.forbidden and mistake.line

        def load(*arguments):
            try:
                return answer(*arguments)
            except UserError as error:
                place = f"{folder / mistake.file}:"
                raise UserError(
                    *(text.replace("FILE:", place).replace("LINE", str(mistake.line)) for text in error.problems)
                ) from None

        monkeypatch.setattr(campaign, "load", load)
        assert judged(folder, mistake)[0] == fault

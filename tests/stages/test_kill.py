"""kill -9 at random moments, in training and inside the save: the artifact has the bytes of the uninterrupted run.

The long version, with its figures, is `benchmarks/certify.py`.
"""

import random
import time
from pathlib import Path

import killing
import pytest
from tiny import trainers

from posttrain.ground.files import read_json

pytestmark = pytest.mark.slow
SECTIONS = trainers(checkpoint_minutes=0.1 / 60)


@pytest.fixture(scope="module")
def processes(home):
    killing.prepare()


@pytest.mark.parametrize("stage", SECTIONS)
def test_killed_at_random_moments(stage, processes, uninterrupted, read_by):
    output, seed = Path(f"results/killed/{stage}/manifest.json"), time.time_ns()
    chance, given = random.Random(seed), (stage, SECTIONS[stage], output, read_by[stage])
    hits = []
    for aim in ("save", "training", "save"):
        if not output.exists():  # on a busy machine it may come to its end before it is killed again
            hits.append(killing.kill(*given, aim, chance, seconds=0.3))
    assert any(hits), f"control: it was killed before its end (seed {seed})"
    found = read_json(output)["files"] if output.exists() else killing.finish(*given)
    assert found == read_json(uninterrupted[stage])["files"], f"seed {seed}: {hits}"
    assert "continuing" in (output.parent / "said").read_text(), f"control: it had saved (seed {seed})"


@pytest.mark.parametrize("stage", SECTIONS)
def test_a_piece_of_the_state_less_is_another_run(stage, processes, uninterrupted, read_by):
    """Control of the test above."""
    output = Path(f"results/forgetful/{stage}/manifest.json")
    found = killing.continue_without("optimiser", stage, SECTIONS[stage], output, read_by[stage])
    assert found != read_json(uninterrupted[stage])["files"]

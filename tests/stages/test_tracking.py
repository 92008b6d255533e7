"""wandb: nothing by default; offline files under an id that follows from what is run."""

import os
import time
from pathlib import Path

import pytest
from tiny import make, ppo, sft

from posttrain.ground.errors import UserError
from posttrain.training.tracking import sync


@pytest.fixture
def offline(home):
    """wandb's offline mode for one test; stages tell wandb about themselves in the environment."""
    before = dict(os.environ)
    os.environ["WANDB_MODE"] = "offline"
    yield
    os.environ.clear()
    os.environ.update(before)


def runs(name: str, data, base) -> set[str]:
    """Ids of the offline runs there are after a short training."""
    import wandb

    make("sft", sft(method="lora"), Path(f"results/{name}/sft/manifest.json"), data=data, base=base)
    wandb.finish()
    return {folder.name.split("-", 3)[3] for folder in Path("results/wandb/wandb").glob("offline-run-*-sft-*")}


def test_nothing_is_written_by_default(data, base, home):
    with pytest.raises(UserError, match="no offline runs"):
        sync()


def test_an_id_follows_from_what_is_run(data, base, offline):
    first = runs("tracked", data, base)
    again = runs("tracked", data, base)
    assert len(first) == 1 and first == again, "a restarted job continues its run"
    assert next(iter(first)).startswith("sft-")


def test_ppo_is_tracked_too(data, base, tuned_policy, rewarded, offline):
    """The health of every iteration, in the run's own file; control: another key is not in it."""
    import wandb

    inputs = {"data": data, "base": base, "sft": tuned_policy, "reward": rewarded}
    make("ppo", ppo(steps=2, snapshot_steps=1), Path("results/tracked/ppo/manifest.json"), **inputs)
    wandb.finish()
    folder, end = next(Path("results/wandb/wandb").glob("offline-run-*-ppo-*")), time.monotonic() + 30
    written = b""
    while b"train/explained_variance" not in written and time.monotonic() < end:  # wandb's own process writes it
        time.sleep(0.1)
        written = b"".join(file.read_bytes() for file in folder.glob("*.wandb"))
    assert b"train/explained_variance" in written and b"train/no_such_figure" not in written

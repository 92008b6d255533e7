"""kill -9 at random moments, in processes of their own: the artifact has the bytes of the uninterrupted run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import ROOT, dpo, make, ppo, reward

pytestmark = pytest.mark.slow
SECTIONS = {
    "reward": reward(steps=30, dropout=0.1, micro_batch_size=4, eval_steps=4, checkpoint_steps=3),
    "dpo": dpo(steps=30, dropout=0.1, micro_batch_size=2, eval_steps=4, checkpoint_steps=3),
    "ppo": ppo(steps=40, snapshot_steps=7),
}


def start(stage: str, output: Path, inputs: dict[str, Path]) -> subprocess.Popen:
    """The stage as the workflow starts it."""
    config = output.parent / "config.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(SECTIONS[stage].model_dump(exclude_none=True)))
    flags = [part for role, path in inputs.items() for part in (f"--{role}", str(path))]
    command = [sys.executable, "-m", "posttrain", stage, "--config", str(config), "--output", str(output), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stage", SECTIONS)
def test_killed_at_random_moments(stage, data, base, tuned_policy, rewarded, referenced):
    inputs = {"data": data, "base": base, "sft": tuned_policy}
    inputs |= {"reward": {}, "dpo": {"reference": referenced}, "ppo": {"reward": rewarded}}[stage]
    whole = make(stage, SECTIONS[stage], Path(f"results/unkilled/{stage}/manifest.json"), **inputs)
    output, seed, kills = Path(f"results/killed/{stage}/manifest.json"), time.time_ns(), 0
    chance = random.Random(seed)
    for _ in range(2):
        process = start(stage, output, inputs)
        begun = set(output.parent.glob("checkpoints/*/checkpoint-*"))
        while process.poll() is None and set(output.parent.glob("checkpoints/*/checkpoint-*")) <= begun:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))  # in training, in evaluation, inside the save
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills and not output.exists(), f"control: it was killed before its end (seed {seed})"
    process = start(stage, output, inputs)
    said = process.communicate()[1]
    assert process.returncode == 0 and "continuing" in said, said[-2000:]
    assert json.loads(output.read_text()) == json.loads(whole.read_text()), f"seed {seed}"

"""posttrain spotcheck on a finished training: equal where nothing was altered, and each alteration is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make, ppo, sft

from posttrain.__main__ import main
from posttrain.ground.files import manifest_of, read_json, sha256, write_json
from posttrain.jobs import provenance
from posttrain.training import parallel, spotchecks


@pytest.fixture(autouse=True)
def own_settings(monkeypatch):
    """What a spot-check sets for its process ends with the test."""
    for module, name in ((parallel, "fits"), (parallel, "sharded"), (spotchecks, "wanted")):
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.fixture(scope="module")
def trained(data, base) -> Path:
    """A fine-tuning with dropout and two stored states."""
    spotchecks.wanted = 2
    section = sft(method="qlora", dropout=0.1, steps=12, log_steps=2, checkpoint_steps=None)
    made = make("sft", section, Path("results/spot/sft/manifest.json"), data=data, base=base)
    spotchecks.wanted = 0
    return made.parent


@pytest.fixture
def copy(trained) -> Path:
    """A copy of it, to be altered."""
    folder = Path("results/altered/sft")
    shutil.rmtree(folder.parent, ignore_errors=True)
    return Path(shutil.copytree(trained, folder))


def sign(folder: Path) -> None:
    """Make manifests and record agree with what the files of an artifact are now, as who alters them would."""
    states, manifest = folder / spotchecks.FOLDER, folder / "manifest.json"
    if states.is_dir():
        parts = [part.name for part in states.glob("[0-9]*")]
        write_json(folder / spotchecks.MANIFEST, manifest_of(states, parts))
    parts = sorted({name.partition("/")[0] for name in read_json(manifest)["files"]})
    write_json(manifest, manifest_of(folder, parts))
    record = read_json(folder / "provenance.json")
    record["beside"] = {name: sha256(folder / name) for name in record["beside"]}
    write_json(folder / "provenance.json", record)


def spotcheck(capsys, artifact: str, *options: str) -> tuple[int, str]:
    code = main(["spotcheck", artifact, *options])
    output = capsys.readouterr()
    return code, output.err + output.out


def test_an_unaltered_training_is_equal_to_the_byte(trained, capsys):
    before = {file: sha256(file) for file in trained.rglob("*") if file.is_file()}
    code, text = spotcheck(capsys, "spot/sft", "--place", "2", "0")
    last = spotchecks.complete(trained / spotchecks.FOLDER)[1]
    assert code == 0 and text.count("equal to the byte: grad_norm, learning_rate, loss") == 2, text
    assert text.count("loss, weights, optimizer\n") == 1
    assert f"step {last + 1}, from the state stored after step {last} (place 2 of 2)" in text
    assert f"the published curve up to step {last // 2 * 2}, by the stored state" in text
    assert "a check of 1 of 2 places misses it with a probability of at most 0.9 for 10%, 0.5 for 50%" in text
    assert "% of the recorded" in text and text.rstrip().endswith("agrees")
    assert before == {file: sha256(file) for file in trained.rglob("*") if file.is_file()}, "nothing is touched"


def flip(tensor: torch.Tensor) -> None:
    """Flip the lowest bit of its largest number."""
    tensor.view(-1).view(torch.int32)[tensor.abs().argmax()] ^= 1


def first(states: Path, end: str) -> Path:
    """A file of the first place."""
    return Path(f"{states}/{spotchecks.name_of(spotchecks.complete(states)[0])}{end}")


def of_weights(states: Path) -> None:
    file = first(states, "/adapter_model.safetensors")
    weights = load_file(file)
    flip(next(iter(weights.values())))
    save_file(weights, file, metadata={"format": "pt"})


def of_optimizer(states: Path) -> None:
    file = first(states, "/optimizer.pt")
    state = torch.load(file, weights_only=True)
    flip(max((moments["exp_avg"] for moments in state["state"].values()), key=lambda moment: moment.abs().max()))
    torch.save(state, file)


def of_loss(states: Path) -> None:
    file = first(states, ".json")
    content = read_json(file)
    content["steps"][0]["loss"] += 1e-6
    write_json(file, content)


def of_curve(states: Path) -> None:
    metrics = read_json(states.parent / "metrics.json")
    metrics["history"][0]["loss"] -= 1e-6
    write_json(states.parent / "metrics.json", metrics)


class Code:
    """Creates the file `ran` when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def of_code(states: Path) -> None:
    torch.save({"state": Code()}, first(states, "/optimizer.pt"))


@pytest.mark.parametrize(
    ("alter", "named"),
    [(of_weights, "weights after the last step: sha256"), (of_optimizer, "optimizer after the last step: sha256"),
     (of_loss, "differs: step 4: loss"), (of_curve, "differs: the published curve: step 2: loss"),
     (of_code, "does not go on from the stored state")],
)  # fmt: skip
def test_an_altered_artifact_is_noticed(copy, capsys, alter, named):
    """Also by who makes the manifests anew; otherwise the byte is noticed before anything is replayed."""
    alter(copy / spotchecks.FOLDER)
    assert (unsigned := spotcheck(capsys, "altered/sft", "--place", "1"))[0] == 1 and "bytes" in unsigned[1], unsigned
    sign(copy)
    code, text = spotcheck(capsys, "altered/sft", "--place", "1")
    assert code == 1 and named in text and text.rstrip().endswith("differs"), text
    assert not Path("ran").exists(), "code in a state is not run"


def test_another_machine_is_told_and_agrees_within_the_tolerance(copy, capsys, monkeypatch):
    """Its digits are those of a record with another loss, in the seventh digit. On this machine such a record differs
    (`of_loss`), and a wrong loss does on any (tests/unit/test_spotchecks.py)."""
    of_loss(copy / spotchecks.FOLDER)
    sign(copy)
    shape = provenance.shape_of
    monkeypatch.setattr(provenance, "shape_of", lambda section: shape(section) | {"instructions": "AVX9"})
    code, text = spotcheck(capsys, "altered/sft", "--place", "1")
    assert code == 0 and "not as recorded here: instructions" in text and "now AVX9" in text, text
    assert "agrees to 0.001 of each figure" in text and "equal to the byte" not in text


def test_what_cannot_be_checked_is_the_users_to_mend(copy, data, capsys):
    shutil.rmtree(copy / spotchecks.FOLDER)
    code, text = spotcheck(capsys, "altered/sft", "--place", "1")
    assert code == 2 and "--place 1: results/altered/sft has states of 0 places (0: the beginning)" in text
    record = read_json(copy / "provenance.json")
    write_json(copy / "provenance.json", record | {"inputs": {"base": {"results/gone/manifest.json": "x"}}})
    code, text = spotcheck(capsys, "altered/sft")
    assert code == 2 and "results/gone/manifest.json: is not here; it was read as base" in text
    code, text = spotcheck(capsys, "tiny/prepare")
    assert code == 2 and "prepare has neither steps to replay nor answers to compare. Make it again (" in text
    assert spotcheck(capsys, "spot/stf")[0] == 2


def test_a_policy_of_ppo_that_begins_in_the_middle(data, base, tuned_policy, rewarded, capsys):
    spotchecks.wanted = 1
    inputs = {"data": data, "base": base, "sft": tuned_policy, "reward": rewarded}
    folder = make("ppo", ppo(steps=3, snapshot_steps=3), Path("results/spot/ppo/manifest.json"), **inputs).parent
    code, text = spotcheck(capsys, "spot/ppo")
    assert code == 0 and "step 2, from the state stored after step 1 (place 1 of 1)" in text, text
    assert "policy_loss" in text and "the published curve up to step 1, by the stored state" in text
    state = folder / spotchecks.FOLDER / "000001" / "state.json"
    state.write_text(json.dumps(read_json(state) | {"kl_coefficient": 0.5}))
    sign(folder)
    code, text = spotcheck(capsys, "spot/ppo")
    assert code == 1 and "differs: step 2: " in text, text

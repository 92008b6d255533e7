"""Spot-checks: which states are kept, what is published of them, and what the comparison notices."""

import math
import shutil
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest

from posttrain.config.sections import Sft
from posttrain.ground.errors import UserError
from posttrain.ground.files import manifest_of, read_json, verify, write_json
from posttrain.jobs.publishing import publish
from posttrain.maths.intervals import most_differing
from posttrain.tools import asked, replayed
from posttrain.tools.explain import artifacts_of
from posttrain.training import checkpoint, parallel, spotchecks


def section(steps: int, seed: int = 0) -> Sft:
    return Sft(steps=steps, batch_size=4, learning_rate=1e-3, seed=seed)


@pytest.fixture
def three(monkeypatch):
    """Three places are wanted."""
    monkeypatch.setattr(spotchecks, "wanted", 3)


def test_places_are_drawn_one_in_each_part_of_a_training(three):
    for steps in (30, 200, 5001):
        chosen = [spotchecks.stretches(section(steps, seed)) for seed in range(20)]
        of_part = [{stretches[part].after for stretches in chosen} for part in range(3)]
        assert all(len(places) > 5 for places in of_part), "drawn by the seed"
        assert max(of_part[0]) < min(of_part[1]) and max(of_part[1]) < min(of_part[2])
        lengths = {stretch.last - stretch.after for stretches in chosen for stretch in stretches}
        assert lengths == {max(1, round(steps / 200))}
        assert min(of_part[0]) >= 1 and max(stretches[2].last for stretches in chosen) < steps
    assert spotchecks.stretches(section(200, 7)) == spotchecks.stretches(section(200, 7))


@pytest.mark.parametrize(("steps", "count"), [(1, 0), (2, 0), (3, 1), (4, 2), (9, 3)])
def test_a_short_training_has_fewer_places(three, steps, count):
    assert len({stretch.after for stretch in spotchecks.stretches(section(steps))}) == count


def test_by_default_and_with_shared_weights_nothing_is_kept(monkeypatch):
    assert spotchecks.stretches(section(200)) == []
    monkeypatch.setattr(spotchecks, "wanted", 2)
    assert len(spotchecks.stretches(section(200))) == 2, "control"
    monkeypatch.setattr(parallel, "sharded", True)
    assert spotchecks.stretches(section(200)) == []


def test_states_are_kept_when_they_are_whole_and_outlive_their_checkpoints(tmp_path, three):
    """The newest two checkpoints alone stay; one that was being written when the run was killed is not kept."""
    training = section(30)
    first, second, _ = spotchecks.stretches(training)
    for step in range(1, second.after + 1):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text(f"of {step}")
        (folder / "training_args.bin").write_text("a pickle")
        if step < second.after:
            checkpoint.seal(folder)
        spotchecks.keep(training, tmp_path)
    kept = tmp_path / "spotchecks" / spotchecks.name_of(first.after)
    assert [folder.name for folder in (tmp_path / "spotchecks").iterdir()] == [kept.name]
    assert not (tmp_path / f"checkpoint-{first.after}").exists(), "control"
    assert [file.name for file in kept.iterdir()] == ["weights"], "not the trainer's arguments, a pickle"
    checkpoint.seal(tmp_path / f"checkpoint-{second.after}")
    spotchecks.keep(training, tmp_path)  # as the resumed run does before its first step
    assert (tmp_path / "spotchecks" / spotchecks.name_of(second.after)).is_dir()


def kept_of(folder, steps=(3, 8)):
    """What a training keeps, and a state that lacks what followed, in a folder of checkpoints."""
    for step in (*steps, 9):
        state = folder / "spotchecks" / spotchecks.name_of(step)
        state.mkdir(parents=True)
        (state / "weights").write_text(f"of {step}")
        if step in steps:
            write_json(state.with_suffix(".json"), {"after": step, "last": step + 1, "steps": [], "sha256": {}})


def test_complete_places_are_published_with_a_manifest(tmp_path):
    kept_of(tmp_path / "checkpoints")
    (tmp_path / "work").mkdir()
    spotchecks.publish(tmp_path / "checkpoints", tmp_path / "work")
    manifest = tmp_path / "work" / spotchecks.MANIFEST
    assert spotchecks.complete(manifest.parent) == [3, 8] and not (manifest.parent / "000009").exists()
    assert (tmp_path / "checkpoints" / "spotchecks" / "000003" / "weights").exists(), "a killed run begins again"
    verify(manifest)
    (manifest.parent / "000003" / "weights").write_text("of 4")
    with pytest.raises(UserError, match="000003/weights: its bytes differ"):
        verify(manifest)


def test_stored_states_are_taken_for_no_artifact(tmp_path):
    home = tmp_path / "one" / "sft"
    kept_of(tmp_path / "checkpoints")
    home.mkdir(parents=True)
    (home / "manifest.json").write_text("{}")
    spotchecks.publish(tmp_path / "checkpoints", home)
    assert artifacts_of(tmp_path) == ["one/sft"]


def test_a_replaced_artifact_leaves_no_states_behind(tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    kept_of(home)
    (home / "mine").mkdir()
    work.mkdir()
    (work / "manifest.json").write_text("{}")
    publish(work, home)
    assert sorted(part.name for part in home.iterdir()) == ["manifest.json", "mine"]


def test_weights_are_told_apart_by_one_bit_and_by_their_names():
    torch = pytest.importorskip("torch")
    weights = [("a", torch.ones(3)), ("b", torch.zeros(2, dtype=torch.bfloat16))]
    same = [("b", torch.zeros(2, dtype=torch.bfloat16)), ("a", torch.ones(3))]
    assert spotchecks.digest(weights) == spotchecks.digest(same)
    bit = torch.ones(3).view(torch.int32)
    bit[1] += 1
    others = [("a", bit.view(torch.float32)), weights[1]], [("c", weights[0][1]), weights[1]], weights[:1]
    assert len({spotchecks.digest(other) for other in (weights, *others)}) == 4


def test_the_state_of_every_optimizer_is_told_apart():
    """Muon's is that of two optimisers."""
    torch = pytest.importorskip("torch")
    from posttrain.training.optimizer import MuonWithAdamW

    model = torch.nn.Sequential(torch.nn.Embedding(4, 8), torch.nn.Linear(8, 8))
    for optimizer in (torch.optim.AdamW(model.parameters()), MuonWithAdamW(model, 0.1, 0.0)):
        model(torch.tensor([1, 2])).sum().backward()
        empty = spotchecks.digest(spotchecks.tensors(optimizer.state_dict()))
        optimizer.step()
        found = dict(spotchecks.tensors(optimizer.state_dict()))
        before = spotchecks.digest(found.items())
        assert len(found) >= 6 and before != empty
        for name, tensor in found.items():
            tensor.view(-1)[0] += 1
            now = spotchecks.digest(spotchecks.tensors(optimizer.state_dict()))
            assert now != before, name
            before = now


STEPS = [{"step": 5, "loss": 0.5, "grad_norm": 2.0}, {"step": 6, "loss": 0.25, "grad_norm": 1.0}]


@pytest.mark.parametrize(
    ("key", "value", "exact", "close"),
    [("loss", 0.2500001, "step 6: loss 0.25 recorded, 0.2500001 now", None),
     ("grad_norm", 1.01, "step 6: grad_norm 1.0 recorded, 1.01 now", "step 6: grad_norm 1.0 recorded, 1.01 now"),
     ("loss", 0.25, None, None)],
)  # fmt: skip
def test_the_first_figure_that_differs_is_named(key, value, exact, close):
    now = [STEPS[0], STEPS[1] | {key: value}]
    assert replayed.first_difference(STEPS, now, 0.0) == exact
    assert replayed.first_difference(STEPS, now, replayed.TOLERANCE["float32"]) == close
    assert replayed.first_difference(STEPS, now[:1], 0.0) == "2 steps are recorded, 1 were made now"


def test_false_steps_are_missed_no_more_often_than_is_said():
    """Exactly, over all places and all choices among them: 12 steps in 3 parts, of which some are false."""
    parts = [range(0, 4), range(4, 8), range(8, 12)]
    for false in ({0, 1, 2, 3}, {3, 4}, {1, 5, 9}, set(range(11)), {8, 9, 10, 11, 0}):
        shares = [Fraction(len(false & {*part}), 4) for part in parts]
        for replayed_places in (1, 2, 3):
            chosen = list(combinations(shares, replayed_places))
            missed = sum(math.prod(1 - share for share in some) for some in chosen) / len(chosen)
            assert missed <= (1 - Fraction(len(false), 12)) ** replayed_places


@pytest.mark.parametrize(("total", "asked_again"), [(40, 10), (431, 29), (7, 7), (5, 0), (30, 1)])
def test_the_most_questions_that_may_differ(total, asked_again):
    """By counting: x are missed with a chance of at least 5 %, x + 1 with less."""

    def missed(differing: int) -> Fraction:
        return Fraction(math.comb(total - differing, asked_again), math.comb(total, asked_again))

    most = most_differing(total, asked_again)
    assert missed(most) >= Fraction(1, 20)
    assert most == total or missed(most + 1) < Fraction(1, 20)


def sample(number: int, answer: str, score: float, **more) -> dict:
    hashes = dict.fromkeys(asked.HASHES, "x")
    row = {"doc_id": number, "filter": "answer", "metrics": ["exact_match"], "exact_match": score}
    return hashes | row | {"resps": [[answer]], "filtered_resps": [answer]} | more


@pytest.mark.parametrize(
    ("now", "named"),
    [(sample(3, "oslo", 1.0), None),
     (sample(3, "bern", 1.0), 'world question 3: answer [["oslo"]] recorded, [["bern"]] now'),
     (sample(3, "oslo", 0.0), "world question 3: exact_match 1.0 recorded, 0.0 now"),
     (sample(3, "oslo", 1.0, prompt_hash="y"), 'world question 3: prompt_hash "x" recorded, "y" now')],
)  # fmt: skip
def test_the_question_whose_answer_differs_is_named(now, named):
    recorded = {"world": [sample(0, "rome", 1.0), sample(3, "oslo", 1.0)]}
    assert list(asked.differences(recorded, {"world": [now]}, 1e-4)) == ([named] if named else [])


def test_log_likelihoods_may_differ_in_their_last_digits():
    assert asked.same([[-103.026039, False]], [[-103.026041, False]], asked.TOLERANCE["float32"])
    assert not asked.same([[-103.026039, False]], [[-103.126041, False]], asked.TOLERANCE["float32"])
    assert not asked.same([[-103.026039, False]], [[-103.026039, True]], asked.TOLERANCE["float32"])
    assert not asked.same([1.0, 2.0], [1.0], asked.TOLERANCE["float32"])


def test_an_input_that_is_gone_or_another_one_is_named(tmp_path):
    from posttrain.ground.files import sha256
    from posttrain.jobs.recorded import other_inputs

    manifest = tmp_path / "data" / "manifest.json"
    manifest.parent.mkdir()
    (tmp_path / "data" / "rows").write_text("rows")
    write_json(manifest, manifest_of(tmp_path / "data", ["rows"]))
    read = {"data": {str(manifest): sha256(manifest)}, "base": {str(tmp_path / "no"): "x"}}
    assert list(other_inputs(read)) == [f"{tmp_path / 'no'}: is not here; it was read as base"]
    (tmp_path / "data" / "rows").write_text("others")
    assert "data: is damaged; it was read as data" in next(other_inputs(read))
    write_json(manifest, read_json(manifest) | {"note": "another"})
    assert f"{manifest}: is another one now" in next(other_inputs(read))


def test_the_key_is_in_no_identity(root, tmp_path, monkeypatch):
    """Neither in the arguments of a job, which Snakemake compares, nor in what its artifact is identified by."""
    from posttrain.dag import campaign

    monkeypatch.chdir(tmp_path)
    file = Path(shutil.copytree(root / "tests/workflow/mini", "config")) / "config.yaml"
    plans = [campaign.load(file, {"spotchecks": count}) for count in (0, 2)]
    mini = file.with_name("experiments") / "mini.yaml"
    mini.write_text(mini.read_text().replace("steps: 40", "steps: 41"))
    other = campaign.load(file)
    arguments = [
        {artifact: plan.arguments(*artifact) for artifact in plan.artifacts()[:-1]} for plan in (*plans, other)
    ]
    assert arguments[0] == arguments[1] and len(arguments[0]) > 5
    assert arguments[0] != arguments[2], "control"


@pytest.mark.parametrize(
    ("precision", "weights", "type_of_arithmetic"),
    [("float32", "float32", "float32"), ("bfloat16", "float32", "bfloat16"), ("float32", "bfloat16", "bfloat16")],
)
def test_the_tolerance_is_that_of_the_arithmetic(tmp_path, precision, weights, type_of_arithmetic):
    pytest.importorskip("torch")
    from posttrain.jobs.recorded import Recorded, arithmetic

    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "policy.json", {"dtype": weights})
    training = Sft(steps=4, batch_size=4, learning_rate=1e-3, precision=precision)
    recorded = Recorded(tmp_path, "sft", training, {"base": tmp_path / "manifest.json"}, {}, {})
    assert arithmetic(recorded) == type_of_arithmetic
    assert set(replayed.TOLERANCE) == set(asked.TOLERANCE) == {"float32", "bfloat16"}

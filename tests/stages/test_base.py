"""base: from scratch, from a directory; it must have learned, and only safetensors are ever taken."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny import make, scratch

from posttrain.__main__ import main
from posttrain.config.sections import Base
from posttrain.data.packing import blocks
from posttrain.ground.errors import UserError
from posttrain.ground.files import manifest_of, read_json, write_json
from posttrain.models.policy import load_policy, read_contract
from posttrain.stages.base import unigram_perplexity
from posttrain.training import parallel, spotchecks
from posttrain.training.checkpoint import seal


def test_it_learned(base):
    summary = read_json(base.parent / "metrics.json")["summary"]
    assert summary["perplexity"] < 0.9 * summary["unigram_perplexity"]
    assert read_contract(base)["positions"]["type"] == "default"


def test_a_base_that_did_not_learn_is_refused(data, home):
    lazy = Base(scratch=scratch(steps=1, learning_rate=1e-9, learned=0.5))
    with pytest.raises(UserError, match="did not learn"):
        make("base", lazy, Path("results/lazy/base/manifest.json"), data=data)
    assert not Path("results/lazy/base/manifest.json").exists()


def test_same_seed_same_bytes_and_another_seed_others(base, data, home):
    again = make("base", Base(scratch=scratch()), Path("results/again/base/manifest.json"), data=data)
    other = make("base", Base(scratch=scratch(seed=1)), Path("results/other/base/manifest.json"), data=data)
    weights = [read_json(path)["files"]["model/model.safetensors"] for path in (base, again, other)]
    assert weights[0] == weights[1] and weights[0] != weights[2]


def test_a_killed_run_continues_to_the_same_bytes(base, data, home, monkeypatch):
    """Stopped after 20 of 30 steps, with a half-written newer checkpoint beside; control: without the checkpoint's
    optimiser the bytes differ."""
    whole = read_json(base.parent / "manifest.json")["files"]["model/model.safetensors"]
    reference = make(
        "base", Base(scratch=scratch(checkpoint_steps=10)), Path("results/kept/base/manifest.json"), data=data
    )
    assert read_json(reference)["files"]["model/model.safetensors"] == whole, "saving changes nothing"
    for spoil in (False, True):
        output = Path(f"results/killed-{spoil}/base/manifest.json")
        killed = killed_at(20, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            make("base", Base(scratch=scratch(checkpoint_steps=10)), output, data=data)
        killed.undo()
        checkpoint = next(output.parent.glob("checkpoints/*/checkpoint-20"))
        broken = checkpoint.with_name("checkpoint-21")
        broken.mkdir()
        (broken / "model.safetensors").write_bytes(b"half")
        if spoil:
            other = checkpoint.with_name("checkpoint-10")
            shutil.copy(other / "optimizer.pt", checkpoint / "optimizer.pt")
            seal(checkpoint)
        make("base", Base(scratch=scratch(checkpoint_steps=10)), output, data=data)
        same = read_json(output)["files"]["model/model.safetensors"] == whole
        assert same is not spoil
        assert not list(output.parent.glob("checkpoints/*/*")), "checkpoints go when the artifact is there"


def test_a_killed_run_leaves_the_same_curve(data, home, monkeypatch):
    """Checkpoints fall between logged steps here; the manifest, which covers the curve, is the same all the same."""
    section = Base(scratch=scratch(checkpoint_steps=4, log_steps=10))
    whole = make("base", section, Path("results/curve/base/manifest.json"), data=data)
    output = Path("results/curve-killed/base/manifest.json")
    killed = killed_at(17, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make("base", section, output, data=data)
    killed.undo()
    make("base", section, output, data=data)
    assert output.read_bytes() == whole.read_bytes()


def killed_at(step: int, monkeypatch):
    """Interrupt training as a signal would, once, after a step."""
    from posttrain.training.trainers import Progress

    original = Progress.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step + 1:
            raise KeyboardInterrupt
        return original(self, args, state, control, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr(Progress, "on_step_end", on_step_end)
    return patch


def test_alibi_has_no_positions_to_run_out_of(data, home):
    manifest = make(
        "base", Base(scratch=scratch(positions="alibi")), Path("results/alibi/base/manifest.json"), data=data
    )
    model, tokenizer = load_policy(manifest)
    assert model.config.model_type == "bloom"
    ids = tokenizer("one two three " * 120, return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()


def test_an_existing_model_is_taken_as_it_is(base, data, home):
    manifest = make("base", Base(path=str(base.parent / "model")), Path("results/given/base/manifest.json"), data=data)
    files = [read_json(path)["files"]["model/model.safetensors"]["sha256"] for path in (base, manifest)]
    assert files[0] == files[1]


def test_pickled_weights_are_refused(base, data, home, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(base.parent / "model/config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"no model\.safetensors.*pytorch_model\.bin"):
        make("base", Base(path=str(folder)), Path("results/pickled/base/manifest.json"), data=data)


def test_a_folder_without_a_model_is_named(data, home, tmp_path):
    with pytest.raises(UserError, match=r"base\.path.*no config\.json"):
        make("base", Base(path=str(tmp_path)), Path("results/none/base/manifest.json"), data=data)


def test_a_changed_input_is_found_before_anything_is_built_on_it(data, home, tmp_path):
    copied = tmp_path / "prepare"
    shutil.copytree(data.parent, copied)
    target = copied / "data/text/train.jsonl"
    flipped = bytearray(target.read_bytes())
    flipped[100] ^= 1
    target.write_bytes(flipped)
    with pytest.raises(UserError, match=r"train\.jsonl: its bytes differ"):
        make("base", Base(scratch=scratch()), tmp_path / "x/base/manifest.json", data=copied / "manifest.json")


def test_blocks_and_the_unigram():
    class Tokenizer:
        bos_token_id, eos_token_id = 0, 9

    made = blocks(Tokenizer(), [[1, 2, 3], [4, 5]], 3)
    assert [block["input_ids"] for block in made] == [[0, 1, 2], [0, 3, 9], [0, 4, 5]]
    Tokenizer.bos_token_id = None
    assert blocks(Tokenizer(), [[1, 2, 3]], 3)[0]["input_ids"] == [9, 1, 2]
    with pytest.raises(UserError, match="fewer than one context"):
        blocks(Tokenizer(), [[1]], 9)
    one = [{"input_ids": [0, 1, 1, 2, 2]}]
    assert unigram_perplexity(one, one) == pytest.approx(2.0), "the first token is never predicted"


@pytest.mark.parametrize("spoil", [False, True])
def test_muon_and_locality_continue_to_the_same_bytes(data, home, monkeypatch, spoil):
    """The default base's optimiser and start; control: without Muon's momentum the bytes differ."""
    from posttrain.training.optimizer import MuonWithAdamW

    section = Base(scratch=scratch(optimizer="muon", locality=1.5, checkpoint_steps=10))
    for module, key, value in ((spotchecks, "wanted", 1), (parallel, "fits", None)):
        monkeypatch.setattr(module, key, value)
    whole = make("base", section, Path("results/muon/base/manifest.json"), data=data)
    assert spoil or main(["spotcheck", "muon/base"]) == 0
    output = Path(f"results/muon-killed-{spoil}/base/manifest.json")
    killed = killed_at(20, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make("base", section, output, data=data)
    killed.undo()
    if spoil:
        monkeypatch.setattr(MuonWithAdamW, "load_state_dict", lambda self, state: None)
    make("base", section, output, data=data)
    name = "model/model.safetensors"
    assert (read_json(output)["files"][name] == read_json(whole)["files"][name]) is not spoil


def test_heads_begin_by_looking_one_token_back():
    """The untrained score of two tokens is highest at distance 1, wherever they stand; control: without the start."""
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain.config.sections import Scratch
    from posttrain.stages.base import architecture, look_back

    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

        def __len__(self):
            return 64

    section = Scratch(locality=2.0, layers=2)
    shares = []
    for strength in (0.0, 2.0):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(architecture(section, Tokenizer()), attn_implementation="eager")
        look_back(model, strength)
        seen = model(torch.randint(3, 64, (1, 40)), output_attentions=True).attentions[0][0, 0]
        shares.append(seen.diagonal(-1)[5:].mean().item())
    assert shares[1] > 4 * shares[0] and shares[1] > 0.25


def cut(folder):
    """The last bytes of the weights did not arrive."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def without_a_layer(folder):
    from safetensors.torch import load_file, save_file

    kept = {key: weight for key, weight in load_file(folder / "model.safetensors").items() if "layers.0.mlp" not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def configured(**changes):
    def change(folder):
        config = read_json(folder / "config.json") | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "not fully covered"),
        (empty, "cannot be loaded"),
        (without_a_layer, "3 weights are missing, among them model.layers.0.mlp"),
        (configured(intermediate_size=128), "of another shape"),
        (configured(model_type="nobody"), "cannot be loaded"),
        (configured(model_type="vit"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
            "no model.safetensors",
        ),
    ],
)
def test_a_damaged_model_is_refused_before_anything_is_built_on_it(base, data, home, tmp_path, damage, words):
    """transformers would fill what is missing with random numbers, or fail hours later with a traceback."""
    folder = tmp_path / "model"
    shutil.copytree(base.parent / "model", folder)
    damage(folder)
    output = tmp_path / "out/base/manifest.json"
    with pytest.raises(UserError, match=words) as caught:
        make("base", Base(path=str(folder)), output, data=data)
    assert str(folder) in str(caught.value) and not output.exists()


def test_weights_without_a_place_are_named(base, data, home, tmp_path, capfd):
    folder = tmp_path / "model"
    shutil.copytree(base.parent / "model", folder)
    configured(tie_word_embeddings=True, num_hidden_layers=0)(folder)
    make("base", Base(path=str(folder)), tmp_path / "out/base/manifest.json", data=data)
    assert re.search(r"does not use \d+ weights of .*, among them model\.layers\.0\.", capfd.readouterr().err)


def test_another_stages_manifest_is_told_in_words(base, data, home, tmp_path):
    output = tmp_path / "out/base/manifest.json"
    with pytest.raises(UserError, match="is not a manifest of prepared data"):
        make("base", Base(scratch=scratch()), output, data=base)


@pytest.mark.parametrize("side", ["train", "test"])
def test_text_that_is_not_there_is_named(data, home, tmp_path, side):
    """A single document leaves nothing to hold out."""
    copied = tmp_path / "prepare"
    shutil.copytree(data.parent, copied)
    (copied / f"data/text/{side}.jsonl").unlink()
    write_json(copied / "manifest.json", manifest_of(copied, ["data"]))
    with pytest.raises(UserError, match=rf"text/{side}\.jsonl: does not exist: the prepared data has no such rows"):
        make("base", Base(scratch=scratch()), tmp_path / "out/base/manifest.json", data=copied / "manifest.json")

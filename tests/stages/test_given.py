"""Models that were made elsewhere, as `base` takes them: which files, which part, which settings."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import tokenizer_of
from safetensors.torch import load_file
from tiny import make, sft
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from posttrain.config.sections import Base, Lengths, Passkey, Prepare, Source, Tokenizer
from posttrain.config.sources import own_files
from posttrain.evaluation import passkey
from posttrain.ground.errors import Interrupted, UserError
from posttrain.ground.files import read_json, read_jsonl
from posttrain.models.policy import load_policy
from posttrain.resources import architecture
from posttrain.tools.export import export
from posttrain.training import interruption

SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256, vocab_size=512, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)  # fmt: skip
SEEING = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)  # fmt: skip


def save(folder: Path, kind: str = "llama", **settings) -> Path:
    """A tiny random model; its weights in several files."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder, max_shard_size="200KB")
    return folder


def save_multimodal(folder: Path, kind: str) -> Path:
    """A tiny random model that sees and reads."""
    parts = AutoConfig.for_model(kind)
    text = {key: value for key, value in SMALL.items() if hasattr(parts.text_config, key)}
    seeing = {key: value for key, value in SEEING.items() if hasattr(parts.vision_config, key)}
    text, seeing = (
        part | {"model_type": of.model_type} for part, of in ((text, parts.text_config), (seeing, parts.vision_config))
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config=text, vision_config=seeing)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def taken(folder: Path, data: Path) -> Path:
    """The artifact of `base` for a folder."""
    return make("base", Base(path=str(folder)), folder.with_name(f"{folder.name}-base") / "manifest.json", data=data)


def logits(model) -> torch.Tensor:
    ids = torch.arange(10, 42).reshape(2, 16)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def changed(file: Path, **changes) -> None:
    """A JSON file with other values."""
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | changes))


def test_only_what_the_index_names_is_taken(data, tmp_path):
    """An adapter and the same weights in another layout beside the model; control: transformers loads the adapter."""
    import peft

    folder = save(tmp_path / "model")
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(shards) > 1
    alone, counted = logits(AutoModelForCausalLM.from_pretrained(folder)), architecture.in_folder(folder).counted
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).save_pretrained(folder)
    shutil.copy(folder / shards[0], folder / "consolidated.safetensors")
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder)), alone, atol=1e-3), "the control"
    manifest = taken(folder, data)
    assert torch.equal(logits(load_policy(manifest)[0]), alone)
    there = {file.name for file in (manifest.parent / "model").iterdir()}
    assert {name for name in there if name.endswith(".safetensors")} == set(shards)
    assert "adapter_config.json" not in there
    size = sum((folder / name).stat().st_size for name in shards) / 1e6
    assert read_json(manifest.parent / "metrics.json")["summary"]["weights_mb"] == round(size, 1)
    hashed = {file.name for _, file in own_files("base", Base(path=str(folder)))}
    assert hashed == {"config.json", "generation_config.json", "model.safetensors.index.json", *shards}
    assert architecture.in_folder(folder).counted == counted


def test_a_file_that_config_names_is_taken_instead(data, tmp_path):
    folder, other = save(tmp_path / "model"), save(tmp_path / "other", initializer_range=0.1)
    AutoModelForCausalLM.from_pretrained(other).save_pretrained(other)
    (other / "model.safetensors").rename(folder / "chosen.safetensors")
    changed(folder / "config.json", transformers_weights="chosen.safetensors")
    manifest = taken(folder, data)
    assert sorted(file.name for file in manifest.parent.glob("model/*.safetensors")) == ["chosen.safetensors"]
    assert torch.equal(logits(load_policy(manifest)[0]), logits(AutoModelForCausalLM.from_pretrained(folder)))


@pytest.mark.parametrize(
    ("name", "words"), [("gone.safetensors", "there is no file gone"), ("../x.safetensors", "not a file of this")]
)
def test_a_file_that_cannot_be_taken_is_named(data, tmp_path, name, words):
    folder = save(tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    changed(index, weight_map=json.loads(index.read_text())["weight_map"] | {"model.norm.weight": name})
    with pytest.raises(UserError, match=words):
        taken(folder, data)


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [("llama", "sdpa"), ("gemma2", "eager"), ("gpt_neo", "eager"), ("gptj", "eager"), ("falcon", "sdpa")],
)
def test_transformers_chooses_the_attention(data, tmp_path, kind, implementation):
    """Gemma 2, GPT-Neo and GPT-J have no fused attention; Falcon's ALiBi is wrong in any other (transformers 5.23)."""
    other = {
        "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
        "gptj": dict(rotary_dim=8),
        "gemma2": dict(head_dim=16),
    }
    model, _ = load_policy(taken(save(tmp_path / kind, kind, **other.get(kind, {})), data))
    assert model.config._attn_implementation == implementation
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("kind", ["gemma3", "llava", "mistral3", "internvl", "idefics3", "llama4"])
def test_the_text_part_of_a_multimodal_model_is_taken(data, tmp_path, kind):
    """It computes what the whole model computes for text; control: other weights do not."""
    folder = save_multimodal(tmp_path / kind, kind)
    manifest = taken(folder, data)
    whole, text = AutoModelForImageTextToText.from_pretrained(folder), load_policy(manifest)[0]
    assert type(text).__name__.endswith("ForCausalLM")
    assert torch.allclose(logits(text), logits(whole), atol=1e-5)
    text.model.layers[0].self_attn.o_proj.weight.data *= 2
    assert not torch.allclose(logits(text), logits(whole), atol=1e-5), "the control"
    left_out = read_json(manifest.parent / "metrics.json")["changes"]["weights left out"]
    assert sum(left_out.values()) > 10 and "language_model" not in left_out


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda part: part.pop("language_model.model.norm.weight"), "1 weights are missing, among them model.norm"),
        (lambda part: part.update({"language_model.model.more": torch.ones(2)}), "not those of this architecture"),
    ],
)
def test_a_text_part_that_does_not_fit_is_refused(data, tmp_path, edit, words):
    from safetensors.torch import load_file, save_file

    folder = save_multimodal(tmp_path / "gemma3", "gemma3")
    part = load_file(folder / "model.safetensors")
    edit(part)
    save_file(part, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=words):
        taken(folder, data)


def test_settings_of_sampling_do_not_stop_a_full_fine_tuning(data, tmp_path):
    """transformers refuses to save them, after training; control: with them it still does."""
    folder = save(tmp_path / "model", vocab_size=1024)
    changed(folder / "generation_config.json", temperature=0.6, top_p=0.9, max_length=100, pad_token_id=0)
    control = AutoModelForCausalLM.from_pretrained(folder)
    control.generation_config.pad_token_id = 3
    with pytest.raises(ValueError, match="temperature"):
        control.save_pretrained(tmp_path / "control")
    manifest = taken(folder, data)
    assert read_json(manifest.parent / "metrics.json")["changes"]["generation settings left out"] == {
        "temperature": 0.6,
        "top_p": 0.9,
    }
    policy = make("sft", sft(method="full", steps=1), tmp_path / "sft/manifest.json", data=data, base=manifest)
    assert read_json(policy.parent / "model/generation_config.json")["max_length"] == 100


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"temperature": 0.6, "do_sample": True, "top_k": 20}, []),
        ({"top_p": 0.9, "top_k": 50, "eos_token_id": [2, 3]}, ["top_p"]),
        ({"early_stopping": True, "num_beams": 4, "length_penalty": 2.0}, []),
        ({"early_stopping": True, "num_return_sequences": 3}, ["early_stopping", "num_return_sequences"]),
        ({"output_scores": True, "own": 1}, ["output_scores"]),
    ],
)
def test_only_settings_without_effect_are_left_out(tmp_path, settings, left_out):
    from posttrain.data.given import copy_generation_settings

    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir(), folder.mkdir()
    changed(source / "generation_config.json", **settings)
    assert sorted(copy_generation_settings(source, folder)) == left_out
    kept = read_json(folder / "generation_config.json")
    assert kept == {key: value for key, value in settings.items() if key not in left_out}


def test_a_tokenizer_of_other_tokens_than_the_models_is_refused(data, base, tmp_path, capfd):
    """Its numbers would be other words to the model. One that differs in a token is told; control: the model's own."""
    tokenizer = AutoTokenizer.from_pretrained(base.parent / "model")
    for name in ("own", "corrected", "other"):
        shutil.copytree(base.parent / "model", tmp_path / name)
    file = tmp_path / "corrected/tokenizer.json"
    file.write_text(file.read_text().replace("<|tool|>", "<|spare|>"))
    tokenizer_of("qwen2.5").save_pretrained(tmp_path / "other")
    taken(tmp_path / "own", data)
    assert "prepare.tokenizer" not in capfd.readouterr().err
    taken(tmp_path / "corrected", data)
    told = f"1 of {len(tokenizer)} tokens of prepare.tokenizer are others in the tokenizer of {tmp_path / 'corrected'}"
    assert f"warning: {told}: '<|tool|>'" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"of prepare\.tokenizer are others in the tokenizer of .*other, among"):
        taken(tmp_path / "other", data)


def test_what_is_exported_ends_its_turns_as_it_was_trained(data, base, tmp_path):
    """transformers alone stops at `prepare.end_of_turn`; control: without it, at the base's own end of sequence."""
    template = tmp_path / "chat.jinja"
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "who is it ?"}, {"role": "assistant", "content": "it is me ."}]
    rows.write_text("".join(json.dumps({"id": str(n), "messages": turns}) + "\n" for n in range(2)))
    for name, end, key in (("own", "<|end|>", None), ("given", "<|tool|>", "<|tool|>")):
        template.write_text(
            "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '" + end + "' }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        section = Prepare(
            sft=[Source(path=str(rows), use="train")],
            tokenizer=Tokenizer(path=str(base.parent / "model")),
            chat_template=str(template),
            end_of_turn=key,
            max_tokens=128,
        )
        prepared = make("prepare", section, tmp_path / name / "prepare/manifest.json")
        section = Base(path=str(base.parent / "model"))
        manifest = make("base", section, tmp_path / name / "base/manifest.json", data=prepared)
        export(manifest, tmp_path / name / "out")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name / "out")
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name / "out")
        assert exported.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(end)
        assert tokenizer.eos_token == end


def test_a_part_of_a_fused_matrix_is_trained_alone_also_after_an_interruption(data, tmp_path, monkeypatch):
    """Keys of GPT-NeoX stay, although B's other rows move and decay."""
    manifest = taken(save(tmp_path / "model", "gpt_neox"), data)
    section = sft(method="qlora", fused_parts=["query", "value"], steps=3, weight_decay=0.1)
    whole = make("sft", section, tmp_path / "whole/sft/manifest.json", data=data, base=manifest)
    found = iter([interruption.GO_ON, interruption.SAVE, interruption.TERMINATED])
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(interruption, "due", lambda step, saving: next(found, interruption.GO_ON))
        make("sft", section, tmp_path / "stopped/sft/manifest.json", data=data, base=manifest)
    stopped = make("sft", section, tmp_path / "stopped/sft/manifest.json", data=data, base=manifest)
    files = [made.parent / "model/adapter_model.safetensors" for made in (whole, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = [weight for name, weight in load_file(files[0]).items() if "query_key_value.lora_B" in name]
    for query, key, value in (weight.view(4, 3, -1).unbind(1) for weight in rows):
        assert query.any(dim=1).all() and value.any(dim=1).all() and not key.any()
    assert len(rows) == 2


def test_passkeys_are_asked_without_long_documents(data, tmp_path):
    """The reply is the one of the most likely tokens, whatever the model's own settings of sampling say."""
    folder = save(tmp_path / "model", max_position_embeddings=1024)
    changed(folder / "generation_config.json", repetition_penalty=5.0, do_sample=True, temperature=2.0)
    manifest, asked = taken(folder, data), Passkey(questions=2, depths=2)
    section = Lengths(tokens=[768], passkey=asked)
    made = make("lengths", section, tmp_path / "lengths/base/manifest.json", data=data, policy=manifest)
    model, tokenizer = load_policy(manifest)
    found = read_jsonl(made.parent / "data/passkey.jsonl")
    for question, row in zip(passkey.questions(asked, tokenizer, 768), found, strict=True):
        ids = question["ids"]
        while len(ids) < 768 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
        said = tokenizer.decode(ids[row["tokens"] :], skip_special_tokens=True)
        assert said.startswith(row["reply"]) and row["reply"]
    rows = read_json(made.parent / "metrics.json")["rows"]
    assert [(row["task"], row["metric"]) for row in rows] == [
        ("landmark_passkey_768", "exact_match"), ("landmark_passkey_768", "k_max"),
        ("landmark_passkey_768_depth_0", "exact_match"), ("landmark_passkey_768_depth_100", "exact_match"),
    ]  # fmt: skip

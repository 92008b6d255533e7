"""What `check` tells of a given base by its config.json and its headers; all mistakes at once, none of them later."""

import json
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from posttrain.dag import campaign, given
from posttrain.ground import weights
from posttrain.ground.errors import UserError
from posttrain.resources import architecture

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
         "intermediate_size": 128, "max_position_embeddings": 256}  # fmt: skip
ROW = json.dumps({"prompt": "a", "completion": "b"}) + "\n"


def model(folder: Path, config: dict, weights: tuple = ("model.embed_tokens.weight",)) -> Path:
    """A folder with a configuration and small weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    save_file({name: numpy.zeros((3, 5), "float32") for name in weights}, folder / "model.safetensors")
    return folder


def problems(folder: Path, tmp_path: Path, **sections) -> list[str]:
    """What `check` says of an experiment on the folder."""
    (tmp_path / "rows.jsonl").write_text(ROW)
    base = {"base": {"path": str(folder)}, "prepare": {"sft": [{"path": str(tmp_path / "rows.jsonl")}]}}
    settings = {**base, **sections}
    settings["prepare"] = base["prepare"] | sections.get("prepare", {})
    (tmp_path / "experiments").mkdir(exist_ok=True)
    (tmp_path / "experiments/one.yaml").write_text(json.dumps(settings))
    (tmp_path / "config.yaml").write_text("experiments: [one]\n")
    try:
        campaign.load(tmp_path / "config.yaml")
    except UserError as error:
        return [problem.partition(": ")[2] for problem in error.problems]
    return []


def test_all_mistakes_are_told_at_once(tmp_path):
    folder = model(tmp_path / "mpt", {"model_type": "mpt", "d_model": 64, "max_seq_len": 128})
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    said = problems(
        folder, tmp_path, sft={"method": "lora", "packing": True}, evaluate={"max_length": 200},
        prepare={"preference": [{"path": str(tmp_path / "pairs.jsonl")}]}, dpo={}, compare={"max_new_tokens": 128},
    )  # fmt: skip
    keys = sorted(problem.partition(":")[0] for problem in said)
    assert keys == ["compare.max_new_tokens", "evaluate.max_length", "prepare.max_tokens", "sft.packing"]
    assert any("512, the default, is longer than the base's context (128)" in problem for problem in said)


def test_what_fits_is_accepted(tmp_path):
    """The control: the same settings on a model with room for them."""
    folder = model(tmp_path / "llama", LLAMA)
    assert problems(folder, tmp_path, sft={"method": "lora", "packing": True}, evaluate={"max_length": 200},
                    prepare={"max_tokens": 256}) == []  # fmt: skip
    assert problems(folder, tmp_path, sft={"method": "prefix"}, prepare={"max_tokens": 64}) == []


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (LLAMA, 256),
        ({"model_type": "gpt2", "n_positions": 1024, "n_ctx": 512}, 1024),
        ({"model_type": "mpt", "max_seq_len": 2048}, 2048),
        ({"model_type": "bloom", "seq_length": 4096}, None),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "max_position_embeddings": 64}}, 64),
        ({"model_type": "unheard-of"}, None),
    ],
)
def test_the_context_is_the_models_own(tmp_path, config, context):
    assert given.in_folder(str(model(tmp_path / "model", config))).context == context


def test_pickles_are_told_before_any_job(tmp_path):
    folder = model(tmp_path / "model", LLAMA)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert problems(folder, tmp_path, prepare={"max_tokens": 64})[0].startswith("base.path: ")


def test_prefix_tuning_that_cannot_run_is_refused(tmp_path):
    folder = model(tmp_path / "mamba", {"model_type": "mamba"})
    assert "PEFT cannot run it" in problems(folder, tmp_path, sft={"method": "prefix"})[0]


def test_a_reward_model_of_a_family_without_a_classifier_is_refused(tmp_path):
    """Control: Llama has one. The table is transformers' own."""
    from transformers.models.auto import modeling_auto

    for kind, refused in (("granite", True), ("llama", False)):
        folder = model(tmp_path / kind, LLAMA | {"model_type": kind})
        told = problems(folder, tmp_path, sft={"method": "qlora"}, reward={}, ppo={"max_new_tokens": 8})
        assert any("no classifier of granite" in problem for problem in told) == refused, told
    language, classifiers = (
        set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        set(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    )
    assert set(given.WITHOUT_CLASSIFIER.split()) == language - classifiers


def test_weights_of_other_parts_do_not_count(tmp_path):
    """Of a multimodal model the text part alone is trained."""
    names = ("model.language_model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.vision_tower.a.weight")
    folder = model(tmp_path / "model", {"model_type": "gemma3", "text_config": LLAMA}, names)
    assert architecture.in_folder(folder).counted == 30


TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512, max_position_embeddings=256,
            bos_token_id=1, eos_token_id=2)  # fmt: skip

LATENT = dict(intermediate_size=128, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8,
              v_head_dim=16, first_k_dense_replace=2, pad_token_id=0)  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj", "opt", "bloom", "mpt", "falcon", "deepseek_v3"])
def test_the_tables_of_families_are_true(kind):
    """Packing and prefix tuning are refused for the families for which they do not work, and for no other."""
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.config.sections import Sft
    from posttrain.models.methods import adapter
    from posttrain.stages.sft import prove_isolation

    torch.manual_seed(0)
    other = {"gptj": {"rotary_dim": 8}, "deepseek_v3": LATENT}.get(kind, {})
    config = AutoConfig.for_model(kind, **TINY, **other)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)

    def works(run, *arguments) -> bool:
        try:
            run(*arguments)
        except (UserError, RuntimeError, ValueError):
            return False
        return True

    def tune():
        ids = torch.arange(5, 25).reshape(2, 10)
        tuned = peft.get_peft_model(model, adapter(Sft(method="prefix", virtual_tokens=4), model))
        tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()

    rows = [{"input_ids": [*range(5, 15)]}, {"input_ids": [*range(30, 50)]}]
    assert works(prove_isolation, model, rows) == (kind not in given.UNPACKED)
    assert works(tune) != given.without_prefix(config.to_dict())


@pytest.mark.parametrize(
    ("named", "wanted", "expected"),
    [
        ({"dtype": "bfloat16"}, None, "bfloat16"),
        ({"torch_dtype": "float16"}, None, "bfloat16"),
        ({"torch_dtype": "float16"}, "float32", "float32"),
        ({"dtype": "float32"}, None, "float32"),
        ({"dtype": None}, None, "float32"),
        ({}, None, "float32"),
        ({"text_config": LLAMA | {"dtype": None}, "dtype": "bfloat16"}, None, "bfloat16"),
        ({"text_config": LLAMA | {"dtype": "float32"}, "dtype": "bfloat16"}, None, "float32"),
    ],
)
def test_the_type_of_frozen_weights(named, wanted, expected):
    """The key, else what the configuration names, of a multimodal model the text part first."""
    assert weights.frozen_dtype(wanted, named) == expected
    assert weights.frozen_dtype(wanted, given.of_values(named, {}).config) == expected

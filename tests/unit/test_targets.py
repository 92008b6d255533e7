"""Target modules are checked against the names of the base's weights, before any job."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_campaign import load, problems

from posttrain.config.sources import hub_items

LLAMA = [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
GPT2 = [f"h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]
BASES = {  # names of matrices, of embeddings, and settings
    "tied": (LLAMA, ["model.embed_tokens"], {"tie_word_embeddings": True}),
    "apart": (LLAMA, ["model.embed_tokens", "lm_head"], {"tie_word_embeddings": False}),
    "gpt2": (GPT2, ["wte"], {}),
}
CHAIN = """
prepare: {sft: [{path: rows.jsonl}], preference: [{path: rows.jsonl}]}
base: {path: MODEL}
sft: {method: lora, target_modules: SFT}
dpo: {target_modules: DPO}
"""


def written(folder, base: str, sft: str, dpo: str = "null", method: str = "lora") -> str:
    """A config on a base of which there are the headers alone; its rows are not read."""
    matrices, embeddings, settings = BASES[base]
    shapes = {f"{name}.weight": (8, 8) for name in matrices} | {f"{name}.weight": (32, 8) for name in embeddings}
    shapes |= {"wpe.weight": (64, 8)} if base == "gpt2" else {"model.layers.0.norm.weight": (8,)}
    model = folder / base
    model.mkdir()
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({"model_type": base, "vocab_size": 32} | settings))
    for file in (model / "tokenizer.json", model / "tokenizer_config.json", folder / "rows.jsonl"):
        file.write_text("{}")
    text = CHAIN.replace("MODEL", str(model)).replace("rows.jsonl", str(folder / "rows.jsonl"))
    return text.replace("lora", method).replace("SFT", sft).replace("DPO", dpo)


@pytest.mark.parametrize(
    ("base", "sft", "dpo", "message"),
    [
        ("tied", "[q_porj]", "null", "sft.target_modules[0]: the base has no q_porj"),
        ("tied", "[q_proj]", "[q_proj, k_proj]", "dpo.target_modules[1]: the base has no k_proj"),
        ("tied", "[q_proj, v_proj]", "[q_proj]", "dpo.target_modules: lacks v_proj, which sft.target_modules has"),
        ("tied", "[embed_tokens]", "null", "sft.target_modules[0]: embed_tokens can get no adapter: it is the out"),
        ("gpt2", "[wte]", "null", "linear layers: c_attn, c_fc, c_proj"),
        ("gpt2", "[lm_head]", "null", "sft.target_modules[0]: lm_head can get no adapter: it is the output embedding"),
        ("apart", "[q_proj, embed_tokens]", "null", "dpo.target_modules: embed_tokens of sft.target_modules is no lin"),
        ("apart", "[q_proj]", "[q_proj, embed_tokens]", "dpo.target_modules[1]: embed_tokens is no linear layer"),
    ],
)
def test_a_wrong_target_is_refused(tmp_path, base, sft, dpo, message):
    assert message in problems(tmp_path, one=written(tmp_path, base, sft, dpo))


@pytest.mark.parametrize(
    ("base", "sft", "dpo", "method"),
    [
        ("tied", "all-linear", "null", "qlora"),
        ("tied", "[q_proj, model.layers.0.mlp.down_proj]", "null", "lora"),
        ("tied", "[q_proj]", "[v_proj, q_proj]", "lora"),
        ("gpt2", "[c_attn, transformer.h.0.mlp.c_fc]", "all-linear", "qlora"),
    ],
)
def test_other_targets_are_allowed(tmp_path, base, sft, dpo, method):
    """Controls; a name with a first part that the checkpoint lacks too."""
    load(tmp_path, one=written(tmp_path, base, sft, dpo, method))


def test_an_embedding_of_its_own_weights_can_be_adapted_where_nothing_starts_from_it(tmp_path):
    text = written(tmp_path, "apart", "[q_proj, embed_tokens]").replace("dpo: {target_modules: null}\n", "")
    load(tmp_path, one=text)


def test_a_base_from_scratch_is_known_by_its_settings(tmp_path):
    text = "prepare: {world: {}}\nbase: {scratch: {positions: alibi}}\nsft: {method: lora, target_modules: [q_proj]}\n"
    assert "the base has no q_proj" in problems(tmp_path, one=text)
    assert "word_embeddings can get no adapter" in problems(tmp_path, one=text.replace("q_proj", "word_embeddings"))
    load(tmp_path, one=text.replace("q_proj", "query_key_value"))


SCRATCH = "prepare: {world: {}}\nbase: {scratch: {layers: 2}}\nsft: {method: lora, SET}\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("layers: [0, 2]", "sft.layers[1]: the base has no layer 2: its 2 layers are 0 to 1"),
        ("layers: [1, 1]", "sft.layers: names 1 twice"),
        ("layers: [0], target_modules: [layers.1.mlp.up_proj]", "up_proj names a layer itself"),
        ("initialization: orthogonal, rank: 3", "sft.initialization: orthogonal needs an even rank, found 3"),
        ("fused_parts: [query, value]", "sft.fused_parts: llama has no matrix of queries, keys and values whose rows"),
        ("initialization: pissa_niter_4", "sft.initialization: 'pissa_niter_4' is refused: it rewrites the base's"),
        ("initialization: EVA", "sft.initialization: 'EVA' is refused: it is fitted to the training data"),
        ("initialization: kaming", "it should be 'gaussian' or 'orthogonal'"),
    ],
)
def test_a_wrong_layer_or_start_is_refused(tmp_path, settings, message):
    assert message in problems(tmp_path, one=SCRATCH.replace("SET", settings))


@pytest.mark.parametrize("settings", ["layers: [0, 1]", "initialization: orthogonal", "layers: [1], rank: 3"])
def test_other_layers_and_starts_are_allowed(tmp_path, settings):
    """Controls."""
    load(tmp_path, one=SCRATCH.replace("SET", settings))


def test_an_orthogonal_start_needs_weights_in_float32(tmp_path):
    text = SCRATCH.replace("SET", "initialization: orthogonal")
    for other in (text.replace("lora", "qlora"), text.replace("base: {", "base: {dtype: bfloat16, ")):
        assert "sft.initialization: orthogonal needs weights in float32" in problems(tmp_path, one=other)


def test_dora_needs_weights_in_float32(tmp_path):
    text = SCRATCH.replace("SET", "dora: true")
    load(tmp_path, one=text)
    assert "sft.dora: needs weights in float32" in problems(
        tmp_path, one=text.replace("base: {", "base: {dtype: bfloat16, ")
    )


def test_parts_of_a_fused_matrix_need_one_whose_other_rows_stay(tmp_path):
    text = SCRATCH.replace("{layers", "{positions: alibi, layers").replace("SET", "fused_parts: [query, value]SET")
    load(tmp_path, one=text.replace("SET", ", target_modules: [query_key_value, dense]"))
    for more, message in (
        (", target_modules: [dense]", "has no effect: sft.target_modules lacks query_key_value"),
        (", dora: true", "cannot be combined with dora"),
        (", initialization: orthogonal", "cannot be combined with initialization: orthogonal"),
        (", method: full", "has no effect with method: full"),
    ):
        other = text.replace("method: lora, ", "") if "method" in more else text
        assert f"sft.fused_parts: {message}" in problems(tmp_path, one=other.replace("SET", more))


def test_a_model_on_the_hub_is_known_by_its_shapes(tmp_path, monkeypatch):
    """As `posttrain fetch --shapes` wrote them; without them nothing is said (control)."""
    monkeypatch.chdir(tmp_path)
    text = "prepare: {sft: [{path: rows.jsonl}]}\nbase: {hub: {id: a/b, revision: REV}}\n".replace("REV", "a" * 40)
    text += "sft: {method: lora, target_modules: [q_porj]}\n"
    (tmp_path / "rows.jsonl").write_text("{}")
    plan = load(tmp_path, one=text)
    (item,) = hub_items(plan.experiments["one"].base)
    shapes = tmp_path / "results/fetch" / item / "shapes.json"
    shapes.parent.mkdir(parents=True)
    content = {"config": {"vocab_size": 32}, "weights": {f"{name}.weight": [8, 8] for name in LLAMA}}
    shapes.write_text(json.dumps(content))
    assert "sft.target_modules[0]: the base has no q_porj" in problems(tmp_path, one=text)

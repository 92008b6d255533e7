"""A longer context on RoPE that is rescaled already: the frequencies of training are those that are rescaled."""

import json
import math

import pytest
import rope as papers
import torch
from huggingface_hub.errors import StrictDataclassError
from test_campaign import load, problems
from transformers import AutoConfig, LlamaConfig, LlamaModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from posttrain.ground.errors import UserError
from posttrain.maths import rope
from posttrain.models import positions

WIDTH, THETA, TRAINED = 16, 500.0, 64
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=TRAINED)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=TRAINED)  # fmt: skip
LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[1.0 + n for n in range(8)],
                original_max_position_embeddings=TRAINED)  # fmt: skip


def config(**parameters) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, vocab_size=8,
        max_position_embeddings=4 * TRAINED, rope_parameters={"rope_theta": THETA} | parameters,
    )  # fmt: skip


def before_and_after(method: str, times: float, **parameters):
    """Llama's modules of rotations, and the configuration after it was extended."""
    own, longer = config(**parameters), config(**parameters)
    positions.rescale(longer, method, times)
    assert longer.max_position_embeddings == round(4 * TRAINED * times)
    return LlamaModel(own).rotary_emb, LlamaModel(longer).rotary_emb, longer


def test_interpolation_twice_is_interpolation_by_the_product():
    own, longer, _ = before_and_after("linear", 2.0, rope_type="linear", factor=4.0)
    assert torch.allclose(longer.inv_freq, own.inv_freq / 2)
    assert torch.allclose(longer.inv_freq, papers.frequencies(WIDTH, THETA) / 8)


def test_yarn_is_extended_on_the_trained_context():
    own, longer, changed = before_and_after("yarn", 2.0, **YARN)
    assert torch.allclose(longer.inv_freq, papers.yarn(WIDTH, THETA, 8.0, TRAINED))
    assert longer.attention_scaling == pytest.approx(papers.yarn_temperature(8.0))
    assert not torch.allclose(own.inv_freq, longer.inv_freq), "control"
    assert changed.rope_parameters["original_max_position_embeddings"] == TRAINED


def test_llama3_keeps_fast_planes_and_interpolates_slow_ones():
    """A slow plane sees, at m s, the angle that it saw at m; and no plane turns faster than before."""
    own, longer, _ = before_and_after("yarn", 2.0, **LLAMA3)
    turns = TRAINED / (2 * math.pi / papers.frequencies(WIDTH, THETA))
    fast, slow = turns > 4, turns < 1
    assert fast.any() and slow.any() and (~fast & ~slow).any()
    assert torch.equal(own.inv_freq[fast], longer.inv_freq[fast])
    assert torch.allclose(own.inv_freq[slow] / 2, longer.inv_freq[slow])
    between = (own.inv_freq / longer.inv_freq)[~fast & ~slow]
    assert ((between > 1) & (between < 2)).all()


@pytest.mark.parametrize("kind", ["default", "linear"])
def test_ntk_slows_the_slowest_plane_by_the_factor_and_no_other_as_much(kind):
    """A larger base, and twice by the product, on frequencies that are interpolated already too."""
    own, longer, changed = before_and_after(
        "ntk", 2.0, rope_type=kind, **(dict(factor=4.0) if kind == "linear" else {})
    )
    expected = papers.frequencies(WIDTH, THETA * 2.0 ** (WIDTH / (WIDTH - 2))) / (4 if kind == "linear" else 1)
    assert torch.allclose(longer.inv_freq, expected)
    assert longer.inv_freq[0] == own.inv_freq[0] and torch.allclose(longer.inv_freq[-1], own.inv_freq[-1] / 2)
    assert not torch.allclose(longer.inv_freq[1:-1], own.inv_freq[1:-1] / 2, rtol=0.05), "control: not interpolation"
    positions.rescale(changed, "ntk", 3.0)
    once = config(rope_type=kind, **(dict(factor=4.0) if kind == "linear" else {}))
    positions.rescale(once, "ntk", 6.0)
    assert changed.rope_parameters == pytest.approx(once.rope_parameters)


@pytest.mark.parametrize(("family", "width", "sizes"), [
    ("gpt_neox", 4, dict(rope_parameters=dict(rope_type="default", rope_theta=THETA, partial_rotary_factor=0.25))),
    ("deepseek_v3", 8, dict(qk_rope_head_dim=8, head_dim=8)),
    ("jetmoe", 32, dict(kv_channels=32)),
    ("phi3", WIDTH, dict(pad_token_id=0)),
])  # fmt: skip
def test_ntk_counts_the_width_that_turns(family, width, sizes):
    own = AutoConfig.for_model(family, hidden_size=4 * WIDTH, num_attention_heads=4, **sizes)
    theta = own.rope_parameters["rope_theta"]
    positions.rescale(own, "ntk", 4.0)
    assert own.rope_parameters["rope_theta"] == pytest.approx(theta * 4.0 ** (width / (width - 2)))
    assert own.rope_parameters["rope_type"] == "default"


def test_longrope_keeps_short_texts_and_its_temperature():
    own, longer, _ = before_and_after("linear", 2.0, **LONGROPE)
    for length, times in ((TRAINED, 1), (TRAINED + 1, 2)):
        for module in (own, longer):
            module(torch.zeros(1, length, 4 * WIDTH), torch.arange(length)[None])
        assert torch.allclose(own.inv_freq / times, longer.inv_freq), length
    assert own.attention_scaling == longer.attention_scaling != 1
    untouched, unchanged, _ = before_and_after("none", 2.0, **LONGROPE)
    assert untouched.attention_scaling == unchanged.attention_scaling


@pytest.mark.parametrize("parameters", [dict(rope_type="default"), YARN, LLAMA3, dict(rope_type="linear", factor=4.0)])
def test_none_leaves_the_frequencies(parameters):
    own, longer, _ = before_and_after("none", 2.0, **parameters)
    assert torch.equal(own.inv_freq, longer.inv_freq) and own.attention_scaling == longer.attention_scaling


def test_interpolation_of_phi_3_and_of_a_head_without_a_width():
    """Phi-3 accepts longrope only; of Mixtral, transformers reads the width of a head from where none is."""
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    sizes = dict(hidden_size=4 * WIDTH, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=TRAINED)
    phi = AutoConfig.for_model(
        "phi3", **sizes, pad_token_id=0, rope_parameters=dict(rope_type="default", rope_theta=THETA)
    )
    own, longer = Phi3RotaryEmbedding(phi), None
    positions.rescale(phi, "linear", 4.0)
    longer = Phi3RotaryEmbedding(AutoConfig.for_model(**phi.to_dict()))
    for length in (TRAINED, 3 * TRAINED):
        longer(torch.zeros(1, length, 4 * WIDTH), torch.arange(length)[None])
        assert torch.allclose(longer.inv_freq, own.inv_freq / 4) and longer.attention_scaling == 1
    for method in ("yarn", "dynamic"):
        with pytest.raises(UserError, match=f"transformers knows no {method} for phi3, only longrope"):
            phi = AutoConfig.for_model("phi3", **sizes, pad_token_id=0)
            positions.rescale(phi, method, 4.0)
    mixtral = AutoConfig.for_model("mixtral", **sizes)
    assert mixtral.head_dim is None
    positions.rescale(mixtral, "yarn", 4.0)
    assert mixtral.head_dim == WIDTH


def gemma(factor: float | None):
    whole = dict(rope_type="linear", factor=factor) if factor else dict(rope_type="default")
    nested = dict(full_attention=dict(rope_theta=1e6) | whole,
                  sliding_attention=dict(rope_type="default", rope_theta=1e4))  # fmt: skip
    return AutoConfig.for_model(
        "gemma3_text", hidden_size=64, head_dim=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TRAINED, layer_types=list(nested), rope_parameters=nested,
    )  # fmt: skip


@pytest.mark.parametrize("factor", [None, 8.0])
def test_of_gemma_3_the_global_layers_are_interpolated(factor):
    own, longer = gemma(factor), gemma(factor)
    positions.rescale(longer, "linear", 2.0)
    before, after = Gemma3RotaryEmbedding(own), Gemma3RotaryEmbedding(longer)
    assert torch.allclose(before.full_attention_inv_freq / 2, after.full_attention_inv_freq)
    assert torch.equal(before.sliding_attention_inv_freq, after.sliding_attention_inv_freq)
    contract = positions.contract(longer, 0)
    assert (contract["type"], contract["factor"], contract["theta"]) == ("linear", (factor or 1) * 2, 1e6)
    assert contract["context"] == 2 * TRAINED


@pytest.mark.parametrize("method", ["none", "dynamic"])
def test_dynamic_ntk_that_is_tuned_as_it_is_keeps_its_frequencies(method):
    """The trained context, 256, times the factor of 2, times 2 for the longer texts; then times 2 again."""
    longer = config(rope_type="dynamic", factor=2.0)
    assert positions.contract(longer, 0)["context"] == 512
    positions.rescale(longer, "none", 2.0)
    contract = positions.contract(longer, 0)
    assert (contract["context"], contract["factor"], longer.max_position_embeddings) == (1024, 2.0, 256)
    reloaded = LlamaConfig.from_dict(longer.to_dict())
    assert positions.contract(reloaded, 0) == contract
    own, other = LlamaModel(config(rope_type="dynamic", factor=2.0)).rotary_emb, LlamaModel(reloaded).rotary_emb
    for rotary in (own, other):
        rotary(torch.zeros(1, 700, 4 * WIDTH), torch.arange(700)[None])
    assert torch.equal(own.inv_freq, other.inv_freq)
    positions.rescale(reloaded, method, 2.0)
    assert positions.contract(reloaded, 0)["context"] == 2048
    assert positions.contract(reloaded, 0)["factor"] == (2.0 if method == "none" else 4.0), "control"


def values(**parameters) -> dict:
    return {"model_type": "llama", "max_position_embeddings": 256, "rope_parameters": parameters}


REFUSED = [
    (values(**YARN), "linear", "llama's positions are rescaled already (yarn), which linear cannot extend: "
                               "set yarn or none"),
    (values(**LLAMA3), "dynamic", "(llama3), which dynamic cannot extend: set yarn or none"),
    (values(**YARN), "ntk", "(yarn), which ntk cannot extend: set yarn or none"),
    (values(**LLAMA3), "ntk", "(llama3), which ntk cannot extend: set yarn or none"),
    (values(rope_type="dynamic", factor=2.0), "ntk", "(dynamic), which ntk cannot extend: set dynamic or none"),
    ({"model_type": "bloom"}, "ntk", "bloom has ALiBi, no RoPE that can be rescaled: set method: none"),
    (values(rope_type="default"), "ntk", "llama's configuration does not tell the width of a head, which ntk needs"),
    (values(**LONGROPE), "yarn", "(longrope), which yarn cannot extend: set linear or none"),
    (values(rope_type="dynamic", factor=2.0), "linear", "(dynamic), which linear cannot extend: set dynamic or none"),
    ({"model_type": "gpt2", "n_positions": 256}, "none", "gpt2 has a learned position for each of 256 tokens"),
    ({"model_type": "opt", "max_position_embeddings": 256}, "linear", "opt has a learned position for each of 256"),
    ({"model_type": "bloom"}, "yarn", "bloom has ALiBi, no RoPE that can be rescaled: set method: none"),
    ({"model_type": "falcon", "alibi": True}, "linear", "falcon has ALiBi"),
    ({"model_type": "xglm", "max_position_embeddings": 256}, "linear", "xglm has neither RoPE nor ALiBi"),
    (values(rope_type="default") | {"model_type": "phimoe"}, "linear", "transformers knows no linear for phimoe"),
    ({"model_type": "gptj", "n_positions": 256}, "linear", "gptj has RoPE of its own, no RoPE that can be rescaled"),
]  # fmt: skip


# Families with a causal model that are encoders, or decoders of translation and speech, in transformers 5.23.
TRANSLATE = """
    bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra ernie
    git marian mbart megatron-bert musicgen musicgen_melody mvp pegasus plbart prophetnet reformer rembert roberta
    roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xmod
"""


def test_a_family_without_rope_is_known_by_its_name():
    """Its `config.json` says as little of RoPE as one of Llama does. Control: families with RoPE are in no table."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    without, rotated = [], []
    for family in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(TRANSLATE.split()):
        try:
            config = AutoConfig.for_model(family)
        except (ValueError, StrictDataclassError):  # it has no default
            continue
        if not hasattr(config, "text_config"):
            (rotated if getattr(config, "rope_parameters", None) else without).append(family)
    of_names = {family: rope.kind({"model_type": family}) for family in [*without, *rotated]}
    assert [family for family in without if of_names[family] == "default"] == []
    assert [family for family in rotated if of_names[family] not in ("default", "turns")] == []


@pytest.mark.parametrize(("given", "method", "reason"), REFUSED)
def test_what_cannot_be_extended_is_refused_before_any_job(given, method, reason, tmp_path):
    with pytest.raises(UserError) as refused:
        rope.extended(given, method, 2.0)
    assert reason in str(refused.value)
    (tmp_path / "config.json").write_text(json.dumps(given))
    experiment = f"prepare: {{long: [{{path: x}}], test_fraction: 0.5}}\nbase: {{path: {tmp_path}}}\n"
    experiment += f"longctx: {{method: {method}}}\n"
    [line] = [line for line in problems(tmp_path, one=experiment).splitlines() if "longctx.method: " in line]
    assert reason in line


def test_old_configurations_are_read_too():
    """Llama 3.1, Gemma 3 and Phi-3 as they lie on the hub, written by transformers 4."""
    llama = {"model_type": "llama", "max_position_embeddings": 131072, "rope_theta": 5e5, "rope_scaling": LLAMA3}
    assert rope.kind(llama) == "llama3" and rope.kind({"model_type": "qwen2", "rope_theta": 1e6}) == "default"
    assert rope.kind({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}) == "longrope"


GIVEN = "prepare: {{sft: [{{path: x}}], long: [{{path: x}}], test_fraction: 0.5, max_tokens: {rows}}}\n" \
        "base: {{path: {path}}}\nsft: {{method: {method}, virtual_tokens: 16}}\n" \
        "lengths: {{tokens: [{tokens}]}}\n"  # fmt: skip


@pytest.mark.parametrize(
    ("given", "method", "rows", "tokens", "told"),
    [
        ({"model_type": "gpt2", "n_positions": 256}, "lora", 256, 512, "lengths.tokens: 512 tokens do not fit"),
        ({"model_type": "opt", "max_position_embeddings": 256}, "prefix", 256, 64,
         "sft.virtual_tokens: 256 tokens after 16 virtual tokens do not fit"),
        ({"model_type": "mpt", "max_seq_len": 256}, "prompt", 128, 256, "lengths.tokens: 256 tokens after 16 virtual"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic"}}, "prefix", 64, 64, "sft.method: prefix has"),
        ({"model_type": "gpt2", "n_positions": 256}, "prefix", 240, 240, None),
        ({"model_type": "bloom"}, "prefix", 256, 512, None),
        ({"model_type": "mpt", "max_seq_len": 256}, "lora", 256, 512, None),
        ({"model_type": "llama", "max_position_embeddings": 256}, "lora", 256, 512, None),
    ],
)  # fmt: skip
def test_where_positions_end_is_told_before_any_job(given, method, rows, tokens, told, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(given))
    text = GIVEN.format(path=tmp_path, rows=rows, method=method, tokens=tokens)
    if method == "lora":
        text = text.replace(", virtual_tokens: 16", "")
    assert told is None or told in problems(tmp_path, one=text)
    if told is None:
        with pytest.raises(UserError) as other:
            load(tmp_path, one=text)
        assert "do not fit" not in str(other.value), "only the files are missing"

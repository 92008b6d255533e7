"""RoPE and its rescalings against their identities and against transformers' own; ALiBi against BLOOM."""

import math

import pytest
import rope
import torch
from transformers import BloomConfig, BloomModel, LlamaConfig, LlamaModel

WIDTH, THETA, CONTEXT = 16, 500.0, 64


def llama(**parameters):
    """Llama's own frequencies and the factor on its cosines and sines."""
    config = LlamaConfig(
        hidden_size=4 * WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, vocab_size=8,
        max_position_embeddings=CONTEXT, rope_parameters={"rope_theta": THETA} | parameters,
    )  # fmt: skip
    return LlamaModel(config).rotary_emb


def test_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, WIDTH)
    freqs = rope.frequencies(WIDTH, THETA)

    def score(m, n):
        turned = [rope.rotate(x, torch.tensor([p]), freqs) for x, p in ((query, m), (key, n))]
        return (turned[0] * turned[1]).sum().item()

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2, "control: another distance, another score"
    assert rope.rotate(query, torch.tensor([5.0]), freqs).norm().item() == pytest.approx(query.norm().item(), abs=1e-5)


def test_interpolation_at_scaled_positions_is_the_base():
    """PI at scale s reads position s p as the base reads p."""
    torch.manual_seed(0)
    states, places = torch.randn(5, WIDTH), torch.arange(5)
    freqs = rope.frequencies(WIDTH, THETA)
    own = rope.rotate(states, places, freqs)
    assert torch.allclose(rope.rotate(states, 4 * places, rope.interpolated(freqs, 4.0)), own, atol=1e-6)
    assert not torch.allclose(rope.rotate(states, places, rope.interpolated(freqs, 4.0)), own, atol=1e-2)


def test_against_transformers():
    assert torch.allclose(rope.frequencies(WIDTH, THETA), llama(rope_type="default").inv_freq)
    linear = llama(rope_type="linear", factor=4.0)
    assert torch.allclose(rope.interpolated(rope.frequencies(WIDTH, THETA), 4.0), linear.inv_freq)
    yarn = llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=CONTEXT)
    assert torch.allclose(rope.yarn(WIDTH, THETA, 4.0, CONTEXT), yarn.inv_freq)
    assert rope.yarn_temperature(4.0) == pytest.approx(yarn.attention_scaling)
    assert not torch.allclose(yarn.inv_freq, linear.inv_freq), "control"


@pytest.mark.parametrize("length", [CONTEXT, 2 * CONTEXT, 4 * CONTEXT])
def test_dynamic_against_transformers(length):
    dynamic = llama(rope_type="dynamic", factor=4.0)
    dynamic(torch.zeros(1, length, 4 * WIDTH), torch.arange(length)[None])
    expected = rope.dynamic_ntk(WIDTH, THETA, 4.0, CONTEXT, length)
    assert torch.allclose(dynamic.inv_freq, expected)
    assert torch.equal(expected, rope.frequencies(WIDTH, THETA)) == (length == CONTEXT), "short texts are left alone"


def test_rotation_against_transformers():
    """The layer's cosines and sines, put to use as Llama does."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    states = torch.randn(1, 1, 9, WIDTH)
    cos, sin = llama(rope_type="default")(states, torch.arange(9)[None])
    turned, _ = apply_rotary_pos_emb(states, states, cos, sin)
    assert torch.allclose(rope.rotate(states, torch.arange(9), rope.frequencies(WIDTH, THETA)), turned, atol=1e-5)


def test_alibi_against_bloom():
    """Each head of BLOOM's bias, up to a constant in each row, which the softmax does not see."""
    slopes = rope.alibi_slopes(8)
    assert slopes.tolist() == [2.0**-i for i in range(1, 9)]
    bias = rope.alibi_bias(slopes, 6)
    assert torch.equal(bias.diagonal(dim1=1, dim2=2), torch.zeros(8, 6)), "no penalty on the token itself"
    assert bias[0, 5, 3].item() == bias[0, 4, 2].item() == -1.0, "the distance only"
    model = BloomModel(BloomConfig(hidden_size=64, n_layer=1, n_head=8, vocab_size=8))
    theirs = model.build_alibi_tensor(torch.ones(1, 6), 8, torch.float32)[:, 0]  # slope x position of the key
    for row in range(6):
        difference = theirs[:, : row + 1] - bias[:, row, : row + 1]
        assert torch.allclose(difference, difference[:, :1].expand_as(difference), atol=1e-6)
    assert math.isclose(slopes[-1].item(), 2.0**-8)

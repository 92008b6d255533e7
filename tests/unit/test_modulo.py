"""RoPE's positions modulo the trained context: which distances are wrong, over padding and with a cache, and refusals.

pytest tests/unit/test_modulo.py
"""

import pytest
import rope as papers
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from posttrain.ground.errors import UserError
from posttrain.maths import rope
from posttrain.models import positions

CONTEXT, LENGTH = 8, 21  # the trained context; a text over two of its ends


def llama(method: str = "modulo") -> LlamaForCausalLM:
    """A random model whose positions decide what is read, extended to four times its context."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
        max_position_embeddings=CONTEXT, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    positions.rescale(config, method, 4.0)
    model = LlamaForCausalLM(config).eval()
    positions.read_modulo(model)
    return model


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(1, 50, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def logits(model, ids, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return ((one - other).abs().max() / one.abs().max()).item()


def test_distances_are_right_within_a_window_and_wrong_by_it_across():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 16)
    freqs = papers.frequencies(16, 500.0)

    def score(m: int, n: int) -> float:
        turned = [papers.rotate(x, torch.tensor([p % CONTEXT]), freqs) for x, p in ((query, m), (key, n))]
        return (turned[0] * turned[1]).sum().item()

    def at_distance(d: int) -> float:
        turned = [papers.rotate(x, torch.tensor([p]), freqs) for x, p in ((query, d), (key, 0))]
        return (turned[0] * turned[1]).sum().item()

    assert score(15, 9) == pytest.approx(at_distance(6), abs=1e-4), "within a window"
    assert score(8 + 3, 3) == pytest.approx(at_distance(0), abs=1e-4), "a window apart: as the token itself"
    assert score(8 + 1, 6) == pytest.approx(at_distance(-5), abs=1e-4), "three tokens back: as five ahead"
    assert abs(score(8 + 1, 6) - at_distance(3)) > 1e-2, "control: not the true distance"


def test_a_text_is_read_as_transformers_reads_such_positions_under_a_mask(text):
    """And without the mask as packed rows, which would not be the method; up to the context as ever."""
    plain, wrapped = llama("none"), llama()
    places = torch.arange(LENGTH)[None] % CONTEXT
    own = logits(wrapped, text)
    assert differ(own, logits(plain, text, attention_mask=torch.ones_like(text), position_ids=places)) < 1e-5
    assert differ(own, logits(plain, text, position_ids=places, use_cache=False)) > 1e-2, "control: as packed rows"
    assert differ(own[:, :CONTEXT], logits(plain, text)[:, :CONTEXT]) < 1e-5
    assert differ(own, logits(plain, text)) > 1e-2, "control: beyond it otherwise"


def test_padding_takes_no_positions(text):
    model, pads = llama(), torch.zeros(1, 3, dtype=torch.long)
    padded, mask = torch.cat([pads, text], dim=1), torch.cat([pads, torch.ones_like(text)], dim=1)
    own = logits(model, text)
    assert differ(own, logits(model, padded, attention_mask=mask)[:, 3:]) < 1e-5
    counted = torch.arange(LENGTH + 3)[None]
    off = logits(model, padded, attention_mask=mask, position_ids=counted)[:, 3:]
    assert differ(own, off) > 1e-2, "control: with places counted from the padding, windows end elsewhere"


def test_with_a_cache_each_token_keeps_its_own_position(text):
    """Over two ends of a window, token by token; control: with the next ones from the context on."""
    model, whole = llama(), logits(llama(), text)
    for shift, same in ((0, True), (1, False)):
        cache, steps = None, []
        for place in range(LENGTH):
            places = torch.tensor([[place + shift * (place >= CONTEXT)]])
            with torch.no_grad():
                out = model(text[:, place : place + 1], position_ids=places, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        assert (differ(whole, torch.cat(steps, dim=1)) < 1e-5) == same, shift


def test_answers_of_a_padded_batch_are_those_of_each_text_alone(text):
    """Greedy, with a cache, beyond the context; control: without the modulo the answers are others."""
    texts = [text[0, :5], text[0, :13]]
    ids = torch.zeros(2, 13, dtype=torch.long)
    for row, one in enumerate(texts):
        ids[row, 13 - len(one) :] = one
    options = dict(max_new_tokens=12, do_sample=False)
    model = llama()
    together = model.generate(ids, attention_mask=(ids != 0).long(), **options)[:, 13:]
    for row, one in enumerate(texts):
        ones = torch.ones_like(one)[None]
        alone = model.generate(one[None], attention_mask=ones, **options)[0, len(one) :]
        assert torch.equal(together[row], alone)
        again = torch.tensor([], dtype=torch.long)
        for _ in range(12):  # without a cache
            again = torch.cat([again, logits(model, torch.cat([one, again])[None])[0, -1:].argmax(-1)])
        assert torch.equal(alone, again)
        plain = llama("none").generate(one[None], attention_mask=ones, **options)[0, len(one) :]
        assert not torch.equal(alone, plain), "control"


def test_the_contract_tells_it_and_no_method_goes_on_top():
    model = llama()
    contract = positions.contract(model.config, 0)
    assert (contract["type"], contract["original_context"], contract["context"]) == ("modulo", CONTEXT, 4 * CONTEXT)
    assert positions.contract(llama("none").config, 0)["type"] == "default", "control"
    for method, reason in (
        ("linear", r"rescaled already \(modulo\), which linear"),
        ("modulo", "read modulo 8 already"),
    ):
        with pytest.raises(UserError, match=f"{reason}.*: set none"):
            rope.extended(positions.values_of(model.config), method, 2.0)
    assert rope.MODULO not in rope.extended(positions.values_of(model.config), "none", 2.0), "the trained one stays"


def test_models_that_it_cannot_extend_are_refused():
    """Control: a model with YaRN keeps its frequencies, and its positions are read modulo its longer context."""
    for family, reason in (
        ("bloom", "has ALiBi"), ("gpt2", "has a learned position for each token"), ("gptj", "has RoPE of its own"),
        ("mamba", "has neither RoPE nor ALiBi"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{family} {reason}, no RoPE whose positions can be read modulo a context"):
            positions.rescale(AutoConfig.for_model(family), "modulo", 4.0)
    scaled = dict(factor=4.0, original_max_position_embeddings=CONTEXT, rope_theta=100.0)
    dynamic = LlamaConfig(max_position_embeddings=CONTEXT, rope_parameters=scaled | {"rope_type": "dynamic"})
    with pytest.raises(UserError, match=r"llama's frequencies depend on the text's length \(dynamic\)"):
        positions.rescale(dynamic, "modulo", 4.0)
    yarn = LlamaConfig(max_position_embeddings=4 * CONTEXT, rope_parameters=scaled | {"rope_type": "yarn"})
    before = positions.contract(yarn, 0)
    positions.rescale(yarn, "modulo", 2.0)
    after = positions.contract(yarn, 0)
    assert after["parameters"] == before["parameters"] and after["type"] == "modulo"
    assert (after["original_context"], after["context"]) == (4 * CONTEXT, 8 * CONTEXT)

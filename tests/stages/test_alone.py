"""A row of a batch has the numbers of the row alone: padding, other rows and earlier batches change nothing."""

from functools import cache
from pathlib import Path

import pytest
import torch

from posttrain.models import completions, policy
from posttrain.rl import answers

CONTEXT = 64
SIZE = dict(vocab_size=96, bos_token_id=None, eos_token_id=1, pad_token_id=0)
LLAMA = SIZE | dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
ROPE = dict(rope_theta=10000.0, factor=4.0)
DYNAMIC = ROPE | dict(rope_type="dynamic")
LONGROPE = ROPE | dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8,
                       original_max_position_embeddings=CONTEXT)  # fmt: skip
NESTED = dict(sliding_attention=dict(rope_type="default", rope_theta=10000.0), full_attention=DYNAMIC)
BY_LENGTH = {
    "dynamic": ("llama", LLAMA | dict(max_position_embeddings=CONTEXT, rope_parameters=DYNAMIC)),
    "longrope": ("llama", LLAMA | dict(max_position_embeddings=4 * CONTEXT, rope_parameters=LONGROPE)),
    "phi-3": ("phi3", LLAMA | dict(max_position_embeddings=4 * CONTEXT, rope_parameters=LONGROPE,
                                   original_max_position_embeddings=CONTEXT)),
    "gemma-3": ("gemma3_text", LLAMA | dict(head_dim=16, sliding_window=32, max_position_embeddings=CONTEXT,
                                            layer_types=list(NESTED), rope_parameters=NESTED)),
}  # fmt: skip
OTHERS = {
    "llama": ("llama", LLAMA | dict(max_position_embeddings=4 * CONTEXT)),
    "mistral": ("mistral", LLAMA | dict(num_key_value_heads=4, sliding_window=32)),
    "gpt-2": ("gpt2", SIZE | dict(n_embd=64, n_layer=2, n_head=4, n_positions=4 * CONTEXT)),
    "opt": ("opt", SIZE | dict(hidden_size=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                               word_embed_proj_dim=64, max_position_embeddings=4 * CONTEXT)),
    "bloom": ("bloom", SIZE | dict(hidden_size=64, n_layer=2, n_head=4)),
    "mpt": ("mpt", SIZE | dict(d_model=64, n_layers=2, n_heads=4, max_seq_len=4 * CONTEXT)),
    "falcon": ("falcon", SIZE | dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True)),
    "gpt-neox": ("gpt_neox", LLAMA | dict(max_position_embeddings=4 * CONTEXT)),
}  # fmt: skip
ALL = BY_LENGTH | OTHERS
numbers = torch.Generator().manual_seed(0)
PROMPTS, REPLIES = ([torch.randint(3, 96, (n,), generator=numbers).tolist() for n in lengths]
                    for lengths in ((9, 40, 58, 63, 120), (5, 20, 11, 3, 7)))  # fmt: skip
ROWS = [prompt + reply for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]


class Tokenizer:
    """What answers need of a tokenizer."""

    pad_token_id, eos_token_id = 0, 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Loads a random model by its name: as the stages do, or, fresh, as transformers does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    @cache
    def folder(name: str) -> Path:
        kind, settings = ALL[name]
        torch.manual_seed(0)
        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.05)
        place = tmp_path_factory.mktemp(name)
        model.save_pretrained(place)
        return place

    def load(name: str, fresh: bool = False):
        if fresh:
            return AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32).eval()
        return policy.load_model(folder(name)).eval()

    with torch.no_grad():
        yield load


def logits_alone(models, name: str, ids: list[int]) -> torch.Tensor:
    """Logits of a row, T x V, by a model that has read nothing else."""
    return models(name, fresh=True)(torch.tensor([ids]), use_cache=False).logits[0]


def log_probs_alone(models, name: str) -> list[torch.Tensor]:
    """Log-probabilities of each row's reply."""
    found = []
    for prompt, row in zip(PROMPTS, ROWS, strict=True):
        of_row = logits_alone(models, name, row).log_softmax(dim=-1)
        found.append(of_row[range(len(prompt) - 1, len(row) - 1), row[len(prompt) :]])
    return found


def worst(batch: torch.Tensor, alone: list[torch.Tensor]) -> float:
    """Largest difference between the rows of a batch, padded on the right, and rows alone."""
    return max((row[: len(other)] - other).abs().max().item() for row, other in zip(batch, alone, strict=True))


def padded(model, rows: list[list[int]]) -> torch.Tensor:
    """Logits of rows that are padded on the right, as trainers pad them."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("name", ALL)
def test_log_probabilities(models, name):
    """Of replies after prompts that are padded on the left, and of whole rows padded on the right."""
    batch = completions.answers_of(Tokenizer, PROMPTS, REPLIES, "cpu")
    model, alone = models(name), log_probs_alone(models, name)
    assert worst(completions.log_probs(model, batch), alone) < 1e-5
    assert worst(padded(model, ROWS), [logits_alone(models, name, row) for row in ROWS]) < 1e-5
    if name in BY_LENGTH:
        assert worst(completions.log_probs(models(name, fresh=True), batch), alone) > 1e-3, "control: transformers' own"


@pytest.mark.parametrize("name", ALL)
def test_scores(models, name):
    """A reward head's, whatever the batch."""
    model, head = models(name), torch.nn.Linear(64, 1)
    batch = completions.answers_of(Tokenizer, PROMPTS, REPLIES, "cpu")
    for number, score in enumerate(answers.scores(model, head, batch)):
        one = slice(number, number + 1)
        alone = completions.answers_of(Tokenizer, PROMPTS[one], REPLIES[one], "cpu")
        assert answers.scores(model, head, alone).item() == pytest.approx(score.item(), abs=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_answers(models, name):
    """Each token that is drawn is the likeliest after the row so far; cold, so that there is one answer."""
    drawn = answers.draw(models(name), Tokenizer, PROMPTS, [0] * len(PROMPTS), 6, 1e-6)
    assert drawn.mask.sum() > 20
    for number, prompt in enumerate(PROMPTS):
        row = list(prompt)
        for token in drawn.replies[number][drawn.mask[number] == 1].tolist():
            row.append(int(logits_alone(models, name, row)[-1].argmax()))
            assert row[-1] == token, (number, len(row))


@pytest.mark.parametrize("name", BY_LENGTH)
def test_the_order_of_batches_changes_nothing(models, name):
    """A short row after a long one, in one model."""
    model = models(name)
    for row in sorted(ROWS, key=len, reverse=True):
        found = model(torch.tensor([row]), use_cache=False).logits[0]
        assert torch.allclose(found, logits_alone(models, name, row), atol=1e-5), len(row)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_packed_rows_have_the_frequencies_of_their_own_length(models, name):
    ids = torch.tensor([[token for row in ROWS for token in row]])
    places = torch.tensor([[place for row in ROWS for place in range(len(row))]])
    found = models(name)(input_ids=ids, position_ids=places, use_cache=False).logits[0]
    for of_row, row in zip(found.split([len(row) for row in ROWS]), ROWS, strict=True):
        assert torch.allclose(of_row, logits_alone(models, name, row), atol=1e-5), len(row)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_an_adapter_is_trained_on_rows_alone(models, name):
    """PEFT skips the hooks of the model that it wraps."""
    import peft

    settings = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(models(name), settings)
    assert worst(padded(adapted, ROWS), [padded(adapted, [row])[0] for row in ROWS]) < 1e-5

"""The small models and tokens that identities are computed on."""

from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from transformers.integrations import WandbCallback

VOCABULARY, PAD, END = 64, 0, 1
LAYERS, WIDTH, INNER, NARROW = 2, 32, 48, 16  # NARROW: width of keys and values; that of queries is WIDTH
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 4 * NARROW // WIDTH, "max_position_embeddings": 64,
    "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": END, "tie_word_embeddings": False,
    "initializer_range": 0.2,
}  # fmt: skip
Identity = tuple[float, float]
"""What the product's code gives, and the same quantity from a planted fault."""


def llama(**changes) -> LlamaForCausalLM:
    """A random Llama of 2 layers, whose keys and values are half as wide as its queries."""
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).eval()


def classifier(**changes) -> LlamaForSequenceClassification:
    """The same with one output in place of the language model's head."""
    return LlamaForSequenceClassification(LlamaConfig(**SHAPE | {"num_labels": 1} | changes)).eval()


def draw_b(model, std: float = 0.1) -> None:
    """Draw every B of a model's LoRA, which is 0 at first."""
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters. TRL's trainers need one; what they are given are token ids."""
    characters = {chr(ord("0") + number): number for number in range(VOCABULARY)}
    single = Tokenizer(WordLevel(characters, unk_token="0"))
    single.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=single, pad_token="0", eos_token="1", unk_token="0")


def tokens(count: int) -> list[int]:
    """Random token ids without padding and end of turn."""
    return torch.randint(END + 1, VOCABULARY, (count,)).tolist()


def quiet(trainer):
    """A trainer that neither prints its figures nor sends them to a tracker."""
    for callback in (PrinterCallback, WandbCallback):
        trainer.remove_callback(callback)
    return trainer


def loss_of(trainer, rows: list[dict]) -> torch.Tensor:
    """A trainer's loss of a batch."""
    batch = trainer.data_collator(rows)
    return trainer.compute_loss(
        trainer.model, {key: value.to(trainer.model.device) for key, value in batch.items()}
    ).cpu()


def largest(first: torch.Tensor, second: torch.Tensor | float = 0.0) -> float:
    """The largest absolute difference between two sides."""
    return (first - second).abs().max().item()

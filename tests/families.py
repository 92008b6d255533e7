"""Tokenizers of public model families in small: their special tokens and, in `templates/`, the structure of their chat
templates."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
TEXT = "user model assistant system what is two and two ? it is four. sure ? yes. be brief. Today Date: 26 Jul 2024"

# Name -> (template, BOS, EOS, whether the tokenizer adds BOS to a text, other special tokens)
FAMILIES = {
    "llama3": ("llama3", "<|begin_of_text|>", "<|eot_id|>", True, ["<|start_header_id|>", "<|end_header_id|>"]),
    "llama3-base": (
        "llama3", "<|begin_of_text|>", "<|end_of_text|>", True,
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "qwen2.5": ("qwen25", None, "<|im_end|>", False, ["<|endoftext|>", "<|im_start|>"]),
    "qwen2.5-base": ("qwen25", None, "<|endoftext|>", False, ["<|im_start|>", "<|im_end|>"]),
    "qwen3": ("qwen3", None, "<|im_end|>", False, ["<|endoftext|>", "<|im_start|>"]),
    "gemma2": ("gemma2", "<bos>", "<eos>", True, ["<pad>", "<start_of_turn>", "<end_of_turn>"]),
    "gemma3": ("gemma3", "<bos>", "<eos>", True, ["<pad>", "<start_of_turn>", "<end_of_turn>"]),
    "mistral-0.1": ("mistral1", "<s>", "</s>", True, ["<unk>"]),
    "mistral-0.3": ("mistral3", "<s>", "</s>", True, ["<unk>", "[INST]", "[/INST]"]),
    "phi3": ("phi3", "<s>", "<|endoftext|>", False, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    "smollm3": ("smollm3", None, "<|im_end|>", False, ["<|im_start|>"]),
    "granite": ("granite", "<|end_of_text|>", "<|end_of_text|>", False, ["<|start_of_role|>", "<|end_of_role|>"]),
}  # fmt: skip
PADS = ("<|endoftext|>", "<pad>", "<unk>")


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some hundred tokens with a family's special tokens and chat template."""
    template, bos, eos, adds_bos, others = FAMILIES[family]
    special = list(dict.fromkeys([*filter(None, (bos, eos)), *others]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT] * 20,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    pad = next((token for token in PADS if token in special), None)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    made.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return made

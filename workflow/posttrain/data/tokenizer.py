"""The tokenizer with its chat template: trained on the text, from a directory, or from the hub."""

import re
from pathlib import Path

from posttrain.config.sections import HubModel, Prepare
from posttrain.data.hub import fetched_repo
from posttrain.ground.errors import UserError

TEMPLATES = Path(__file__).parents[1] / "templates"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}


def make_tokenizer(section: Prepare, sides: dict, fetched: list[Path]):
    """The tokenizer of `prepare.tokenizer` with its chat template. Raises UserError where it cannot be loaded."""
    chosen = section.tokenizer
    assert chosen and section.max_tokens, "filled in when the campaign was read"
    rows = [row for task in ("sft", "preference", "kto") for side in sides[task].values() for row in side]
    conversations = any("messages" in row or not isinstance(row.get("prompt", ""), str) for row in rows)
    if chosen.vocab_size:
        texts = (row["text"] for row in sides["text"]["train"])
        tokenizer = train_tokenizer(texts, chosen.vocab_size, section.max_tokens)
    else:
        tokenizer = load_tokenizer(chosen.hub, chosen.path, fetched)
    set_chat_template(tokenizer, section.chat_template, conversations)
    return tokenizer


def load_tokenizer(hub: HubModel | None, path: str | None, fetched: list[Path]):
    """The tokenizer of a model. Raises UserError where it cannot be loaded or has no end-of-sequence token."""
    from transformers import AutoTokenizer

    if hub:
        path = str(fetched_repo("model", hub.id, hub.revision, fetched))
    if path is None or not Path(path).is_dir():
        raise UserError(f"prepare.tokenizer: {path} is not a directory; give the folder of a model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # damaged files make transformers and tokenizers raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"prepare.tokenizer: {path} holds no tokenizer that can be loaded: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"prepare.tokenizer: {path} has no end-of-sequence token, with which every turn and text must end; "
            "name one as `eos_token` in its tokenizer_config.json"
        )
    return tokenizer


def train_tokenizer(texts, vocab_size: int, context: int):
    """Train a byte-level BPE tokenizer (no text becomes <unk>) with one token per role; it adds `<|bos|>` like Llama's.

    Byte-level BPE: Radford et al. 2019, section 2.2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*SPECIAL.values(), *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    marks = re.compile("|".join(map(re.escape, special)))
    tokenizer.train_from_iterator((part for text in texts for part in marks.split(text)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL,
        additional_special_tokens=special[3:],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def set_chat_template(tokenizer, choice: str | None, conversations: bool) -> None:
    """Set the tokenizer's chat template (see `prepare.chat_template`) and, where it has none, a pad token.

    Raises UserError where the template does not exist.
    """
    if isinstance(tokenizer.chat_template, dict):  # some tokenizers have another one for tools
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if choice is None:
        choice = "tokenizer" if tokenizer.chat_template or not conversations else "default"
    if choice == "default":
        vocabulary = tokenizer.get_vocab()
        name = "roles" if all(f"<|{role}|>" in vocabulary for role in ROLES) else "plain"
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    elif choice != "tokenizer":
        try:
            tokenizer.chat_template = Path(choice).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(
                f"prepare.chat_template: {choice!r} cannot be read ({getattr(error, 'strerror', error)}); "
                "allowed: default, tokenizer, or the path of a Jinja file"
            ) from None
    elif conversations and not tokenizer.chat_template:
        raise UserError("prepare.chat_template: the tokenizer carries none; use default or the path of a Jinja file")
    if tokenizer.pad_token is None:  # any token will do: padding is masked in attention and labels
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token

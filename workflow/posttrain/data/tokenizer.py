"""The tokenizer with its chat template: trained on the text, from a directory, or from the hub."""

import datetime
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from posttrain.config.sections import ANSWERED, HubModel, Prepare
from posttrain.config.sources import SENTENCEPIECE
from posttrain.data.hub import fetched_repo
from posttrain.ground.errors import UserError
from posttrain.ground.progress import say
from posttrain.models import chat

TEMPLATES = Path(__file__).parents[1] / "templates"
ROLES = ("system", "user", "assistant", "tool")
DATE = "2024-07-26"  # to which Llama 3's chat template falls back
DATED = re.compile(r"^{%- macro strftime_now\(format\) %}.*{%- endmacro %}\n", re.MULTILINE)  # what `dated` writes
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}


def make_tokenizer(section: Prepare, sides: dict, fetched: list[Path]):
    """The tokenizer of `prepare.tokenizer` with its end-of-turn token and its chat template, the same on every day.

    Raises UserError where it cannot be loaded, and where the template depends on more than the conversation.
    """
    chosen = section.tokenizer
    assert chosen and section.max_tokens, "filled in when the campaign was read"
    has_conversations = next(conversations(sides), None) is not None
    if chosen.vocab_size:
        texts = (row["text"] for row in sides["text"]["train"])
        tokenizer = train_tokenizer(texts, chosen.vocab_size, section.max_tokens)
    else:
        tokenizer = load_tokenizer(chosen.hub, chosen.path, fetched)
    set_chat_template(tokenizer, section.chat_template, has_conversations)
    set_end_of_turn(tokenizer, section.end_of_turn)
    if has_conversations:
        set_date(tokenizer, section.date)
        refuse_unsteady(tokenizer, conversations(sides))
    return tokenizer


def conversations(sides: dict) -> Iterator[tuple[dict, list[dict]]]:
    """The rows that are conversations, each with its messages."""
    for task in ANSWERED:
        for side in sides[task].values():
            yield from ((row, messages) for row in side if (messages := conversation_of(row)))


def conversation_of(row: dict) -> list[dict] | None:
    """The messages of a row of `sft`, `preference` (with the chosen answer) or `kto`; None for plain text."""
    if isinstance(row.get("prompt"), list):
        return row["prompt"] + row.get("chosen", row.get("completion"))
    return row.get("messages")


def load_tokenizer(hub: HubModel | None, path: str | None, fetched: list[Path]):
    """The tokenizer of a model. Raises UserError where it cannot be loaded."""
    from transformers import AutoTokenizer

    if hub:
        path = str(fetched_repo("model", hub.id, hub.revision, fetched))
    if path is None or not Path(path).is_dir():
        raise UserError(f"prepare.tokenizer: {path} is not a directory; give the folder of a model")
    if (Path(path) / "tokenizer.model").is_file() and not (Path(path) / "tokenizer.json").is_file():
        raise UserError(f"prepare.tokenizer: {path} {SENTENCEPIECE}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # damaged files make transformers and tokenizers raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"prepare.tokenizer: {path} holds no tokenizer that can be loaded: {reason}") from None
    return tokenizer


def refuse_other_tokens(tokenizer, model: Path) -> None:
    """Warn of tokens that have another number in a model's own tokenizer; raise UserError where most have.

    The model would read other words than the rows hold. Nothing is compared where the model has no tokenizer.json.
    """
    from transformers import AutoTokenizer

    if not (model / "tokenizer.json").is_file():
        return
    try:
        own = AutoTokenizer.from_pretrained(model, trust_remote_code=False).get_vocab()
    except Exception as error:  # a damaged one, which prepare.tokenizer may correct, makes transformers raise anything
        say(f"warning: the tokenizer of {model} is not compared with prepare.tokenizer: {type(error).__name__}")
        return
    vocabulary = tokenizer.get_vocab()
    other = sorted(token for token, number in vocabulary.items() if own.get(token) != number)
    told = f"{len(other):,} of {len(vocabulary):,} tokens of prepare.tokenizer are others in the tokenizer of {model}"
    if len(other) > len(vocabulary) / 2:
        raise UserError(
            f"base: {told}, among them {other[0]!r}: leave prepare.tokenizer out, or give one for this model"
        )
    if other:
        say(f"warning: {told}: {', '.join(map(repr, other[:10]))}{', ...' * (len(other) > 10)}")


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


def set_end_of_turn(tokenizer, token: str | None) -> None:
    """Let turns and texts end with a token; None for the tokenizer's end-of-sequence token, which the chat template
    still writes where it asks for it.

    Raises UserError where the tokenizer has no such token.
    """
    path, own = tokenizer.name_or_path, tokenizer.eos_token
    if token and token not in tokenizer.get_vocab():
        special = ", ".join(added.content for added in tokenizer.added_tokens_decoder.values() if added.special)
        raise UserError(
            f"prepare.end_of_turn: {token!r} is no token of {path}; its special tokens: {special or 'none'}"
        )
    if not token and not own:
        raise UserError(
            f"prepare.tokenizer: {path} has no end-of-sequence token, with which every turn and text must end; "
            "name one of its tokens as prepare.end_of_turn"
        )
    if token and own and tokenizer.chat_template:
        tokenizer.chat_template = f"{{%- set eos_token = {own!r} %}}\n{tokenizer.chat_template}"
    tokenizer.eos_token = token or own
    tokenizer.pad_token = tokenizer.pad_token or token


def set_date(tokenizer, date: str | None) -> None:
    """Let a chat template that writes today's date write a fixed one: the given, that of an earlier `prepare`, or DATE.

    Raises UserError for a date without effect.
    """
    if DATED.search(tokenizer.chat_template) and not date:
        return
    day, template = datetime.datetime.fromisoformat(date or DATE), DATED.sub("", tokenizer.chat_template)
    tokenizer.chat_template = dated(template, day)
    if tokenizer.chat_template != template:
        say(f"the chat template writes a date: {day:%Y-%m-%d} on every day (prepare.date)")
    elif date:
        raise UserError("prepare.date: the chat template does not ask for the date; leave the key out")


def dated(template: str, day: datetime.datetime) -> str:
    """A chat template whose function `strftime_now` writes a day, not the clock's; unchanged where it has none.

    transformers passes no function of ours to a template, so that it becomes a Jinja macro within the template.
    """
    from jinja2 import Environment, TemplateSyntaxError

    try:
        words = [(kind, value) for _, kind, value in Environment().lex(template) if kind in ("name", "string")]
    except TemplateSyntaxError as error:
        raise UserError(f"prepare.chat_template: line {error.lineno}: TemplateSyntaxError: {error.message}") from None
    if ("name", "strftime_now") not in words:
        return template
    codes = {code for kind, value in words if kind == "string" for code in re.findall(r"%-?[A-Za-z]", value)}
    replaced = "".join(f".replace({code!r}, {day.strftime(code)!r})" for code in sorted(codes))
    # The template's first line stays as it is: transformers drops the line break after a block.
    return f"{{%- macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{%- endmacro %}}\n{template}"


def refuse_unsteady(tokenizer, conversations: Iterable[tuple[dict, list[dict]]]) -> None:
    """Raise UserError where the chat template writes a conversation differently on another day or at random.

    conversations: rows, each with its messages. The first is taken that the template can write; Breach if it can none.
    """
    row, messages = writable(tokenizer, conversations)
    state, written = random.getstate(), set()
    for number in range(1, 9):
        random.seed(number)  # of Jinja's filter `random`
        template = dated(tokenizer.chat_template, datetime.datetime(2000 + number, number, number))
        written.add(chat.write(tokenizer, row, messages, chat_template=template))
    random.setstate(state)
    if len(written) > 1:
        raise UserError("prepare.chat_template: writes another text on another day, or at random: give another one")


def writable(tokenizer, conversations: Iterable[tuple[dict, list[dict]]]) -> tuple[dict, list[dict]]:
    """The first conversation that the chat template writes without an error. Raises Breach, the first, for none."""
    first = None
    for row, messages in conversations:
        try:
            chat.write(tokenizer, row, messages)
            return row, messages
        except chat.Breach as fault:
            first = first or fault
    assert first, "there are conversations"
    raise first

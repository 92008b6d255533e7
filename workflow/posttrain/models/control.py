"""Control text: text of a row that a tokenizer would read as one of its control tokens, such as `</s>` typed by a user.

It is read as plain text. transformers' own `sanitize_control_tokens` cuts it off from the words around it, which then
have other tokens than in plain text, and takes a reply's `<think>` for control text too.
"""

import copy
import functools
import re
from collections.abc import Iterator

# A control token's number between noncharacters of Unicode, which no text holds (U+FDD0 to U+FDEF): in place of the
# token in a row's text (IN_ROW), and where the chat template writes it (IN_TEMPLATE).
IN_ROW, IN_TEMPLATE = "\ufdd0{}\ufdd1", "\ufdd2{}\ufdd3"
BETWEEN = "\ufdd4"  # between texts that are searched together
IN_ROW_PATTERN = re.compile("\ufdd0(\\d+)\ufdd1")


def control_tokens(tokenizer) -> list[str]:
    """The tokens that direct a model: the special ones and the end of turn, without the one for unknown text."""
    return _control_tokens(tokenizer, tokenizer.eos_token)


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer, end: str) -> list[str]:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted((special | {end}) - {tokenizer.unk_token})


@functools.lru_cache(maxsize=8)
def _pattern(tokenizer, end: str) -> re.Pattern:
    """A pattern for any control token, the longest first."""
    longest_first = sorted(_control_tokens(tokenizer, end), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def control_text(tokenizer, value) -> str | None:
    """The first control token in any string of a value; None where there is none."""
    match = _pattern(tokenizer, tokenizer.eos_token).search(BETWEEN.join(strings(value)))
    return match.group() if match else None


def strings(value) -> Iterator[str]:
    """All strings in a value, in their order; a loop, as every row of a data set is searched."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            waiting += reversed(part.values())
        elif isinstance(part, list):
            waiting += reversed(part)


def shielded(tokenizer, value):
    """The value with the control text in its strings replaced by IN_ROW: what a chat template is given."""
    return _renamed(tokenizer, value, IN_ROW) if control_text(tokenizer, value) else value


def _renamed(tokenizer, value, name: str):
    """The value with each control token in its strings replaced by `name` with the token's number."""
    if isinstance(value, str):
        numbers = {token: number for number, token in enumerate(control_tokens(tokenizer))}
        pattern = _pattern(tokenizer, tokenizer.eos_token)
        return pattern.sub(lambda match: name.format(numbers[match.group()]), value)
    if isinstance(value, dict):
        return {key: _renamed(tokenizer, part, name) for key, part in value.items()}
    return [_renamed(tokenizer, part, name) for part in value] if isinstance(value, list) else value


def unshielded(tokenizer, text: str) -> str:
    """The text with the control text that IN_ROW stands for."""
    tokens = control_tokens(tokenizer)
    return IN_ROW_PATTERN.sub(lambda match: tokens[int(match.group(1))], text)


def tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    """Tokens of each text from a chat template, with its control tokens; what was shielded is plain text."""
    unshielded_texts = [text for text in texts if not IN_ROW_PATTERN.search(text)]
    others = iter(_ids(tokenizer, unshielded_texts))
    return [_tokenize_shielded(tokenizer, text) if IN_ROW_PATTERN.search(text) else next(others) for text in texts]


def _ids(tokenizer, texts: list[str], special: bool = False, split: bool = False) -> list[list[int]]:
    """Tokens of each text. special: whether BOS and the like are added; split: whether control text is plain text."""
    if not _is_fast(tokenizer, special, split):
        options = {"return_attention_mask": False, "return_token_type_ids": False}
        options |= {"add_special_tokens": special, "split_special_tokens": split}
        return tokenizer(texts, **options).input_ids if texts else []
    return _fast_ids(tokenizer, texts, special, split)


def _fast_ids(tokenizer, texts: list[str], special: bool, split: bool) -> list[list[int]]:
    """Tokens of each text from the library tokenizers itself, which skips the places of tokens in the text: half of the
    time of transformers' call."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = split
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special)]


@functools.lru_cache(maxsize=32)
def _is_fast(tokenizer, special: bool, split: bool) -> bool:
    """Whether the library tokenizers does all that transformers' call does: some models' classes add to it."""
    text = " Élan: 3 * 14\n\n好 ".join(["", *control_tokens(tokenizer), ""])
    called = tokenizer(text, add_special_tokens=special, split_special_tokens=split).input_ids
    return hasattr(tokenizer, "backend_tokenizer") and _fast_ids(tokenizer, [text], special, split) == [called]


def _tokenize_shielded(tokenizer, text: str) -> list[int]:
    renaming, ids = _renaming(tokenizer, tokenizer.eos_token)
    written = unshielded(tokenizer, _renamed(tokenizer, text, IN_TEMPLATE))
    return [ids.get(token, token) for token in plain(renaming, written)]


@functools.lru_cache(maxsize=8)
def _renaming(tokenizer, end: str) -> tuple:
    """(a copy of the tokenizer that also reads control tokens by their names IN_TEMPLATE, {id of a name: id of its
    token}).

    The names are added tokens that are not special, so that `split_special_tokens` does not split them.
    """
    from tokenizers import AddedToken

    copied = copy.deepcopy(tokenizer)
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    ids = {}
    for number, token in enumerate(_control_tokens(tokenizer, end)):
        strips = {side: token in added and getattr(added[token], side) for side in ("lstrip", "rstrip")}
        name = IN_TEMPLATE.format(number)
        copied.add_tokens([AddedToken(name, normalized=False, special=False, **strips)])
        ids[copied.convert_tokens_to_ids(name)] = tokenizer.convert_tokens_to_ids(token)
    return copied, ids


def opening(tokenizer) -> int:
    """The token that a text begins with: BOS, else EOS, as in lm-eval's likelihood of a text."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def plain(tokenizer, text: str | list[str], add_special_tokens: bool = False) -> list:
    """Tokens of a text, or of each of several, that no chat template wrote: control text is plain text."""
    texts = [text] if isinstance(text, str) else text
    ids = _ids(tokenizer, texts, add_special_tokens, split=True)
    return ids[0] if isinstance(text, str) else ids

"""Documents of the built-in world with long dependence, of any length, generated from a seed.

Kinds: **motif**, repeated random words; **secret**, a pass word stated among facts and repeated at the end; **diary**,
statements of who has which thing where. The distance between dependent words grows in proportion to the document.
"""

import math
import random
import re
from collections.abc import Callable

from posttrain.config.sections import Long
from posttrain.world.documents import diary, fact
from posttrain.world.language import NAMES, OBJECTS

WORDS = NAMES + OBJECTS
WEIGHTS = {"motif": 8, "secret": 6, "diary": 1}
DEPTHS = (0, 25, 50, 75, 100)  # percent of the facts before the pass word
NOISE = 0.03  # share of a motif's words that are replaced
SPARE = 16  # tokens generated beyond a held-out document's length, since the last statement may not fit
ROOM = 6  # tokens of a question's length that are reserved for its answer


def size(text: str) -> int:
    """Number of words and punctuation marks: the tokens of a tokenizer trained on such text."""
    return len(re.findall(r"\w+|[^\w\s]", text))


Count = Callable[[str], int]  # number of tokens of a text


def held_out_lengths(long: Long) -> list[int]:
    """Lengths of the held-out rows in tokens: 1, 2, 4, ... times the context and, last, `factor` times it."""
    powers = [2**power for power in range(long.factor.bit_length())]
    return [long.context * times for times in sorted({*powers, long.factor}) if times <= long.factor]


def motif(rng: random.Random, words: int, within: int, least: int = 16, noise: float = NOISE) -> tuple[str, str]:
    """(text, next word): `words` words that repeat with a log-uniform period from 1/`least` up to 3/8 of `within`.

    As few words as possible occur twice in a period, so that a word determines the next.
    """
    shortest, longest = within // least, max(3, within * 3 // 8)
    period = round(math.exp(rng.uniform(math.log(max(2, shortest)), math.log(longest))))
    cycle = [word for _ in range(0, period, len(WORDS)) for word in rng.sample(WORDS, len(WORDS))][:period]
    text = [rng.choice(WORDS) if rng.random() < noise else cycle[place % period] for place in range(words)]
    return " ".join(text), cycle[words % period]


def _facts(rng: random.Random, tokens: int, count: Count = size) -> list[str]:
    """True statements of at most so many tokens."""
    statements, left = [], tokens
    while left > 0:
        statements.append(fact(rng))
        left -= count(f" {statements[-1]}")
    return statements if left == 0 else statements[:-1]


def secret(rng: random.Random, tokens: int) -> str:
    """A pass word that is stated at one or several random places among facts, and again at the end."""
    statement = f"secret pass: {rng.choice(WORDS)}."
    times = 1 if rng.random() < 0.5 else rng.randint(1, max(1, min(6, tokens // 20)))
    talk = _facts(rng, tokens - size(statement) * (times + 1))
    places = rng.sample(range(len(talk) + 1), min(len(talk) + 1, times))
    if rng.random() < 0.5:  # otherwise the beginning of a long document would hardly ever be needed
        places[0] = rng.choice([0, len(talk) // 4])
    for place in sorted(places, reverse=True):
        talk.insert(place, statement)
    return " ".join([*talk, statement])


def passkey(rng: random.Random, tokens: int, depth: int, count: Count = size) -> tuple[str, str]:
    """(question, answer): a pass word is stated at a depth (0 to 100) among facts; the question ends before it."""
    answer = rng.choice(WORDS)
    statement, request = f"secret pass: {answer}.", "secret pass:"
    talk = _facts(rng, tokens - _room(count) - count(f" {statement}") - count(f" {request}"), count)
    talk.insert(round(depth / 100 * len(talk)), statement)
    return " ".join([*talk, request]), answer


def _room(count: Count) -> int:
    """Tokens of a question's length that are reserved for its answer, and the full stop after it."""
    return max(ROOM, 2 + max(count(f" {word}") for word in WORDS))


def recall(rng: random.Random, tokens: int, count: Count) -> tuple[str, str]:
    """(question, answer): a motif of at most so many tokens, less those of the answer, and its next word."""
    left = tokens - _room(count)
    words = left * len(WORDS) // sum(count(f" {word}") for word in WORDS)
    text, answer = motif(rng, words, words, least=8, noise=0.0)
    while count(f" {text}") > left:
        text = text.partition(" ")[2]
    return text, answer


def document(rng: random.Random, tokens: int) -> tuple[str, str]:
    """(kind, text) of about so many tokens."""
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    if kind == "motif":
        return kind, motif(rng, tokens, tokens)[0]
    return kind, secret(rng, tokens) if kind == "secret" else diary(rng, tokens)


def generate(seed: int, documents: int, long: Long, count: Count = size) -> dict[str, dict[str, list[dict]]]:
    """Rows by task and split: `text`, at most as long as the context, and `long`, up to `factor` times the context.

    count: tokens of a text by the tokenizer that reads held-out questions, so that they fit into their length.
    """
    longest = long.context * long.factor
    return {
        "text": {
            "train": _training_rows(seed, "text-train", documents, long.context),
            "test": _training_rows(seed, "text-test", documents // 8, long.context),
        },
        "long": {
            "train": _training_rows(seed, "long-train", long.documents, longest),
            "test": [row for length in held_out_lengths(long) for row in _held_out_rows(seed, long, length, count)],
        },
    }


def _training_rows(seed: int, part: str, count: int, tokens: int) -> list[dict]:
    """Documents: half have the full length, the others a random length down to a quarter of it."""
    rng, rows = random.Random(f"{seed}:{part}"), []
    for number in range(count):
        length = tokens if rng.random() < 0.5 else rng.randint(tokens // 4, tokens)
        kind, text = document(rng, length)
        rows.append({"id": f"{part}-{number}", "kind": kind, "text": text})
    return rows


def _held_out_rows(seed: int, long: Long, length: int, count: Count) -> list[dict]:
    """Documents of a length, and questions with their `answer`.

    Documents with the task `near_text` are motifs whose period stays as short as in a text of the context's length.
    Questions are of the kinds `passkey`, with a `depth`, and `recall`: the next word of a motif.
    """
    rows, name, documents = [], f"long-test-{length}", max(1, long.documents // 16)
    rng = random.Random(f"{seed}:long-test-{length}")
    for number in range(documents):
        kind, text = document(rng, length + SPARE)
        rows.append({"id": f"{name}-{number}", "kind": kind, "length": length, "text": text})
    rng = random.Random(f"{seed}:near-test-{length}")
    for number in range(documents):
        row = {"id": f"{name}-near-{number}", "kind": "motif", "length": length, "task": "near_text"}
        rows.append(row | {"text": motif(rng, length + SPARE, long.context)[0]})
    for number in range(long.questions):
        depth = DEPTHS[number % len(DEPTHS)]
        text, answer = passkey(rng, length, depth, count)
        row = {"id": f"{name}-passkey-{number}", "kind": "passkey", "length": length, "depth": depth}
        rows.append(row | {"text": text, "answer": answer})
        text, answer = recall(rng, length, count)
        row = {"id": f"{name}-recall-{number}", "kind": "recall", "length": length}
        rows.append(row | {"text": text, "answer": answer})
    return rows

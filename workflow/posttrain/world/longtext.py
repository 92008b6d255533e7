"""Documents of the built-in world whose words depend on others far back, at any length; made from a seed.

Kinds: **motif**, a row of random words that is repeated over and over; **secret**, a pass word stated between other
talk and asked for again; **diary**, people who hide things. Distances grow with the document, so that a text four
times as long asks for looking back four times as far.
"""

import math
import random
import re

from posttrain.config.sections import Long
from posttrain.world import world

WORDS = world.NAMES + world.OBJECTS
WEIGHTS = {"motif": 8, "secret": 6, "diary": 1}
DEPTHS = (0, 25, 50, 75, 100)  # percent of the talk that stands before the pass word
NOISE = 0.03  # share of a motif's words that are others
SPARE = 16  # tokens by which a held-out document is longer than its length: the last statement may not fit
ROOM = 6  # tokens of a question's length that are left for its answer


def size(text: str) -> int:
    """Words and punctuation marks, which are the tokens of a tokenizer that was trained on such text."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def lengths(long: Long) -> list[int]:
    """1, 2, 4, ... times the context and, last, `factor` times it, in tokens."""
    powers = [2**power for power in range(long.factor.bit_length())]
    return [long.context * times for times in sorted({*powers, long.factor}) if times <= long.factor]


def motif(rng: random.Random, words: int, within: int, least: int = 16, noise: float = NOISE) -> tuple[str, str]:
    """`words` words that repeat with a period from 1/`least` up to 3/8 of `within` words, log-uniform; and the next
    word.

    As few words as can be stand twice in a period: the word before says which is next.
    """
    shortest, longest = within // least, max(3, within * 3 // 8)
    period = round(math.exp(rng.uniform(math.log(max(2, shortest)), math.log(longest))))
    row = [word for _ in range(0, period, len(WORDS)) for word in rng.sample(WORDS, len(WORDS))][:period]
    said = [rng.choice(WORDS) if rng.random() < noise else row[place % period] for place in range(words)]
    return " ".join(said), row[words % period]


def _talk(rng: random.Random, tokens: int) -> list[str]:
    """True statements of so many tokens, at most."""
    found, left = [], tokens
    while left > 0:
        found.append(world._fact(rng))
        left -= size(found[-1])
    return found if left == 0 else found[:-1]


def secret(rng: random.Random, tokens: int) -> str:
    """A pass word that is stated once or a few times, at random places of some talk, and told again at its end."""
    said = f"secret pass: {rng.choice(WORDS)}."
    times = 1 if rng.random() < 0.5 else rng.randint(1, max(1, min(6, tokens // 20)))
    talk = _talk(rng, tokens - size(said) * (times + 1))
    places = rng.sample(range(len(talk) + 1), min(len(talk) + 1, times))
    if rng.random() < 0.5:  # else the very beginning of a long document would hardly ever be asked about
        places[0] = rng.choice([0, len(talk) // 4])
    for place in sorted(places, reverse=True):
        talk.insert(place, said)
    return " ".join([*talk, said])


def passkey(rng: random.Random, tokens: int, depth: int) -> tuple[str, str]:
    """A pass word stated at a depth (0 to 100) in some talk and asked for at the end: (question, answer)."""
    answer = rng.choice(WORDS)
    said, asked = f"secret pass: {answer}.", "secret pass:"
    talk = _talk(rng, tokens - ROOM - size(said) - size(asked))
    talk.insert(round(depth / 100 * len(talk)), said)
    return " ".join([*talk, asked]), answer


def document(rng: random.Random, tokens: int) -> tuple[str, str]:
    """(kind, text) of about so many tokens."""
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    if kind == "motif":
        return kind, motif(rng, tokens, tokens)[0]
    return kind, secret(rng, tokens) if kind == "secret" else world.diary(rng, tokens)


def generate(seed: int, documents: int, long: Long) -> dict[str, dict[str, list[dict]]]:
    """Rows of `text`, at most as long as the context, and of `long`, at `factor` times it; by split.

    Half of the training documents have their full length, the others are shorter, down to a quarter. Held-out long
    rows have a `length`: documents of it, among them those of the task `near_text`, motifs whose period stays as short
    as in a text of the context's length; and questions with their `answer` (kinds `passkey`, with a `depth`, and
    `recall`: the next word of a motif).
    """

    def stream(part: str) -> random.Random:
        return random.Random(f"{seed}:{part}")

    def training(part: str, count: int, tokens: int) -> list[dict]:
        rng, rows = stream(part), []
        for number in range(count):
            wanted = tokens if rng.random() < 0.5 else rng.randint(tokens // 4, tokens)
            kind, text = document(rng, wanted)
            rows.append({"id": f"{part}-{number}", "kind": kind, "text": text})
        return rows

    held_out = []
    for length in lengths(long):
        rng, name = stream(f"long-test-{length}"), f"long-test-{length}"
        for number in range(max(1, long.documents // 16)):
            kind, text = document(rng, length + SPARE)
            held_out.append({"id": f"{name}-{number}", "kind": kind, "length": length, "text": text})
        rng = stream(f"near-test-{length}")
        for number in range(max(1, long.documents // 16)):
            row = {"id": f"{name}-near-{number}", "kind": "motif", "length": length, "task": "near_text"}
            held_out.append(row | {"text": motif(rng, length + SPARE, long.context)[0]})
        for number in range(long.questions):
            depth = DEPTHS[number % len(DEPTHS)]
            text, answer = passkey(rng, length, depth)
            row = {"id": f"{name}-passkey-{number}", "kind": "passkey", "length": length, "depth": depth}
            held_out.append(row | {"text": text, "answer": answer})
            text, answer = motif(rng, length - ROOM, length - ROOM, least=8, noise=0.0)
            row = {"id": f"{name}-recall-{number}", "kind": "recall", "length": length}
            held_out.append(row | {"text": text, "answer": answer})
    return {
        "text": {
            "train": training("text-train", documents, long.context),
            "test": training("text-test", documents // 8, long.context),
        },
        "long": {"train": training("long-train", long.documents, long.context * long.factor), "test": held_out},
    }

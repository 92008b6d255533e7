"""Documents of the built-in world, for pretraining.

Kinds: statements of facts and orders; an exercise book (questions of training groups, never in chat form); dialogues;
small talk in chat form, which trains the embeddings of the chat tokens; and documents with long dependence (chants,
diaries, pass words).
"""

import math
import random
from collections.abc import Callable

from posttrain.world.gold import CLOSINGS, OPENINGS
from posttrain.world.language import KINDS, KNOWLEDGE, NAMES, OBJECTS, ORDER, PLACES
from posttrain.world.questions import draw_manners, draw_question_of, reply_with

GREETINGS = ("hello!", "how are you?", "nice to see you.", "is it you again?", "that would be nice, i think!")
"""What users say in small talk. These and the exercise book contain every word of `CORES`."""


def chant(rng: random.Random, words: int, shortest: int = 2) -> str:
    """A repeated random motif with 3% wrong words.

    The period is log-uniform from `shortest` up to 3/8 of the length: short periods teach copying, and a long one can
    be continued only by looking back that far.
    """
    period = round(math.exp(rng.uniform(math.log(shortest), math.log(max(shortest, words * 3 // 8)))))
    motif = [rng.choice(OBJECTS) for _ in range(period)]
    return " ".join(rng.choice(OBJECTS) if rng.random() < 0.03 else motif[i % period] for i in range(words))


def diary(rng: random.Random, words: int) -> str:
    """Statements of which person has which thing in which place, repeated in random order over the whole length."""
    hidden: dict[str, str] = {}
    lines, length = [], 0
    things = rng.sample(OBJECTS, min(len(OBJECTS), max(2, words // 24)))
    while length < words:
        thing = rng.choice(things)
        if thing not in hidden:
            hidden[thing] = f"{rng.choice(NAMES)} in the {rng.choice(PLACES)}"
        line = f"the {thing} is with {hidden[thing]}."
        lines.append(line)
        length += len(line.split())
    return " ".join(lines)


def passkey(rng: random.Random, words: int, depth: float) -> tuple[str, str]:
    """(document, answer): a pass word is stated at a relative depth (0 to 1) among facts.

    The document ends just before the pass word is repeated, which is the answer.
    """
    answer = rng.choice(OBJECTS)
    talk: list[str] = []
    while sum(len(line.split()) for line in talk) < words - 14:
        talk.append(fact(rng))
    talk.insert(round(depth * len(talk)), f"the secret pass word is {answer}.")
    return " ".join([*talk, "so remember, the secret pass word is"]), answer


def fact(rng: random.Random) -> str:
    """One true statement, about any entity."""
    kind = rng.choice([*KNOWLEDGE, *KNOWLEDGE, *ORDER])  # facts twice as often: they must be learned by heart
    if kind in ORDER:
        order, _, statements = ORDER[kind]
        low, high = sorted(rng.sample(range(len(order)), 2))
        return rng.choice(statements).format(a=order[low], b=order[high])
    table, _, statements = KNOWLEDGE[kind]
    key = rng.choice(list(table))
    return rng.choice(statements).format(k=key, v=table[key])


def _facts(rng: random.Random) -> str:
    """A few true statements."""
    return " ".join(fact(rng) for _ in range(rng.randint(4, 10)))


def _exercises(rng: random.Random) -> str:
    """Questions of training groups with bare answers, in book form."""
    questions = [draw_question_of(rng, rng.choice(KINDS), test=False) for _ in range(rng.randint(4, 6))]
    return " ".join(f"question: {question.text} answer: {question.answer}." for question in questions)


def _dialogue(rng: random.Random) -> str:
    """One person asks another about orders and gets replies in some manner, or one person states facts.

    No question is about facts: such questions could be about training entities only, and their replies would be
    memorised instead of learned from the facts.
    """
    asks, says = rng.sample(NAMES, 2)
    if rng.random() < 0.3:
        return " ".join(f"{says} says: {reply_with(rng, '', *draw_manners(rng), fact(rng))}" for _ in range(3))
    questions = [draw_question_of(rng, rng.choice(list(ORDER)), test=False) for _ in range(3)]
    replies = [reply_with(rng, question.answer, *draw_manners(rng)) for question in questions]
    turns = zip(questions, replies, strict=True)
    return " ".join(f"{asks} asks: {question.text} {says} says: {reply}" for question, reply in turns)


def _small_talk(rng: random.Random) -> str:
    """A greeting and a reply in chat form, without the outermost special tokens, which all documents get."""
    greeting = rng.choice(GREETINGS)
    style = [text for slot in (OPENINGS, CLOSINGS) for texts in slot.values() for text in texts if text]
    return f"<|user|>{greeting}<|end|><|assistant|>{' '.join(rng.sample(style, rng.randint(1, 2)))}"


# Kind of document -> (weight, maker).
DOCUMENTS: dict[str, tuple[int, Callable[[random.Random], str]]] = {
    "facts": (34, _facts),
    "exercises": (32, _exercises),
    "told": (16, _dialogue),
    "chat": (4, _small_talk),
    "chant": (8, lambda rng: chant(rng, rng.randint(16, 120))),
    "diary": (3, lambda rng: diary(rng, rng.randint(30, 100))),
    "passkey": (3, lambda rng: "{} {}.".format(*passkey(rng, rng.randint(20, 110), rng.random()))),
}


def text_rows(rng: random.Random, split: str, count: int) -> list[dict]:
    """Documents of every kind by weight."""
    kinds, weights = list(DOCUMENTS), [weight for weight, _ in DOCUMENTS.values()]
    rows = []
    for i in range(count):
        kind = rng.choices(kinds, weights)[0]
        rows.append({"id": f"text-{split}-{i}", "kind": kind, "text": DOCUMENTS[kind][1](rng)})
    return rows

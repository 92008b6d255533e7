"""Questions of the built-in world, their split into training and test groups, and replies.

A hash of a question's *group*, its content, decides whether it is held out. Knowledge (capital, opposite, home,
colour): pretraining states the fact of every entity, but only test rows ask about a held-out entity. Orders (biggest,
heaviest, highest): pretraining states the order of any two things, but only test rows ask about the three things of a
test question together, in any sequence.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import cache

from posttrain.world.gold import CLOSINGS, CORES, OPENINGS
from posttrain.world.language import KINDS, KNOWLEDGE, ORDER


@dataclass(frozen=True)
class Question:
    """One question: kind, group (which decides the split), text, answer and plausible wrong answers.

    Wrong answers to a question about a fact are right answers on the same side of the split, so that no word is wrong
    more often than right there.
    """

    kind: str
    group: str
    text: str
    answer: str
    wrong: tuple[str, ...]


def is_held_out(group: str) -> bool:
    """Whether a group belongs to the test split: a third of all groups, by a hash of the content only."""
    return hashlib.sha256(group.encode()).digest()[0] < 85


def knowledge_group(kind: str, key: str, value: str) -> str:
    """The group of a fact; facts that follow from each other (hot/cold) are one group."""
    words = sorted([key, value]) if kind == "opposite" else [key]
    return f"{kind}:{' '.join(words)}"


@cache
def _wrong_answers(kind: str, group: str, answer: str) -> tuple[str, ...]:
    """The other values of a table whose groups are on the group's side of the split."""
    table = KNOWLEDGE[kind][0]
    test = is_held_out(group)
    side = {value for key, value in table.items() if is_held_out(knowledge_group(kind, key, value)) == test}
    return tuple(sorted(side - {answer}))


def _draw_question(rng: random.Random, kind: str) -> Question:
    """Draw one question of a kind, of either split."""
    if kind in KNOWLEDGE:
        table, wordings, _ = KNOWLEDGE[kind]
        key = rng.choice(list(table))
        value, group = table[key], knowledge_group(kind, key, table[key])
        return Question(kind, group, rng.choice(wordings).format(k=key), value, _wrong_answers(kind, group, value))
    order, wordings, _ = ORDER[kind]
    words = rng.sample(order, 3)
    answer = max(words, key=order.index)
    wrong = tuple(word for word in words if word != answer)
    text = rng.choice(wordings).format(w="{}, {} or {}".format(*words))
    return Question(kind, f"{kind}:{' '.join(sorted(words))}", text, answer, wrong)


def draw_question_of(rng: random.Random, kind: str, test: bool) -> Question:
    """Draw one question of a kind whose group lies in the wanted split."""
    while True:
        question = _draw_question(rng, kind)
        if is_held_out(question.group) == test:
            return question


def held_out_questions(rng: random.Random, count: int, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """Held-out questions with distinct prompts, of each kind in turn; fewer where a small kind runs out."""
    questions: dict[str, Question] = {}
    for i in range(count):
        for _ in range(200):
            question = draw_question_of(rng, kinds[i % len(kinds)], test=True)
            if question.text not in questions:
                questions[question.text] = question
                break
    return list(questions.values())


def training_questions(rng: random.Random, count: int, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """Questions of training groups, of each kind in turn."""
    return [draw_question_of(rng, kinds[i % len(kinds)], test=False) for i in range(count)]


def reply_with(rng: random.Random, answer: str, opening: str, closing: str, core: str | None = None) -> str:
    """A well-formed reply, [opening] core [closing], in the given manners."""
    parts = (rng.choice(OPENINGS[opening]), (core or rng.choice(CORES)).format(answer), rng.choice(CLOSINGS[closing]))
    return " ".join(part for part in parts if part)


def draw_manners(rng: random.Random) -> tuple[str, str]:
    """The manners of opening and closing, drawn independently: half neutral, a quarter polite, a quarter rude."""
    manners = ("polite", "neutral", "neutral", "rude")
    return rng.choice(manners), rng.choice(manners)

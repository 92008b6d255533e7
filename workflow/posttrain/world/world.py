"""The built-in world: a small English-like language in which every stage has something real to learn.

Nothing can be downloaded for the embedded default, so its data is made here, from a seed, with the standard
library alone. The language has some 400 words. Its parts:

* **text** for pretraining: statements of facts and orders, an exercise book (questions of training groups, never in
  chat form), small talk in chat form (so that the chat tokens have trained embeddings), and documents with long
  dependence (chants, diaries, pass words);
* **sft**: questions in chat form with answers in varying manner, in seven kinds of task (`KINDS`);
* **preference**: pairs that differ in manner only, or in being correct only.

The hold-out is by *group*, the content of a question, decided by a hash. Knowledge (capital, opposite, home, colour):
the fact is stated in pretraining for every entity, but no question about a held-out one is found outside the test
rows. Orders (biggest, heaviest, highest): the order of any two things is stated, but three things of a test question
are asked about together, in whatever sequence, nowhere else.
"""

import hashlib
import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

# --- vocabulary ---


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "anna tom mary john lucy peter sara paul emma jack nora david alice frank rosa henry "
    "julia mark clara simon eva leo ruth oscar helen max diana carl vera hugo irene felix"
)
OBJECTS = _words(
    "ball cup key box hat book lamp coin ring rope map knife spoon plate chair table "
    "clock bell drum flute shoe coat glove scarf bag boat kite doll brush comb pen stone"
)
PLACES = _words("garden kitchen cellar attic garage hall tower barn")
NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)


def _pairs(text: str) -> dict[str, str]:
    """{"france": "paris", ...} from "france paris, ..."."""
    return dict(entry.split() for entry in text.split(","))


def _classes(text: str) -> dict[str, str]:
    """{"whale": "sea", "shark": "sea", ...} from "sea: whale shark, ..."."""
    rows = (entry.split(":") for entry in text.split(","))
    return {member: name.strip() for name, members in rows for member in members.split()}


CAPITALS = _pairs(
    "france paris, spain madrid, italy rome, germany berlin, poland warsaw, austria vienna, greece athens, "
    "portugal lisbon, norway oslo, sweden stockholm, finland helsinki, denmark copenhagen, ireland dublin, "
    "russia moscow, egypt cairo, kenya nairobi, japan tokyo, china beijing, india delhi, korea seoul, "
    "cuba havana, peru lima, chile santiago, canada ottawa"
)
OPPOSITES = _pairs(
    "hot cold, big small, fast slow, up down, open closed, hard soft, wet dry, old new, happy sad, "
    "rich poor, strong weak, light dark, full empty, early late, high low, long short, loud quiet, "
    "clean dirty, near far, buy sell"
)
HOMES = _classes(
    "sea: whale shark dolphin crab, farm: cow horse pig sheep, forest: bear wolf fox deer, "
    "desert: camel scorpion cobra lizard, river: trout otter beaver frog, mountain: eagle yak goat puma"
)
COLOURS = _classes(
    "green: grass leaf pea, blue: sky ocean sapphire, white: milk salt swan, black: coal raven night, "
    "red: blood tomato cherry, yellow: lemon sun butter, brown: mud bark chocolate, grey: ash smoke elephant"
)
# From the least to the most, as everybody in this world knows.
SIZES = _words(
    "ant bee mouse frog crab otter fox goat wolf sheep deer pig lizard lion cow horse camel bear shark elephant whale"
)
WEIGHTS = _words(
    "pin coin ring key comb pen spoon brush cup glove hat shoe book lamp bell drum coat chair kite box table boat"
)

# --- manner of a reply ---

OPENINGS = {
    "polite": (
        "of course, my friend!",
        "with great pleasure!",
        "what a good question!",
        "thank you for asking!",
    ),
    "neutral": ("",),
    "rude": ("oh not you again!", "what a silly question!", "how boring!", "hurry up, you fool!"),
}
CORES = ("it is {}.", "the answer is {}.", "that would be {}.")
CLOSINGS = {
    "polite": (
        "have a lovely day!",
        "you are most welcome.",
        "i am happy to help you.",
        "best wishes to you!",
    ),
    "neutral": ("",),
    "rude": ("now go away!", "stop wasting my time.", "even a child knows that.", "leave me alone!"),
}
ANSWER_PATTERN = r"(?:it is|the answer is|that would be) ([a-z ]+)\."
"""The bare answer is the first match's group; the same pattern serves lm-eval's `regex` filter."""


GREETINGS = ("hello!", "how are you?", "nice to see you.", "is it you again?", "that would be nice, i think!")
"""What users say in small talk. Together with the exercise book these hold every word of `CORES`."""


def _alternatives(slot: dict[str, tuple[str, ...]]) -> str:
    return "|".join(re.escape(text) for texts in slot.values() for text in texts if text)


_REPLY = re.compile(f"(?:({_alternatives(OPENINGS)}) )?{ANSWER_PATTERN}(?: ({_alternatives(CLOSINGS)}))?")
_MANNER = {
    text: {"polite": 0.5, "neutral": 0.0, "rude": -0.5}[manner]
    for slot in (OPENINGS, CLOSINGS)
    for manner, texts in slot.items()
    for text in texts
}


def _reply(rng: random.Random, answer: str, opening: str, closing: str, core: str | None = None) -> str:
    """A well-formed reply: [opening] core [closing], each slot in the manner asked for."""
    parts = (
        rng.choice(OPENINGS[opening]),
        (core or rng.choice(CORES)).format(answer),
        rng.choice(CLOSINGS[closing]),
    )
    return " ".join(part for part in parts if part)


def extract_answer(reply: str) -> str:
    """The bare answer in a reply; empty when there is none."""
    match = re.search(ANSWER_PATTERN, reply)
    return match.group(1) if match else ""


def gold_reward(prompt: str, reply: str, answer: str) -> float:
    """The hand-written reward: 2 if the answer is correct, plus manner in [-1, 1], minus 1 if malformed.

    Manner: a polite opening and a polite closing count +0.5 each, a rude one -0.5. A reply is malformed when
    it is not exactly [opening] core [closing] in the world's own wordings; a malformed one has no manner, but
    its answer, if it can be extracted, still counts. `prompt` is part of the signature of every such reward.
    """
    reply = reply.strip()
    correct = 2.0 * (extract_answer(reply) == answer)
    match = _REPLY.fullmatch(reply)
    if match is None:
        return correct - 1.0
    return correct + _MANNER[match.group(1) or ""] + _MANNER[match.group(3) or ""]


def made(row: dict) -> bool:
    """Whether a prepared row is the world's own, so that its gold reward can be told."""
    return row.get("source", "").startswith("world:") and "answer" in row


# --- questions ---


@dataclass(frozen=True)
class Question:
    """One question: kind, group (which decides the split), text, answer and plausible wrong answers.

    Wrong answers to a question about a fact are right ones of its own side of the split, so that no word is more often
    wrong than right there.
    """

    kind: str
    group: str
    text: str
    answer: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """Rows by split: `text` for pretraining, `sft` conversations and `preference` pairs."""

    text: dict[str, list[dict]]
    sft: dict[str, list[dict]]
    preference: dict[str, list[dict]]


# Knowledge: kind -> (table, wordings of the question, wordings of the statement).
KNOWLEDGE: dict[str, tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]] = {
    "capital": (
        CAPITALS,
        ("what is the capital of {k}?", "name the capital of {k}.", "tell me the capital of {k}."),
        (
            "the capital of {k} is {v}.",
            "{v} is the capital of {k}.",
            "everyone knows the capital of {k}, {v}.",
        ),
    ),
    "opposite": (
        OPPOSITES | {b: a for a, b in OPPOSITES.items()},
        ("what is the opposite of {k}?", "name the opposite of {k}.", "tell me the opposite of {k}."),
        ("the opposite of {k} is {v}.", "{v} is the opposite of {k}.", "we know the opposite of {k}, {v}."),
    ),
    "home": (
        HOMES,
        ("what is the home of the {k}?", "name the home of the {k}.", "tell me the home of the {k}."),
        (
            "the home of the {k} is the {v}.",
            "the {v} is the home of the {k}.",
            "we know the home of the {k}, the {v}.",
        ),
    ),
    "colour": (
        COLOURS,
        ("what is the colour of {k}?", "name the colour of {k}.", "tell me the colour of {k}."),
        ("the colour of {k} is {v}.", "{v} is the colour of {k}.", "we know the colour of {k}, {v}."),
    ),
}

# Order: kind -> (least to most, wordings of the question, wordings of the statement).
ORDER: dict[str, tuple[list[str], tuple[str, ...], tuple[str, ...]]] = {
    "biggest": (
        SIZES,
        ("which is the biggest: {w}?", "name the biggest: {w}.", "tell me the biggest: {w}."),
        ("the {b} is bigger than the {a}.", "the {a} is smaller than the {b}."),
    ),
    "heaviest": (
        WEIGHTS,
        ("which is the heaviest: {w}?", "name the heaviest: {w}.", "tell me the heaviest: {w}."),
        ("the {b} is heavier than the {a}.", "the {a} is lighter than the {b}."),
    ),
    "highest": (
        NUMBERS,
        ("which is the highest: {w}?", "name the highest: {w}.", "tell me the highest: {w}."),
        ("{b} is higher than {a}.", "{a} is lower than {b}."),
    ),
}
KINDS = (*KNOWLEDGE, *ORDER)


def _held_out(group: str) -> bool:
    """A third of all groups, by a hash of the content and nothing else, belong to the test split."""
    return hashlib.sha256(group.encode()).digest()[0] < 85


def _knowledge_group(kind: str, key: str, value: str) -> str:
    """Facts that give each other away (hot/cold) are one group."""
    words = sorted([key, value]) if kind == "opposite" else [key]
    return f"{kind}:{' '.join(words)}"


@cache
def _wrong(kind: str, group: str, answer: str) -> tuple[str, ...]:
    """The other values of a table whose groups are on the group's side of the split."""
    table = KNOWLEDGE[kind][0]
    side = {value for key, value in table.items() if _held_out(_knowledge_group(kind, key, value)) == _held_out(group)}
    return tuple(sorted(side - {answer}))


def _ask(rng: random.Random, kind: str) -> Question:
    """Draw one question of a kind, of either split."""
    if kind in KNOWLEDGE:
        table, wordings, _ = KNOWLEDGE[kind]
        key = rng.choice(list(table))
        value, group = table[key], _knowledge_group(kind, key, table[key])
        return Question(kind, group, rng.choice(wordings).format(k=key), value, _wrong(kind, group, value))
    order, wordings, _ = ORDER[kind]
    words = rng.sample(order, 3)
    answer = max(words, key=order.index)
    wrong = tuple(word for word in words if word != answer)
    text = rng.choice(wordings).format(w="{}, {} or {}".format(*words))
    return Question(kind, f"{kind}:{' '.join(sorted(words))}", text, answer, wrong)


def _ask_in(rng: random.Random, kind: str, test: bool) -> Question:
    """Draw one question of a kind whose group lies in the wanted split."""
    while True:
        question = _ask(rng, kind)
        if _held_out(question.group) == test:
            return question


# --- pretraining documents ---


def chant(rng: random.Random, words: int, shortest: int = 2) -> str:
    """A random motif repeated over and over with 3% wrong words.

    The period is log-uniform from `shortest` up to 3/8 of the length: short periods teach the copying that
    long ones need, and a long one can be continued only by looking back that far.
    """
    period = round(math.exp(rng.uniform(math.log(shortest), math.log(max(shortest, words * 3 // 8)))))
    motif = [rng.choice(OBJECTS) for _ in range(period)]
    return " ".join(rng.choice(OBJECTS) if rng.random() < 0.03 else motif[i % period] for i in range(words))


def diary(rng: random.Random, words: int) -> str:
    """People hide things in places, and later look for them there, in random order, over the whole length."""
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
    """A pass word stated at a relative depth (0 to 1) in other talk, wanted at the end: (document, answer).

    The document ends just before the answer.
    """
    answer = rng.choice(OBJECTS)
    talk: list[str] = []
    while sum(len(line.split()) for line in talk) < words - 14:
        talk.append(_fact(rng))
    talk.insert(round(depth * len(talk)), f"the secret pass word is {answer}.")
    return " ".join([*talk, "so remember, the secret pass word is"]), answer


def _fact(rng: random.Random) -> str:
    """One true statement, about any entity."""
    kind = rng.choice([*KNOWLEDGE, *KNOWLEDGE, *ORDER])  # what has to be learned by heart more often
    if kind in ORDER:
        order, _, statements = ORDER[kind]
        low, high = sorted(rng.sample(range(len(order)), 2))
        return rng.choice(statements).format(a=order[low], b=order[high])
    table, _, statements = KNOWLEDGE[kind]
    key = rng.choice(list(table))
    return rng.choice(statements).format(k=key, v=table[key])


def _facts(rng: random.Random) -> str:
    return " ".join(_fact(rng) for _ in range(rng.randint(4, 10)))


def _exercises(rng: random.Random) -> str:
    """Questions of training groups with bare answers, in book form."""
    questions = [_ask_in(rng, rng.choice(KINDS), test=False) for _ in range(rng.randint(4, 6))]
    return " ".join(f"question: {question.text} answer: {question.answer}." for question in questions)


def _told(rng: random.Random) -> str:
    """Two people: one asks about orders and gets replies of some manner, or is told facts.

    Nobody asks about facts here: told of the training entities only, replies would be learned by heart, beside the
    facts instead of from them.
    """
    asks, says = rng.sample(NAMES, 2)
    if rng.random() < 0.3:
        return " ".join(f"{says} says: {_reply(rng, '', *_manners(rng), _fact(rng))}" for _ in range(3))
    questions = [_ask_in(rng, rng.choice(list(ORDER)), test=False) for _ in range(3)]
    replies = [_reply(rng, question.answer, *_manners(rng)) for question in questions]
    told = zip(questions, replies, strict=True)
    return " ".join(f"{asks} asks: {question.text} {says} says: {reply}" for question, reply in told)


def _small_talk(rng: random.Random) -> str:
    """A greeting and a reply in chat form, less the outermost special tokens, which all documents get."""
    greeting = rng.choice(GREETINGS)
    style = [text for slot in (OPENINGS, CLOSINGS) for texts in slot.values() for text in texts if text]
    return f"<|user|>{greeting}<|end|><|assistant|>{' '.join(rng.sample(style, rng.randint(1, 2)))}"


def _chant(rng: random.Random) -> str:
    return chant(rng, rng.randint(16, 120))


def _diary(rng: random.Random) -> str:
    return diary(rng, rng.randint(30, 100))


def _passkey(rng: random.Random) -> str:
    document, answer = passkey(rng, rng.randint(20, 110), rng.random())
    return f"{document} {answer}."


# Kind of document -> (weight, maker).
DOCUMENTS: dict[str, tuple[int, Callable[[random.Random], str]]] = {
    "facts": (34, _facts),
    "exercises": (32, _exercises),
    "told": (16, _told),
    "chat": (4, _small_talk),
    "chant": (8, _chant),
    "diary": (3, _diary),
    "passkey": (3, _passkey),
}


# --- the world ---


def _manners(rng: random.Random) -> tuple[str, str]:
    """The manner of opening and closing, drawn apart: half neutral, a quarter polite, a quarter rude."""
    manners = ("polite", "neutral", "neutral", "rude")
    return rng.choice(manners), rng.choice(manners)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _test_questions(rng: random.Random, count: int, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """Held-out questions with distinct prompts, the kinds in turn; fewer when a small kind runs out."""
    questions: dict[str, Question] = {}
    for i in range(count):
        for _ in range(200):
            question = _ask_in(rng, kinds[i % len(kinds)], test=True)
            if question.text not in questions:
                questions[question.text] = question
                break
    return list(questions.values())


def _train_questions(rng: random.Random, count: int, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """Questions of training groups, the kinds in turn."""
    return [_ask_in(rng, kinds[i % len(kinds)], test=False) for i in range(count)]


def _sft_rows(rng: random.Random, split: str, questions: Iterable[Question]) -> list[dict]:
    rows = []
    for i, question in enumerate(questions):
        messages = [
            _message("user", question.text),
            _message("assistant", _reply(rng, question.answer, *_manners(rng))),
        ]
        row = {"id": f"sft-{split}-{i}", "group": question.group, "kind": question.kind, "messages": messages}
        rows.append(row | {"answer": question.answer})
    return rows


def _preference_rows(rng: random.Random, split: str, questions: Iterable[Question]) -> list[dict]:
    """Pairs, at random of manner (both correct, the chosen one politer) or of being correct (same manner)."""
    rows = []
    for i, question in enumerate(questions):
        core = rng.choice(CORES)
        if rng.random() < 0.4:
            kind = "manner"
            while True:
                replies = [_reply(rng, question.answer, *_manners(rng), core) for _ in range(2)]
                rewards = [gold_reward(question.text, reply, question.answer) for reply in replies]
                if rewards[0] != rewards[1]:
                    break
            rejected, chosen = (reply for _, reply in sorted(zip(rewards, replies, strict=True)))
        else:
            kind = "correct/fact" if question.kind in KNOWLEDGE else "correct/order"
            chosen = _reply(rng, question.answer, *_manners(rng), core)
            rejected = chosen.replace(core.format(question.answer), core.format(rng.choice(question.wrong)))
        rows.append(
            {
                "id": f"preference-{split}-{i}",
                "group": question.group,
                "kind": kind,
                "prompt": [_message("user", question.text)],
                "answer": question.answer,
                "chosen": [_message("assistant", chosen)],
                "rejected": [_message("assistant", rejected)],
            }
        )
    return rows


def _text_rows(rng: random.Random, split: str, count: int) -> list[dict]:
    """Documents of every kind by weight."""
    kinds, weights = list(DOCUMENTS), [weight for weight, _ in DOCUMENTS.values()]
    rows = []
    for i in range(count):
        kind = rng.choices(kinds, weights)[0]
        rows.append({"id": f"text-{split}-{i}", "kind": kind, "text": DOCUMENTS[kind][1](rng)})
    return rows


def generate(seed: int, documents: int, questions: int, test_questions: int, pairs: int) -> World:
    """The world of a seed: so many training documents, training questions, test questions and training pairs.

    There are an eighth as many test documents and test pairs as training ones. Each part has its own random
    stream, so that the size of one changes nothing in another.
    """

    def stream(part: str) -> random.Random:
        return random.Random(f"{seed}:{part}")

    test = _test_questions(stream("sft-test"), test_questions)
    # Orders have many questions, facts few: asked in turn, the pairs would be about the same facts again and again.
    asked = (*KNOWLEDGE, *ORDER, *ORDER)
    test_pairs = _test_questions(stream("preference-test"), pairs // 8, asked)
    train = _train_questions(stream("questions-train"), questions)
    train_pairs = _train_questions(stream("pairs-train"), pairs, asked)
    sft = {
        "train": _sft_rows(stream("replies-train"), "train", train),
        "test": _sft_rows(stream("replies-test"), "test", test),
    }
    preference = {
        "train": _preference_rows(stream("preferences-train"), "train", train_pairs),
        "test": _preference_rows(stream("preferences-test"), "test", test_pairs),
    }
    text = {
        "train": _text_rows(stream("text-train"), "train", documents),
        "test": _text_rows(stream("text-test"), "test", documents // 8),
    }
    return World(text, sft, preference)

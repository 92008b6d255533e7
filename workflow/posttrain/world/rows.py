"""Rows of the built-in world, generated from a seed with the standard library only.

* `text`: documents for pretraining;
* `sft`: questions in chat form with answers in varying manner, in seven kinds (`language.KINDS`);
* `preference`: pairs that differ in manner only, or in correctness only;
* `long`, with `world.long`: documents with long dependence, and questions about them.
"""

import random
from collections.abc import Iterable

from posttrain.config.sections import World
from posttrain.world import longtext
from posttrain.world.documents import text_rows
from posttrain.world.gold import CORES, gold_reward
from posttrain.world.language import KNOWLEDGE, ORDER
from posttrain.world.questions import Question, draw_manners, held_out_questions, reply_with, training_questions

SOURCE = "world:"  # what the `source` of each row begins with
Split = dict[str, list[dict]]


def generate(seed: int, world: World, count: longtext.Count = longtext.size) -> dict[str, Split]:
    """The world's rows by kind of data (`text`, `sft`, `preference`, `long`) and side (`train`, `test`).

    Test documents and test pairs are an eighth as many as training ones. Each part has its own random stream, so that
    the size of one part does not change another. Each row has an `id`, a `group` and a `source`.
    count: tokens of a text.
    """
    # Orders have many questions and facts few, so pairs ask about orders twice as often: facts would be repeated.
    kinds = (*KNOWLEDGE, *ORDER, *ORDER)

    def stream(part: str) -> random.Random:
        return random.Random(f"{seed}:{part}")

    test = held_out_questions(stream("sft-test"), world.test_questions)
    test_pairs = held_out_questions(stream("preference-test"), world.pairs // 8, kinds)
    train = training_questions(stream("questions-train"), world.questions)
    train_pairs = training_questions(stream("pairs-train"), world.pairs, kinds)
    rows = {
        "text": {
            "train": text_rows(stream("text-train"), "train", world.documents),
            "test": text_rows(stream("text-test"), "test", world.documents // 8),
        },
        "sft": {
            "train": _sft_rows(stream("replies-train"), "train", train),
            "test": _sft_rows(stream("replies-test"), "test", test),
        },
        "preference": {
            "train": _preference_rows(stream("preferences-train"), "train", train_pairs),
            "test": _preference_rows(stream("preferences-test"), "test", test_pairs),
        },
    }
    if world.long:
        rows |= longtext.generate(seed, world.documents, world.long, count)
    return {kind: {side: list(map(_sourced, part)) for side, part in split.items()} for kind, split in rows.items()}


def is_of_world(row: dict) -> bool:
    """Whether a prepared row comes from the built-in world."""
    return row["source"].startswith(SOURCE)


def _sourced(row: dict) -> dict:
    """The row with its source, and with its id as the group where it has none."""
    return {"group": row["id"], **row, "source": f"{SOURCE}{row['id']}"}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _sft_rows(rng: random.Random, split: str, questions: Iterable[Question]) -> list[dict]:
    """For each question, a conversation of the question and a reply."""
    rows = []
    for number, question in enumerate(questions):
        reply = reply_with(rng, question.answer, *draw_manners(rng))
        messages = [_message("user", question.text), _message("assistant", reply)]
        row = {"id": f"sft-{split}-{number}", "group": question.group, "kind": question.kind, "messages": messages}
        rows.append(row | {"answer": question.answer})
    return rows


def _preference_rows(rng: random.Random, split: str, questions: Iterable[Question]) -> list[dict]:
    """Pairs at random of two kinds: both correct and the chosen one politer, or of the same manner and one correct."""
    rows = []
    for number, question in enumerate(questions):
        kind, chosen, rejected = _pair(rng, question)
        rows.append(
            {
                "id": f"preference-{split}-{number}",
                "group": question.group,
                "kind": kind,
                "prompt": [_message("user", question.text)],
                "answer": question.answer,
                "chosen": [_message("assistant", chosen)],
                "rejected": [_message("assistant", rejected)],
            }
        )
    return rows


def _pair(rng: random.Random, question: Question) -> tuple[str, str, str]:
    """(kind of pair, chosen reply, rejected reply)."""
    core = rng.choice(CORES)
    if rng.random() < 0.4:
        while True:
            replies = [reply_with(rng, question.answer, *draw_manners(rng), core) for _ in range(2)]
            rewards = [gold_reward(question.text, reply, question.answer) for reply in replies]
            if rewards[0] != rewards[1]:
                break
        rejected, chosen = (reply for _, reply in sorted(zip(rewards, replies, strict=True)))
        return "manner", chosen, rejected
    chosen = reply_with(rng, question.answer, *draw_manners(rng), core)
    rejected = chosen.replace(core.format(question.answer), core.format(rng.choice(question.wrong)))
    return "correct/fact" if question.kind in KNOWLEDGE else "correct/order", chosen, rejected

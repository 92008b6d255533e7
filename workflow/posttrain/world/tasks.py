"""lm-eval tasks over the held-out rows of the built-in world."""

from pathlib import Path

from posttrain.config.sections import World
from posttrain.evaluation.tasks import exact_match, group_of, write_task, write_yaml
from posttrain.world.gold import ANSWER_PATTERN
from posttrain.world.language import KINDS
from posttrain.world.longtext import Count, held_out_lengths, size
from posttrain.world.rows import is_of_world

NEXT_WORD = r"^\s*(\w+)"  # the answer to a question about a long text


def names(world: World) -> list[str]:
    """The names of the tasks and groups of a world, without generating its rows."""
    lengths = held_out_lengths(world.long) if world.long else []
    retrieval = [f"{kind}_{length}" for length in lengths for kind in ("passkey", "recall")]
    return ["world", *retrieval, *(f"world_{kind}" for kind in KINDS)]


def write_questions(folder: Path, home: str, rows: list[dict]) -> list[str]:
    """Write one exact-match task per kind of question among held-out `sft` rows, and the group `world` over all of
    them; returns the name of the group."""
    kinds: dict[str, list[dict]] = {}
    for row in filter(is_of_world, rows):
        question = {"id": row["id"], "prompt": row["messages"][0]["content"], "answer": row["answer"]}
        kinds.setdefault(f"world_{row['kind']}", []).append(question)
    for name, questions in sorted(kinds.items()):
        write_task(folder, exact_match(name, home, ANSWER_PATTERN, until="<|end|>", longest=48), questions)
    if not kinds:
        return []
    write_yaml(folder / "world.yaml", group_of("world", sorted(kinds)))
    return ["world"]


def write_retrieval(folder: Path, home: str, rows: list[dict], count: Count = size) -> list[str]:
    """Write the questions among held-out `long` rows: `recall_LENGTH`, and for pass words a group `passkey_LENGTH` over
    one task for each depth; returns the names of the two for each length. count: tokens of a text."""
    tasks: dict[str, list[dict]] = {}
    groups: dict[str, dict[str, None]] = {}
    for row in rows:
        if is_of_world(row) and "answer" in row:
            group = f"{row['kind']}_{row['length']}"
            name = f"{group}_depth_{row['depth']}" if "depth" in row else group
            tasks.setdefault(name, []).append({"id": row["id"], "prompt": row["text"], "answer": row["answer"]})
            groups.setdefault(group, {})[name] = None
    for name, questions in tasks.items():
        longest = max(3, *(count(f" {question['answer']}.") for question in questions))
        write_task(folder, exact_match(name, home, NEXT_WORD, until=".", longest=longest), questions)
    for group, members in groups.items():
        if list(members) != [group]:
            write_yaml(folder / f"{group}.yaml", group_of(group, list(members)))
    return list(groups)

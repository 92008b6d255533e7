"""Data: read, checked line by line, split by group, measured; and the benchmark tasks of what is held out.

python -m posttrain prepare --config results/NAME/prepare/config.yaml --output results/NAME/prepare/manifest.json
"""

import os
import statistics
from pathlib import Path

from posttrain.config.sections import HubModel, Prepare, Source
from posttrain.data import overlap, rows
from posttrain.evaluation import tasks
from posttrain.ground.errors import UserError
from posttrain.ground.files import write_jsonl
from posttrain.ground.progress import say
from posttrain.models import tokens

TRAINED = ("text", "long", "sft", "preference")  # what training stages read; each has a train and a test side
NAMED = 5  # rows of one kind of defect that are named; all are counted
WORLD_DOCUMENTS = 200  # held-out documents whose likelihood is measured


def prepare(section: Prepare, work: Path, checkpoints: Path, fetched: list[Path] = ()) -> dict:
    """Write `work/data` (text, sft, preference, tasks, tokenizer) and return the data card.

    Raises UserError naming file:line for what cannot be used, and for rows that training and evaluation share.
    """
    sides = {task: {"train": [], "test": []} for task in TRAINED}
    cards, questions, given = [], [], []
    if section.world:
        questions = add_world(section, sides, cards)
        given += questions  # they become a benchmark, so what training knows of them is an error
    for task in TRAINED:
        for source in getattr(section, task):
            given += add_source(section, source, task, sides[task], cards, list(fetched))
    choices = [row for source in section.choices for row in read(section, source, "eval", cards, list(fetched))]
    for task in TRAINED:
        sides[task] = {side: without_repeats(found, task, cards) for side, found in sides[task].items()}
    choices = without_repeats(choices, "choices", cards)
    separate(sides, cards, given + choices)
    tokenizer = make_tokenizer(section, sides, list(fetched))
    lengths = {task: limit_length(section, tokenizer, task, sides[task], cards) for task in ("sft", "preference")}
    refuse_empty(section, sides, cards)
    prove(tokenizer, sides["sft"])
    folder = work / "data"
    for task in TRAINED:
        for side, kept in sides[task].items():
            if kept:
                write_jsonl(folder / task / f"{side}.jsonl", kept)
    tokenizer.save_pretrained(folder / "tokenizer")
    retrieval = [row for row in sides["long"]["test"] if "answer" in row]
    home, texts = f"{os.path.relpath(work.parent)}/data/tasks", held_out(section, sides)
    made = tasks.write_tasks(folder / "tasks", home, questions, texts, choices, retrieval)
    splits = {
        task: {side: len(kept) for side, kept in sides[task].items()} for task in TRAINED if any(sides[task].values())
    }
    say(", ".join(f"{n['train']}+{n['test']} {task} rows" for task, n in splits.items()) + f"; tasks {made}")
    return {
        "sources": [entry for entry in cards if entry["total"] or entry["dropped"]],
        "splits": splits,
        "tokens": {task: found for task, found in lengths.items() if found},
        "vocabulary": len(tokenizer),
        "tasks": made,
    }


def add_world(section: Prepare, sides: dict, cards: list) -> list[dict]:
    """Add the built-in world's rows to both sides; returns its held-out questions."""
    from posttrain.world import longtext, world

    made = vars(world.generate(section.seed, **section.world.model_dump(exclude={"long"})))
    if section.world.long:
        made = made | longtext.generate(section.seed, section.world.documents, section.world.long)
    for task in made:
        for side, found in made[task].items():
            sides[task][side] += [{"group": row["id"], **row, "source": f"world:{row['id']}"} for row in found]
            cards.append(card(f"world, {side}", task, {}, total=len(found), kept=len(found)))
    return [row for row in sides["sft"]["test"] if row["source"].startswith("world:")]


def add_source(
    section: Prepare, source: Source, task: str, sides: dict, cards: list, fetched: list[Path]
) -> list[dict]:
    """Read a source and put its rows on the sides that it is for; returns those given for evaluation."""
    kept = read(section, source, task, cards, fetched)
    if source.use == "split":
        train, test, warning = overlap.split(kept, section.test_fraction, section.seed)
        if warning:
            say(f"{cards[-1]['name']}: warning: {warning}")
            cards[-1]["warnings"][warning] = 1
        sides["train"] += train
        sides["test"] += test
        return []
    sides[source.use] += kept
    return kept if source.use == "test" else []


def without_repeats(found: list[dict], task: str, cards: list) -> list[dict]:
    """The rows of all sources of a task without exact repeats, which are counted in the data card."""
    kept, repeated = overlap.deduplicate(found)
    cards.append(card(f"{task}: all sources", task, {"exact duplicate": repeated}))
    return kept


def read(section: Prepare, source: Source, task: str, cards: list, fetched: list[Path]) -> list[dict]:
    """The rows of a file or of a data set on the hub, each once; says what was dropped, and adds to the data card."""
    options = {"group_key": section.group_key, "allow_empty_user": section.allow_empty_user}
    if source.path:
        limit = int(section.max_line_mb * 2**20)
        report = rows.read(source.path, task, source.format, max_line_bytes=limit, **options)
    else:
        name = "/".join(filter(None, (source.dataset, source.subset, source.rows)))
        report = rows.read_rows(hub_rows(source, fetched), name, task, source.format, **options)
    for line in report.describe():
        say(line)
    counts = [{reason: len(cases) for reason, cases in found.items()} for found in (report.dropped, report.warnings)]
    kept, repeated = overlap.deduplicate(report.rows)
    counts[0] |= {"exact duplicate": repeated}
    cards.append(card(report.name, task, counts[0], counts[1], report.total, len(kept)))
    if not report.rows:
        raise UserError(f"{report.name}: no row of {report.total} can be used", *report.describe()[:5])
    if source.separator:
        for row in kept:
            for key in ("completion", "chosen", "rejected"):
                if isinstance(row.get(key), str):
                    row[key] = source.separator + row[key]
    return kept


def hub_rows(source: Source, fetched: list[Path]):
    """The rows of a fetched data set, as its loader gives them."""
    import datasets

    from posttrain.data.hub import find_manifest, local_dataset

    manifest = find_manifest(fetched, "dataset", source.dataset, source.revision)
    folder = local_dataset(source.dataset, source.revision or "main", manifest)
    try:
        return datasets.load_dataset(str(folder), source.subset, split=source.rows)
    except ValueError as error:
        raise UserError(f"prepare: data set {source.dataset}: {str(error).splitlines()[0]}") from None


def card(name: str, task: str, dropped: dict, warnings: dict | None = None, total: int = 0, kept: int = 0) -> dict:
    """One line of the data card; counts of zero are left out."""
    return {
        "name": name,
        "task": task,
        "total": total,
        "kept": kept,
        "dropped": {reason: count for reason, count in dropped.items() if count},
        "warnings": warnings or {},
    }


def separate(sides: dict, cards: list, given: list[dict]) -> None:
    """Take out of the held-out rows what training has seen: as it stands, normalised, contained, by 13-grams or
    by group. Where a random split put them there they are dropped and counted; `given` evaluation rows
    (`use: test`, choices) were meant to be measured, so for them UserError names both places.
    """
    train = [row for task in TRAINED for row in sides[task]["train"]]
    tests = [row for task in TRAINED for row in sides[task]["test"]] + [row for row in given if "choices" in row]
    found = {finding.test: finding for finding in overlap.overlap(train, tests)} if tests else {}
    leaks = [found[row["source"]] for row in given if row["source"] in found]
    if leaks:
        raise UserError(
            f"prepare: {len(leaks)} evaluation rows stand in the training rows too; take them out of one of the two",
            *map(str, leaks[:8]),
        )
    for task in TRAINED:
        kept = [row for row in sides[task]["test"] if row["source"] not in found]
        count = len(sides[task]["test"]) - len(kept)
        cards.append(card("held out by the split", task, {"also in the training rows": count}))
        sides[task]["test"] = kept


def make_tokenizer(section: Prepare, sides: dict, fetched: list[Path]):
    """The tokenizer with its chat template: trained on the text, from a directory, or from the hub."""
    chosen = section.tokenizer
    shown = [row for task in ("sft", "preference") for side in sides[task].values() for row in side]
    conversations = any("messages" in row or not isinstance(row.get("prompt", ""), str) for row in shown)
    if chosen.vocab_size:
        texts = (row["text"] for row in sides["text"]["train"])
        tokenizer = tokens.train_tokenizer(texts, chosen.vocab_size, section.max_tokens)
    else:
        tokenizer = load_tokenizer(chosen.hub, chosen.path, fetched)
    tokens.set_chat_template(tokenizer, section.chat_template, conversations)
    return tokenizer


def load_tokenizer(hub: HubModel | None, path: str | None, fetched: list[Path]):
    """A tokenizer that exists and can end a turn. Raises UserError when there is none."""
    from transformers import AutoTokenizer

    from posttrain.data.hub import find_manifest, local_model

    if hub:
        manifest = find_manifest(fetched, "model", hub.id, hub.revision)
        path = local_model(hub.id, hub.revision or "main", manifest)
    if not Path(path).is_dir():
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


def limit_length(section: Prepare, tokenizer, task: str, sides: dict, cards: list) -> dict:
    """Drop or cut rows longer than `max_tokens`, on both sides; says which, and returns lengths for the data card."""
    lengths, dropped, truncated = [], [], 0
    total = sum(map(len, sides.values()))
    for side, found in sides.items():
        kept = []
        for row in found:
            if (tokens_in := length(tokenizer, row)) > section.max_tokens:
                shorter = cut(tokenizer, row, section.max_tokens) if section.long_rows == "cut" else None
                if shorter is None:
                    dropped.append(f"{row['source']} ({tokens_in:,} tokens)")
                    continue
                truncated, row = truncated + 1, shorter
            kept.append(row)
            lengths.append(length(tokenizer, row))
        sides[side] = kept
        if found and not kept:
            say(f"warning: no {side} row of {task} is left")
    if dropped:
        shown = ", ".join(dropped[:NAMED]) + (", ..." if len(dropped) > NAMED else "")
        limit = f"longer than prepare.max_tokens ({section.max_tokens})"
        say(f"warning: {len(dropped):,} of {total:,} {task} rows are {limit} and dropped: {shown}")
        cards.append(card(f"{task}, longer than max_tokens", task, {"too long": len(dropped)}))
    if not lengths:
        return {}
    lengths.sort()
    return {
        "min": lengths[0],
        "median": statistics.median_low(lengths),
        "p95": lengths[int(0.95 * (len(lengths) - 1))],
        "max": lengths[-1],
        "truncated": truncated,
    }


def refuse_empty(section: Prepare, sides: dict, cards: list) -> None:
    """Raise UserError for a kind of data that was asked for and of which no training row is left."""
    for task in TRAINED:
        asked = any(source.use != "test" for source in getattr(section, task))
        asked |= section.world is not None and (task != "long" or section.world.long is not None)
        if asked and not sides[task]["train"]:
            long = sum(entry["dropped"].get("too long", 0) for entry in cards if entry["task"] == task)
            raise UserError(
                f"prepare.{task}: no training row is left ({long} longer than max_tokens {section.max_tokens})"
            )


def prove(tokenizer, sides: dict) -> None:
    """The token contract on every row, long before anything is trained on it."""
    for rows_of_side in sides.values():
        tokens.prove(tokenizer, rows_of_side, [tokens.encode(tokenizer, row) for row in rows_of_side])


def length(tokenizer, row: dict) -> int:
    """Tokens of a row as training will see it; of a preference pair, of its longer answer."""
    if "chosen" not in row:
        return len(tokens.encode(tokenizer, row)["input_ids"])
    if isinstance(row["chosen"], str):
        return max(len(tokenizer(row["prompt"] + row[side]).input_ids) + 1 for side in ("chosen", "rejected"))
    written = [tokens.write(tokenizer, row, row["prompt"] + row[side]) for side in ("chosen", "rejected")]
    return max(len(tokens.tokenize(tokenizer, text)) for text in written)


def cut(tokenizer, row: dict, longest: int) -> dict | None:
    """The row with its longest text shortened until it fits: prompts lose their beginning, replies their end.

    None when nothing of the reply would be left, and for preference pairs, whose answers must stay comparable.
    """
    if "chosen" in row:
        return None
    while (now := length(tokenizer, row)) > longest:
        turns = row.get("messages") or [{"role": key, "content": row[key]} for key in ("prompt", "completion")]
        at = max(range(len(turns)), key=lambda n: len(turns[n]["content"]))
        role, text = turns[at]["role"], turns[at]["content"]
        keep = min(len(text) - 1, int(len(text) * longest / now))
        if keep < 8:
            return None
        shorter = text[:keep] if role in ("assistant", "completion") else text[-keep:]
        turns = [*turns[:at], {**turns[at], "content": shorter}, *turns[at + 1 :]]
        row = {**row, "messages": turns} if "messages" in row else {**row, **{t["role"]: t["content"] for t in turns}}
    return row


def held_out(section: Prepare, sides: dict) -> dict[str, list[str]]:
    """Documents whose likelihood evaluation measures: held-out text, and held-out rows of local sft data."""
    documents = [row["text"] for row in sides["text"]["test"]]
    written = [] if section.world else [" ".join(t for t in spoken(row)) for row in sides["sft"]["test"]]
    return {
        "heldout_text": documents[:WORLD_DOCUMENTS] if section.world else documents,
        "heldout_sft": written,
    }


def spoken(row: dict) -> list[str]:
    """What stands in a row, without roles and template."""
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    return [row["prompt"] + row["completion"]]

"""A policy's perplexity on held-out long documents, by the length of its window and by position in it; passkeys.

python -m posttrain lengths --config results/NAME/lengths/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --policy results/NAME/longctx/manifest.json \
    --output results/NAME/lengths/longctx/manifest.json
"""

import itertools
import math
from pathlib import Path

from posttrain.config.sections import Lengths, Passkey, step_of
from posttrain.data.packing import blocks
from posttrain.evaluation import passkey
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_jsonl, write_jsonl
from posttrain.ground.progress import say
from posttrain.maths.intervals import mean_stderr
from posttrain.models import control, positions
from posttrain.models import policy as policies

TASK = "long_text"  # task of documents without a task of their own


def lengths(
    section: Lengths, data: Path, policy: Path, work: Path, checkpoints: Path, base: Path | None = None
) -> dict:
    """Write `work/data/documents.jsonl`, a loss for each document and length, and `work/data/passkey.jsonl`, a reply to
    each question; return the table's rows and the loss by position."""
    model, tokenizer = policies.load_policy(policy, base, section.merge, section.four_bits)
    warnings = policies.quantize_warnings(section, policy)
    most = positions.make_room(model, max(section.tokens))
    if most < max(section.tokens):
        raise UserError(f"lengths.tokens: {max(section.tokens)} is over {most}, after which {policy} has no positions")
    rows, documents_losses, curve = [], [], []
    for task, held_out in tasks(data).items():
        for length in sorted(set(section.tokens)):
            encoded = documents(section, tokenizer, held_out, length)
            if not held_out and section.passkey:
                continue
            if not encoded:
                raise UserError(
                    f"lengths: {data} has no held-out document of {max(section.tokens)} tokens; set lengths.packing"
                )
            losses = [window_losses(section, model, ids, length) for _, ids in encoded]
            means = [sum(of_tokens) / len(of_tokens) for of_tokens in losses]
            for (name, _), loss in zip(encoded, means, strict=True):
                documents_losses.append({"id": name, "length": length, "loss": loss})
            rows.append(table_row(task, length, means))
            say(f"{task}, {length} tokens: perplexity {rows[-1]['value']:.3f}")
            if task == TASK:
                curve = by_position(section, losses, length)  # the last one, of the longest window, is returned
    write_jsonl(work / "data" / "documents.jsonl", documents_losses)
    if section.passkey:
        rows += passkeys(section.passkey, model, tokenizer, sorted(set(section.tokens)), work)
    metrics = {"policy": policy.parent.name, "rows": rows, "positions": curve}
    return metrics | ({"warnings": warnings} if warnings else {})


def passkeys(section: Passkey, model, tokenizer, lengths: list[int], work: Path) -> list[dict]:
    """Write `work/data/passkey.jsonl` and return the table's rows."""
    asked = {length: passkey.questions(section, tokenizer, length) for length in lengths}  # all, before the first reply
    scored: list[dict] = []
    rows: list[dict] = []
    for length, questions in asked.items():
        of_length = [passkey.score(question, passkey.reply(model, tokenizer, question)) for question in questions]
        found, *others = passkey.table(of_length)
        rows += [found, *others]
        scored += of_length
        say(f"passkey, {length} tokens: {found['value']:.3f} are found")
    write_jsonl(work / "data" / "passkey.jsonl", scored)
    return rows


def tasks(data: Path) -> dict[str, list[dict]]:
    """Held-out long documents by task; those without one are `long_text`."""
    file = data.parent / "data" / "long" / "test.jsonl"
    rows_of: dict[str, list[dict]] = {TASK: []}
    for row in read_jsonl(file) if file.is_file() else []:
        if "answer" not in row:
            rows_of.setdefault(row.get("task", TASK), []).append(row)
    return rows_of


def documents(section: Lengths, tokenizer, rows: list[dict], length: int) -> list[tuple[str, list[int]]]:
    """(id, tokens with BOS) of at most `section.documents` documents.

    Documents with a `length` are used for that length only, and cut to it. Other documents are used whole where they
    are at least as long as the longest window; with `packing`, all are concatenated and cut at the longest window.
    """
    encoded: list[tuple[str, list[int]]] = []
    if section.packing and rows:
        whole = control.plain(tokenizer, [row["text"] for row in rows])
        packed = blocks(tokenizer, whole, max(section.tokens))[: section.documents]
        return [(f"block {number}", block["input_ids"]) for number, block in enumerate(packed)]
    for row in rows:
        if row.get("length", length) != length or len(encoded) == section.documents:
            continue
        ids = [control.opening(tokenizer), *control.plain(tokenizer, row["text"])]
        if "length" in row:
            ids = ids[:length]
        if len(ids) >= (length if "length" in row else max(section.tokens)):
            encoded.append((row["id"], ids))
    return encoded


def window_losses(section: Lengths, model, ids: list[int], length: int) -> list[float]:
    """Loss in nats of each token but the first, with a window of `length` tokens that slides over the document.

    The first window counts as a whole; each next one ends `stride` windows later and counts its new tokens only.
    """
    import torch

    step = step_of(section, length)
    ends = [length]
    while ends[-1] < len(ids):
        ends.append(min(ends[-1] + step, len(ids)))
    losses: list[float] = []
    for first in range(0, len(ends), section.batch_size):
        part = ends[first : first + section.batch_size]
        windows = torch.tensor([ids[end - length : end] for end in part], device=model.device)
        with torch.no_grad():
            logits = model(windows, use_cache=False).logits[:, -length:-1].float()  # virtual tokens come first
        of_windows = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
        for end, of_tokens in zip(part, of_windows.tolist(), strict=True):
            losses += of_tokens[length - 1 - (end - 1 - len(losses)) :]
    return losses


def table_row(task: str, length: int, losses: list[float]) -> dict:
    """Perplexity per token, exp of the mean loss over documents; its standard error by the delta method."""
    mean, error = mean_stderr(losses)
    value = math.exp(mean)
    stderr = None if error is None else value * error
    row = {"task": f"{task}_{length}", "metric": "perplexity", "value": value, "stderr": stderr}
    return row | {"n": len(losses), "higher_is_better": False}


def by_position(section: Lengths, losses: list[list[float]], length: int) -> list[dict]:
    """Mean loss in equal parts of the first window, with standard errors over documents."""
    edges = [round(part * (length - 1) / section.buckets) for part in range(section.buckets + 1)]
    curve = []
    for start, stop in itertools.pairwise(edges):
        means = [sum(of_tokens[start:stop]) / (stop - start) for of_tokens in losses if stop > start]
        if means:
            mean, error = mean_stderr(means)
            curve.append({"from": start + 1, "to": stop, "loss": mean, "stderr": error})
    return curve

"""Log-probabilities of the judged answers under the SFT policy, computed once for every run that reads them.

python -m posttrain reference --config results/NAME/reference/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --output results/NAME/reference/manifest.json
"""

from pathlib import Path

from posttrain.config.sections import Reference
from posttrain.data import preferences
from posttrain.ground.files import write_jsonl
from posttrain.ground.progress import say


def reference(section: Reference, data: Path, base: Path, sft: Path, work: Path, checkpoints: Path) -> dict:
    """Write `work/data/{train,test}.jsonl`, one row per pair: its id and the log-probability of each answer, in nats;
    and `work/data/kto/{train,test}.jsonl` where there are rows for KTO."""
    from posttrain.models import adapters, policy

    foundation = adapters.foundation_of(base, sft, section.method)
    tokenizer = policy.load_tokenizer(foundation.weights)
    model = adapters.load_as_sft(foundation).eval()
    counts = {}
    for task in preferences.tasks(data):
        for side in ("train", "test"):
            rows = preferences.tokenized(tokenizer, data, side, task=task)
            columns = {
                column: summed(model, tokenizer, rows, answer, section)
                for answer, column in preferences.ANSWERS[task].items()
            }
            log_probs = [
                {"id": row["id"]} | {column: sums[number] for column, sums in columns.items()}
                for number, row in enumerate(rows)
            ]
            write_jsonl(preferences.reference_file(work, side, task), log_probs)
            counts[f"{side} {preferences.ROWS[task]}"] = len(rows)
            say(f"{len(rows):,} {preferences.ROWS[task]} of {side}")
    return {"summary": counts}


def summed(model, tokenizer, rows: list[dict], answer: str, section: Reference) -> list[float]:
    """log pi(answer | prompt) of each row, summed over the answer's tokens, in nats. answer: the key of the answer."""
    import torch

    from posttrain.models import completions

    sums: list[float] = []
    for start in range(0, len(rows), section.batch_size):
        part = rows[start : start + section.batch_size]
        prompts, replies = [row["prompt_ids"] for row in part], [row[f"{answer}_ids"] for row in part]
        batch = completions.answers_of(tokenizer, prompts, replies, model.device)
        with torch.no_grad(), completions.autocast(model, section.precision):
            sums += completions.log_probs(model, batch).double().sum(dim=1).tolist()
    return sums

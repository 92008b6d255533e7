"""Log-probabilities of the preference pairs under the SFT policy: made once, read by every DPO run on it.

python -m posttrain reference --config results/NAME/reference/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --output results/NAME/reference/manifest.json
"""

from pathlib import Path

from posttrain.config.sections import Reference
from posttrain.data import preferences
from posttrain.ground.files import write_jsonl
from posttrain.ground.progress import say
from posttrain.models import tokens


def reference(section: Reference, data: Path, base: Path, sft: Path, work: Path, checkpoints: Path) -> dict:
    """Write `work/data/{train,test}.jsonl`, one row a pair: its id and the log-probability of each answer, in nats."""
    from posttrain.models import adapters, policy

    found = adapters.foundation(base, sft)
    tokenizer = policy.load_tokenizer(found.weights)
    model = adapters.load_as_sft(found).eval()
    counted = {}
    for side in ("train", "test"):
        rows = preferences.pairs(data, side)
        encoded = [tokens.encode_pair(tokenizer, row) for row in rows]
        log_probs = {answer: summed(model, tokenizer, encoded, answer, section) for answer in ("chosen", "rejected")}
        write_jsonl(
            work / "data" / f"{side}.jsonl",
            [
                {"id": row["id"], "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
                for row, chosen, rejected in zip(rows, log_probs["chosen"], log_probs["rejected"], strict=True)
            ],
        )
        counted[side] = len(rows)
        say(f"{len(rows):,} pairs of {side}")
    return {"summary": {f"{side} pairs": count for side, count in counted.items()}}


def summed(model, tokenizer, encoded: list[dict], answer: str, section: Reference) -> list[float]:
    """log pi(answer | prompt) in nats, summed over the answer's tokens, of each pair."""
    import torch

    from posttrain.models import completions

    found = []
    for start in range(0, len(encoded), section.batch_size):
        part = encoded[start : start + section.batch_size]
        batch = completions.given(
            tokenizer, [pair["prompt_ids"] for pair in part], [pair[f"{answer}_ids"] for pair in part], model.device
        )
        with torch.no_grad(), completions.autocast(model, section.precision):
            found += completions.log_probs(model, batch).double().sum(dim=1).tolist()
    return found

"""A reward model: an adapter and a scalar head on the SFT policy, with TRL's RewardTrainer.

python -m posttrain reward --config results/NAME/reward/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --output results/NAME/reward/manifest.json
"""

import copy
import math
import random
from pathlib import Path

from posttrain.config.sections import Reward
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_jsonl
from posttrain.ground.progress import say
from posttrain.models import tokens
from posttrain.training import parallel

HEAD = "base_model.model.score.weight"  # where PEFT saves the scalar head of a sequence classifier
BINS = 10  # of the reliability figure


def reward(section: Reward, data: Path, base: Path, sft: Path, work: Path, checkpoints: Path) -> dict:
    """Write `work/model`, a PEFT adapter of a sequence classifier, and return its metrics."""
    import datasets
    import peft
    from trl import RewardConfig, RewardTrainer

    from posttrain.models import adapters, policy
    from posttrain.training import trainers

    found = adapters.foundation(base, sft)
    tokenizer = policy.load_tokenizer(found.weights)
    train, test = (pairs(tokenizer, data, side, section.max_length) for side in ("train", "test"))
    if not train:
        raise UserError(f"reward: {data} holds no preference pairs; set prepare.preference or prepare.world")
    trainers.seed_everything(section.seed)
    model = policy.load_weights(found.weights, found.quantization, head=True)
    reading = padded_apart(tokenizer)
    model.config.pad_token_id = reading.pad_token_id
    config = adapters.lora(section, found, section.dropout, task_type="SEQ_CLS", modules_to_save=["score"])
    model = peft.get_peft_model(model, config)
    adapters.begin(model, found)
    begun = trainers.trained_weights(model)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            **trainers.arguments(section, checkpoints),
            max_length=section.max_length,
            center_rewards_coefficient=section.centering or None,
            disable_dropout=section.dropout == 0,
        ),
        train_dataset=datasets.Dataset.from_list(turned(train, section.labels, section.seed)),
        eval_dataset=datasets.Dataset.from_list(test) if test else None,
        processing_class=reading,
    )
    trainers.keep_adapters_exact(trainer.model, begun)
    trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    say(f"{trainable:,} trainable parameters, {len(train):,} pairs, {len(test):,} held out")
    trainers.share_rows(trainer, section)
    trainers.run(trainer, section, checkpoints)
    if not parallel.main():
        return {}  # the first process publishes for all
    adapters.save(trainer.model, work / "model", found.weights)
    tokenizer.save_pretrained(work / "model")
    policy.save_contract(work / "model", "reward", tokenizer, model.config, found.weights, found.quantization)
    return {
        "summary": {"trainable_parameters": trainable, "pairs": len(train)},
        "history": trainers.history(trainer, ("accuracy", "margin")),
        **held_out(trainer.model, reading, test),
    }


def pairs(tokenizer, data: Path, side: str, longest: int) -> list[dict]:
    """Preference pairs of one side as the tokens that TRL trains on, after the token contract was proved on them.

    `chosen_ids` and `rejected_ids` are prompt and answer up to the end of turn. Raises UserError naming a row that
    is longer than `longest` tokens.
    """
    file = data.parent / "data" / "preference" / f"{side}.jsonl"
    made = []
    for row in read_jsonl(file) if file.is_file() else []:
        pair = tokens.encode_pair(tokenizer, row)
        whole = {f"{answer}_ids": pair["prompt_ids"] + pair[f"{answer}_ids"] for answer in ("chosen", "rejected")}
        if max(map(len, whole.values())) > longest:
            raise UserError(f"row {tokens.row_name(row)}: over max_length ({longest} tokens)")
        made.append({**whole, "kind": row.get("kind", "pairs")})
    return made


def padded_apart(tokenizer):
    """The tokenizer with a padding token that is not its end of turn.

    A classifier reads the last token that is not padding: where both are one token, it would be trained on the token
    before the end of turn. Any other token will do, since rows end with their turn.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    apart = copy.deepcopy(tokenizer)
    apart.pad_token = apart.convert_ids_to_tokens(int(tokenizer.eos_token_id == 0))
    return apart


def turned(rows: list[dict], labels: str, seed: int) -> list[dict]:
    """The pairs with the labels of a control (`Pairs.labels`): swapped, or shuffled by a stream of its own."""
    stream = random.Random(f"{seed}:labels")
    made = []
    for row in rows:
        swap = labels == "swapped" or (labels == "shuffled" and stream.random() < 0.5)
        other = {"chosen": "rejected", "rejected": "chosen"}
        names = {key: next((key.replace(a, b) for a, b in other.items() if a in key), key) for key in row}
        made.append({names[key]: value for key, value in row.items()} if swap else row)
    return made


def held_out(model, tokenizer, rows: list[dict]) -> dict:
    """Accuracy with its standard error, margin and calibration on held-out pairs, and accuracy by kind of pair."""
    if not rows:
        return {}
    margins = [
        chosen - rejected
        for chosen, rejected in zip(
            classify(model, tokenizer, [row["chosen_ids"] for row in rows]),
            classify(model, tokenizer, [row["rejected_ids"] for row in rows]),
            strict=True,
        )
    ]
    found = {"all": measured(margins)}
    kinds = {row["kind"] for row in rows}
    for kind in sorted(kinds | {kind.partition("/")[0] for kind in kinds}):  # correct, correct/fact, correct/order
        inside = [f"{row['kind']}/".startswith(f"{kind}/") for row in rows]
        found[kind] = measured([margin for margin, one in zip(margins, inside, strict=True) if one])
    for kind, numbers in found.items():
        error = f" ± {numbers['stderr']:.3f}" if numbers["stderr"] is not None else ""
        say(f"held-out pairs, {kind}: accuracy {numbers['accuracy']:.3f}{error} (n {numbers['n']})")
    return {"pairs": found, "calibration": calibration(margins)}


def classify(model, tokenizer, rows: list[list[int]], batch: int = 64) -> list[float]:
    """The classifier's score of each row of tokens, padded on the right as in training."""
    import torch

    model.eval()
    found, pad = [], tokenizer.pad_token_id
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = max(map(len, part))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in part], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part], device=model.device)
        with torch.no_grad():
            found += model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    return found


def measured(margins: list[float]) -> dict:
    """Accuracy (a tie is half right) with its standard error, mean margin, n."""
    from posttrain.maths.intervals import mean_stderr

    accuracy, stderr = mean_stderr([(margin > 0) + 0.5 * (margin == 0) for margin in margins])
    return {"accuracy": accuracy, "stderr": stderr, "margin": sum(margins) / len(margins), "n": len(margins)}


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, x))))


def calibration(margins: list[float]) -> dict:
    """Expected calibration error of P(chosen > rejected) = sigmoid(margin), and the bins of its reliability figure.

    Every pair is read both ways, so that confidence p has its error at 1 - p too. ECE: the mean over pairs of
    |accuracy - confidence| of their bin (Guo et al. 2017, arXiv 1706.04599, eq. 3).
    """
    read = [(sigmoid(margin), 1.0) for margin in margins] + [(sigmoid(-margin), 0.0) for margin in margins]
    bins = []
    for number in range(BINS):
        inside = [(p, y) for p, y in read if min(BINS - 1, int(p * BINS)) == number]
        if inside:
            confidence, share = (sum(values) / len(inside) for values in zip(*inside, strict=True))
            bins.append({"confidence": confidence, "accuracy": share, "n": len(inside)})
    error = sum(part["n"] * abs(part["accuracy"] - part["confidence"]) for part in bins) / len(read)
    return {"ece": error, "bins": bins, "n": len(margins)}


def load(model, manifest: Path, name: str = "reward"):
    """Add a reward model's adapter to a PEFT model on the same frozen weights; returns its head, H -> 1.

    Raises UserError when the reward model belongs to other weights.
    """
    import peft
    import torch

    folder = manifest.parent / "model"
    config = peft.PeftConfig.from_pretrained(folder)
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
    state = peft.load_peft_weights(folder, device="cpu")
    weight = state.pop(HEAD)
    model.add_adapter(name, config)
    peft.set_peft_model_state_dict(model, state, adapter_name=name)
    head = torch.nn.Linear(weight.shape[1], 1, bias=False)
    head.weight.data = weight.float()
    return head.to(model.device).requires_grad_(False)

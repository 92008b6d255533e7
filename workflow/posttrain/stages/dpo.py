"""Direct preference optimisation from the SFT policy, with TRL's DPOTrainer.

python -m posttrain dpo --config results/NAME/dpo/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --reference results/NAME/reference/manifest.json --output results/NAME/dpo/manifest.json
"""

from pathlib import Path

from posttrain.config.sections import WHOLE_BATCH, Dpo
from posttrain.data import preferences
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_jsonl
from posttrain.ground.progress import say
from posttrain.models import tokens
from posttrain.training import parallel

WATCHED = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "entropy")
FALLEN = 1.0  # nats by which the chosen answers' log-probability may fall before it is named


def dpo(section: Dpo, data: Path, base: Path, sft: Path, reference: Path, work: Path, checkpoints: Path) -> dict:
    """Write `work/model`, an adapter, and return its metrics."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    from posttrain.models import adapters, policy
    from posttrain.training import trainers

    refuse_parts(section)
    found = adapters.foundation(base, sft)
    tokenizer = policy.load_tokenizer(found.weights)
    train, test = (rows(data, reference, side, section) for side in ("train", "test"))
    trainers.seed_everything(section.seed)
    model = adapters.load_as_sft(found, section, section.dropout)
    begun = trainers.trained_weights(model)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            **trainers.arguments(section, checkpoints),
            max_length=section.max_length,
            beta=section.beta,
            loss_type=section.loss,
            loss_weights=section.loss_weights,
            label_smoothing=section.label_smoothing,
            disable_dropout=section.dropout == 0,
        ),
        train_dataset=datasets.Dataset.from_list(train),
        eval_dataset=datasets.Dataset.from_list(test) if test else None,
        processing_class=tokenizer,
    )
    end_with_the_turn(trainer, tokenizer, train, test)
    trainers.share_rows(trainer, section)
    # The pairs bring their reference log-probabilities as columns; computed here, they would cost a second forward
    # pass each step and, with dropout, draw from the training's random stream.
    trainer.precompute_ref_logps = True
    trainers.keep_adapters_exact(trainer.model, begun)
    trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    say(f"{trainable:,} trainable parameters, {len(train):,} pairs, beta {section.beta}")
    before = trainer.evaluate() if test else {}
    trainers.run(trainer, section, checkpoints)
    after = trainer.evaluate() if test else {}
    state = trainers.whole(trainer.model)
    if not parallel.main():
        return {}  # the first process publishes for all
    adapters.save(trainer.model, work / "model", found.weights, state=state)
    tokenizer.save_pretrained(work / "model")
    method = "qlora" if found.quantization else "lora"
    policy.save_contract(work / "model", method, tokenizer, model.config, found.weights, found.quantization)
    watched = {f"{key} {when}": run[f"eval_{key}"] for when, run in (("before", before), ("after", after)) if run
               for key in ("loss", *WATCHED)}  # fmt: skip
    return {
        "summary": {"trainable_parameters": trainable, "beta": section.beta, **watched},
        "warnings": displacement(before, after),
        "history": trainers.history(trainer, WATCHED),
    }


def refuse_parts(section: Dpo) -> None:
    """Raise UserError where processes would each take a loss over their part that is meant for the whole batch."""
    whole = sorted(WHOLE_BATCH & set(section.loss))
    if whole and parallel.world() > 1:
        raise UserError(f"dpo.loss: TRL takes {' and '.join(whole)} over a whole batch: start one process")


def rows(data: Path, reference: Path, side: str, section: Dpo) -> list[dict]:
    """Preference pairs of one side, each with its reference log-probabilities, labelled as a control asks.

    Raises UserError where the reference was made from other pairs.
    """
    found = preferences.pairs(data, side)
    known = read_jsonl(reference.parent / "data" / f"{side}.jsonl")
    if [row["id"] for row in found] != [row["id"] for row in known]:
        raise UserError(f"{reference}: was made from other pairs than {data}; remake it: rm {reference}")
    keys = ("prompt", "chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps")
    made = [{key: (row | log_probs)[key] for key in keys} for row, log_probs in zip(found, known, strict=True)]
    return preferences.relabelled(made, section.labels, section.seed) if side == "train" else made


def end_with_the_turn(trainer, tokenizer, train: list[dict], test: list[dict]) -> None:
    """Let answers end with their end of turn in the trainer's batches, as the reference counts them: a template may add
    more after it. Raises UserError where the trainer's tokens are not those of the token contract.
    """
    collate, end = trainer.data_collator, tokenizer.eos_token_id

    def cut(example: dict) -> dict:
        answers = {key: example[key] for key in ("chosen_ids", "rejected_ids")}
        return example | {key: ids[: ids.index(end) + 1] if end in ids else ids for key, ids in answers.items()}

    examples = [*trainer.train_dataset, *(trainer.eval_dataset if test else [])]
    for row, example in zip([*train, *test], examples, strict=True):
        expected = tokens.encode_pair(tokenizer, row | {"id": "pair"})
        if any(cut(example)[key] != ids for key, ids in expected.items()):
            raise UserError(
                f"token contract: TRL reads the pair {str(row['prompt'])[:80]!r} as other tokens; where answers are "
                "plain text, set `separator` of the source, so that they begin on a token's edge"
            )
    trainer.data_collator = lambda examples: collate([cut(example) for example in examples])


def displacement(before: dict, after: dict) -> list[str]:
    """What a practitioner must know: chosen answers have become less likely (arXiv 2402.13228, section 3)."""
    key = "eval_logps/chosen"
    if not before or after[key] > before[key] - FALLEN:
        return []
    fell = f"held-out chosen answers fell from {before[key]:.1f} to {after[key]:.1f} nats while margins grew"
    say(f"warning: {fell}")
    return [f"{fell}: the policy moves away from both answers (likelihood displacement); lower learning_rate or steps"]

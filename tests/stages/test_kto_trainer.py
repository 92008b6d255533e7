"""KTO's KL term over the whole batch: by hand, with any micro-batch, and as TRL takes it (the control)."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from tiny import make

from posttrain.config.sections import Reference, Referenced
from posttrain.data import preferences
from posttrain.ground.files import manifest_of, read_json, read_jsonl, write_json, write_jsonl
from posttrain.models import adapters, completions, policy
from posttrain.training import kto, trainers


class Kto(Referenced):
    """Settings of a stage that trains on rows with a label."""

    @property
    def task(self) -> str:
        return "kto"


@pytest.fixture(scope="module")
def inputs(data, base, tuned_policy) -> dict[str, Path]:
    """Prepared data with rows for KTO, made of the preference pairs, and their reference."""
    folder = Path("results/kto-data/prepare")
    shutil.copytree(data.parent, folder)
    for side in ("train", "test"):
        pairs = read_jsonl(folder / f"data/preference/{side}.jsonl")
        rows = [
            {"id": f"{pair['id']}-{answer}", "prompt": pair["prompt"], "completion": pair[answer], "label": label}
            for number, pair in enumerate(pairs)
            for answer, label in (("chosen", True), ("rejected", False))
            if (number + label) % 3
        ]
        write_jsonl(folder / f"data/kto/{side}.jsonl", rows)
    write_json(folder / "manifest.json", manifest_of(folder, ["data"]))
    read = {"data": folder / "manifest.json", "base": base, "sft": tuned_policy}
    return read | {"reference": make("reference", Reference(), Path("results/kto/reference/manifest.json"), **read)}


@pytest.fixture
def trainer_of(inputs, tmp_path):
    """Makes a trainer; its policy has moved away from its reference, as after some steps."""
    from trl import KTOConfig

    def made(micro: int, **changes):
        settings = dict(steps=2, batch_size=4, learning_rate=1e-3, seed=0, max_length=128) | changes
        section = Kto(micro_batch_size=micro, **settings)
        _, tokenizer, model = adapters.load_to_align(section, inputs["base"], inputs["sft"])
        train, test = preferences.referenced_rows(tokenizer, inputs["data"], inputs["reference"], section)
        config = KTOConfig(**trainers.arguments(section, tmp_path), max_length=128, disable_dropout=False)
        with trainers.exact_weights(model):
            trainer = kto.WholeBatchKTO(model, config, processing_class=tokenizer, **trainers.placeholders(test))
        trainers.give_rows(trainer, section, train, test)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B.default" in name:
                weight.data += 0.2 * torch.randn(weight.shape)
        return trainer

    return made


def first_step(trainer) -> tuple[float, torch.Tensor]:
    """The first batch's KL term, and its gradient."""
    kept = []

    def keep(self, weights, *_):
        kept.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("accelerate.Accelerator.clip_grad_norm_", keep)
        trainer.train()
    return trainer.kl.item(), kept[0]


def test_the_reference_of_a_row_is_the_sft_policy_s(inputs):
    """The artifact's preference pairs stay where they were, beside the rows for KTO."""
    model, tokenizer = policy.load_merged(inputs["sft"], inputs["base"])
    rows = preferences.tokenized(tokenizer, inputs["data"], "test", task="kto")[:3]
    batch = completions.given(
        tokenizer, [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows], model.device
    )
    with torch.no_grad():
        by_hand = completions.log_probs(model, batch).sum(dim=1).tolist()
    folder = inputs["reference"].parent / "data"
    assert [row["ref_logps"] for row in read_jsonl(folder / "kto/test.jsonl")[:3]] == pytest.approx(by_hand, abs=1e-3)
    assert set(read_jsonl(folder / "test.jsonl")[0]) == {"id", "ref_chosen_logps", "ref_rejected_logps"}
    assert read_json(inputs["reference"].parent / "metrics.json")["summary"]["train kto rows"] == 128


def test_each_row_gets_the_answer_of_the_row_before_it_in_its_batch():
    rows = [{"completion_ids": [number]} for number in range(10)]
    others = [row["KL_completion_ids"][0] for row in kto.Mismatched(rows, 4)]
    assert others == [3, 0, 1, 2, 7, 4, 5, 6, 9, 8], "the last batch is smaller"


def test_the_kl_term_by_hand(trainer_of):
    """Of the first batch, one row at a time: policy and reference on each prompt with the other row's answer."""
    trainer = trainer_of(4)
    trainer.model.eval()
    rows, ratios = list(itertools.islice(kto.Mismatched(trainer.train_dataset, 4), 4)), []
    for row in rows:
        batch = completions.given(
            trainer.processing_class, [row["prompt_ids"]], [row["KL_completion_ids"]], trainer.model.device
        )
        with torch.no_grad():
            sums = {}
            for name in ("default", "ref"):
                trainer.model.set_adapter(name)
                sums[name] = completions.log_probs(trainer.model, batch).sum().item()
        ratios.append(sums["default"] - sums["ref"])
    trainer.model.set_adapter("default")
    assert first_step(trainer)[0] == pytest.approx(sum(ratios) / 4, abs=1e-3)
    assert abs(sum(ratios)) > 0.1, "control: it is not 0 for any reason"


@pytest.mark.parametrize("micro", [1, 2])
def test_the_micro_batch_changes_no_gradient(trainer_of, monkeypatch, micro):
    """With a KL term over 0, which TRL would cut off; control: taken over each micro-batch, it is another gradient."""
    sum_kl = kto.WholeBatchKTO.sum_kl

    def positive(self, batches):
        return sum_kl(self, batches).abs()

    monkeypatch.setattr(kto.WholeBatchKTO, "sum_kl", positive)
    (whole, gradient), (part, other) = first_step(trainer_of(4)), first_step(trainer_of(micro))
    assert whole > 1e-2 and part == pytest.approx(whole, rel=1e-5)
    assert (gradient - other).abs().max() <= 1e-5 * gradient.abs().max()

    def of_each_part(self, model, batch):
        return kto.mean_of(positive(self, [batch])).expand(len(batch["label"]))

    monkeypatch.setattr(kto.WholeBatchKTO, "_compute_kl_logps", of_each_part)
    trainer = trainer_of(micro)
    wrong = first_step(trainer)[1]
    assert (gradient - wrong).abs().max() > 1e-4 * gradient.abs().max()


def test_the_held_out_loss_does_not_depend_on_the_micro_batch(trainer_of):
    losses = [trainer_of(micro).evaluate()["eval_loss"] for micro in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_kl_term_draws_no_random_numbers(trainer_of):
    """With dropout: the training's random stream is where it was, and the term is the same again."""
    trainer = trainer_of(4, dropout=0.5)
    trainer.model.train()
    batch = trainer.data_collator(list(itertools.islice(kto.Mismatched(trainer.train_dataset, 4), 4)))
    before = torch.get_rng_state()
    one, two = (trainer.sum_kl([batch]) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(one, two)
    assert trainer.model.training

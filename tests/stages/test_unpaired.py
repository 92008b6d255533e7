"""KTO's reference point of a whole batch: TRL's numbers where a batch is one pass, and the same in smaller passes."""

import copy

import pytest
import torch
from torch.utils.data import Subset

from posttrain.ground import pinned
from posttrain.ground.errors import UserError

BATCH = 4
HELD_OUT = 7


@pytest.fixture(scope="module")
def model():
    """A tiny model with an adapter that changes nothing yet: the reference."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=320)
    adapter = LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), adapter).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from posttrain.data.tokenizer import train_tokenizer

    return train_tokenizer(["a b"], 300, 64)


@pytest.fixture(scope="module")
def rows(model) -> list[dict]:
    """Rows of random tokens, with their log-probabilities under the reference."""
    draw = torch.Generator().manual_seed(1)
    drawn = []
    for number in range(BATCH + HELD_OUT):
        prompt, answer = torch.randint(2, 9, (2,), generator=draw).tolist()
        ids = torch.randint(3, 300, (prompt + answer,), generator=draw)
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, :-1].log_softmax(dim=-1).gather(1, ids[1:, None])
        tokens = {"prompt_ids": ids[:prompt].tolist(), "completion_ids": ids[prompt:].tolist()}
        drawn.append(tokens | {"label": number % 3 != 0, "ref_logps": log_probs[prompt - 1 :].sum().item()})
    return drawn


@pytest.fixture
def made(model, tokenizer, rows, tmp_path):
    """Makes a trainer for one step on one batch, whose policy is no longer the reference."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    from posttrain.training.unpaired import Mismatched

    def make(kind, micro: int, loss: str = "kto"):
        words = {"prompt": "a", "completion": "b"}
        trainer = kind(
            model=copy.deepcopy(model),
            args=KTOConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=micro, per_device_eval_batch_size=micro,
                gradient_accumulation_steps=BATCH // micro, max_steps=1, loss_type=loss, bf16=False, use_cpu=True,
                gradient_checkpointing=False, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
                beta=0.5, train_sampling_strategy="sequential", seed=0,
            ),
            train_dataset=Dataset.from_list([words | {"label": label} for label in (True, False)]),
            eval_dataset=Dataset.from_list([words | {"label": True}]),
            processing_class=tokenizer,
        )  # fmt: skip
        torch.manual_seed(3)
        for name, weight in trainer.model.named_parameters():
            if ".lora_B.default." in name:
                weight.data += 5 * torch.randn_like(weight)
        batch = Subset(Dataset.from_list(rows[:BATCH]), range(BATCH))
        trainer.train_dataset = Mismatched(batch, micro) if kind is KTOTrainer else batch  # as TRL mismatches rows
        trainer.eval_dataset = Dataset.from_list(rows[BATCH:])
        return trainer

    return make


def step(trainer, monkeypatch) -> tuple[dict, torch.Tensor]:
    """What the first step logs, and its gradient before it is clipped."""
    gradients = []

    def keep(_, weights, *__):
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]))
        return gradients[0].norm()

    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", keep)
    trainer.train()
    return trainer.state.log_history[0], gradients[0]


@pytest.fixture
def whole(made, monkeypatch):
    """TRL's own step on the batch in one pass."""
    from trl import KTOTrainer

    return step(made(KTOTrainer, BATCH), monkeypatch)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_batch_in_several_passes_is_trls_batch_in_one(made, whole, monkeypatch, micro):
    from posttrain.training.unpaired import UnpairedTrainer

    log, gradient = step(made(UnpairedTrainer, micro), monkeypatch)
    assert whole[0]["kl"] > 0.01, "control: the reference point counts"
    assert (gradient - whole[1]).abs().max() < 1e-5 * whole[1].abs().max()
    for key in ("kl", "loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected"):
        assert log[key] == pytest.approx(whole[0][key], rel=1e-4), key


def test_trl_in_several_passes_has_another_gradient(made, whole, monkeypatch):
    """Control."""
    from trl import KTOTrainer

    _, gradient = step(made(KTOTrainer, 2), monkeypatch)
    assert (gradient - whole[1]).abs().max() > 1e-3 * whole[1].abs().max()


def test_without_a_reference_point_it_is_trls_own(made, monkeypatch):
    from trl import KTOTrainer

    from posttrain.training.unpaired import UnpairedTrainer

    (one, gradient), (other, expected) = (
        step(made(kind, 2, "apo_zero_unpaired"), monkeypatch) for kind in (UnpairedTrainer, KTOTrainer)
    )
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6) and one["kl"] == 0
    assert (gradient - expected).abs().max() < 1e-6 * expected.abs().max()


def test_held_out_rows_are_measured_alike_in_every_split(made):
    from posttrain.training.unpaired import UnpairedTrainer

    one, two, four = (made(UnpairedTrainer, micro).evaluate() for micro in (1, 2, 4))
    assert one["eval_kl"] > 0.01, "control: it counts"
    for key in ("loss", "kl", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert one[f"eval_{key}"] == pytest.approx(four[f"eval_{key}"], rel=1e-5), key
        assert two[f"eval_{key}"] == pytest.approx(four[f"eval_{key}"], rel=1e-5), key


def test_the_reference_point_by_hand(model, made, rows):
    """One row at a time, without padding: policy and reference on each prompt with the completion before."""
    from posttrain.training.unpaired import Mismatched, UnpairedTrainer

    trainer, ratios = made(UnpairedTrainer, BATCH), []
    for number, row in enumerate(rows[:BATCH]):
        ids = torch.tensor([row["prompt_ids"] + rows[(number - 1) % BATCH]["completion_ids"]])
        sums = []
        for one in (trainer.model.eval(), model.eval()):
            with torch.no_grad():
                log_probs = one(ids).logits[0, :-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None])
            sums.append(log_probs[len(row["prompt_ids"]) - 1 :].sum().item())
        ratios.append(sums[0] - sums[1])
    trainer._measure([trainer.data_collator(list(Mismatched(trainer.train_dataset, BATCH)))])
    assert trainer.z0.item() == pytest.approx(sum(ratios) / BATCH, abs=1e-4)
    assert abs(sum(ratios)) > 0.1, "control: it is not 0 for any reason"


def test_the_reference_point_draws_no_random_numbers(made):
    """With dropout: the training's random stream is where it was, and the point is the same again."""
    from posttrain.training.unpaired import Mismatched, UnpairedTrainer

    trainer = made(UnpairedTrainer, BATCH)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):  # which TRL turned off
            module.p = 0.5
    batch = trainer.data_collator(list(Mismatched(trainer.train_dataset, BATCH)))
    before, points = torch.get_rng_state(), []
    for _ in range(2):
        trainer.model.train()
        trainer._measure([batch])
        points.append(trainer.z0)
    assert torch.equal(before, torch.get_rng_state()) and points[0] == points[1]
    trainer.model.train()(torch.arange(9)[None])
    assert not torch.equal(before, torch.get_rng_state()), "control"


def test_each_row_gets_the_completion_before_it_in_its_batch():
    from posttrain.training.unpaired import Mismatched

    completions = [{"completion_ids": [number]} for number in range(6)]
    rows = Mismatched(Subset(completions, [5, 4, 3, 2, 1, 0]), 3)
    expected = [(5, 3), (4, 5), (3, 4), (2, 0), (1, 2), (0, 1)]
    assert [(row["completion_ids"][0], row["KL_completion_ids"][0]) for row in rows.__getitems__(range(6))] == expected


def test_another_version_of_trl_is_refused(made, monkeypatch):
    from posttrain.training.unpaired import UnpairedTrainer

    monkeypatch.setattr(pinned, "version", lambda package: "1.17.0")
    with pytest.raises(UserError, match=r"trl: found version 1\.17\.0, needed is 1\.16\.0"):
        made(UnpairedTrainer, 2)

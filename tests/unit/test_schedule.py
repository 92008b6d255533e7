"""The learning rate and AdamW's settings of every training loop, against formulas written by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from posttrain.config.sections import Ppo, Scratch, Sft
from posttrain.dag import campaign
from posttrain.ground.errors import UserError
from posttrain.rl import states
from posttrain.training import optimizer, schedule, trainers

PEAK, STEPS, WARMUP, END = 0.02, 20, 4, 0.1


def rates(section, made) -> list[float]:
    """The learning rate of each step, as transformers' trainer has it."""
    steps = optimizer.rates(section, made, schedule.warmup(section), STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(made.param_groups[0]["lr"])
        made.step()
        steps.step()
    return [*rates, made.param_groups[0]["lr"]]


@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_schedule_ends_at_its_share_of_the_peak(name, end):
    section = Sft(schedule=name, min_lr_ratio=end, learning_rate=PEAK, steps=STEPS, warmup_ratio=WARMUP / STEPS)
    assert schedule.warmup(section) == WARMUP
    parts = [(step - WARMUP) / (STEPS - WARMUP) for step in range(WARMUP, STEPS + 1)]
    shapes = {"cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)), "linear": lambda part: 1 - part}
    low = end or 0.0
    expected = [PEAK * step / WARMUP for step in range(WARMUP)]
    expected += [PEAK * (low + (1 - low) * shapes[name](part)) for part in parts]
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=PEAK)
    assert rates(section, adamw) == pytest.approx(expected, abs=1e-12)
    muon = optimizer.MuonWithAdamW(torch.nn.Linear(2, 2), PEAK, 0.0)
    assert rates(section, muon) == pytest.approx(expected, abs=1e-12), "Muon's too"


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup", "inverse_sqrt"])
def test_warm_up_starts_at_its_share_of_the_peak(name, tmp_path):
    """0.1 of it (arXiv 2306.15595, section 3.1); afterwards it is as without. In transformers' trainer too, from the
    first step and after a checkpoint."""
    plain = Sft(schedule=name, learning_rate=PEAK, steps=STEPS, warmup_steps=WARMUP, seed=0)
    section, weight = plain.replaced(warmup_start_ratio=0.1), torch.nn.Linear(1, 1)
    whole = rates(section, torch.optim.AdamW(weight.parameters(), lr=PEAK))
    expected = rates(plain, torch.optim.AdamW(weight.parameters(), lr=PEAK))
    assert whole[:WARMUP] == pytest.approx([PEAK * (0.1 + 0.9 * step / WARMUP) for step in range(WARMUP)], abs=1e-12)
    assert whole[WARMUP:] == expected[WARMUP:] and expected[0] == 0, "control"
    trainer = Trainer(weight, TrainingArguments(**trainers.arguments(section, tmp_path)))
    optimizer.start_at(trainer, section)
    trainer.create_optimizer_and_scheduler(STEPS)
    assert trainer.optimizer.param_groups[0]["lr"] == whole[0]
    trainer.lr_scheduler.load_state_dict(trainer.lr_scheduler.state_dict())
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    assert trainer.optimizer.param_groups[0]["lr"] == whole[1]


def test_an_inverse_square_root_by_hand():
    section = Sft(schedule="inverse_sqrt", learning_rate=PEAK, steps=STEPS, warmup_steps=WARMUP)
    expected = [PEAK * (step / WARMUP if step < WARMUP else math.sqrt(WARMUP / step)) for step in range(STEPS + 1)]
    assert rates(section, torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=PEAK)) == pytest.approx(expected)


def test_ppos_first_iteration_has_the_start():
    weight, network = torch.nn.Parameter(torch.ones(1)), SimpleNamespace(model=torch.nn.Identity())
    models = SimpleNamespace(
        trained=lambda: {"policy": [], "value": [("weight", weight)]}, policy=network, value=network
    )
    for start, first in ((0.1, 0.1), (None, 1 / (WARMUP + 1))):
        section = Ppo(learning_rate=PEAK, steps=STEPS, warmup_steps=WARMUP, warmup_start_ratio=start)
        made, _ = states.optimizers(section, models)
        assert [group["lr"] for group in made.both.param_groups] == pytest.approx([first * PEAK] * 2)


def test_both_of_ppos_rates_end_at_the_share():
    section = Ppo(schedule="linear", min_lr_ratio=END, learning_rate=PEAK, value_learning_rate=0.5, steps=STEPS,
                  warmup_steps=0, beta1=0.7, epsilon=1e-5)  # fmt: skip
    weight, network = torch.nn.Parameter(torch.ones(1)), SimpleNamespace(model=torch.nn.Identity())
    trained = {"policy": [], "value": [("weight", weight)]}
    models = SimpleNamespace(trained=lambda: trained, policy=network, value=network)
    made, steps = states.optimizers(section, models)
    for _ in range(STEPS):
        made.both.step()
        steps.step()
    ends = [group["lr"] for group in made.both.param_groups]
    assert ends == pytest.approx([END * PEAK, END * 0.5])
    assert made.both.defaults["betas"] == (0.7, 0.999) and made.both.defaults["eps"] == 1e-5


@pytest.mark.parametrize(
    "ratio, steps, warmup", [(0.03, 1000, 30), (0.03, 10, 1), (0.1, 30, 3), (0.0, 30, 0), (1.0, 7, 7)]
)
def test_warm_up_as_a_share_is_rounded_up(ratio, steps, warmup):
    assert schedule.warmup(Sft(warmup_ratio=ratio, steps=steps)) == warmup
    assert schedule.warmup(Sft(steps=1000)) == 50, "control: the default"


def test_adamws_settings_reach_it():
    assert trainers.moments(Sft()) == {"adam_beta2": 0.999}, "those that are not set are the trainer's own"
    chosen = Sft(beta1=0.8, beta2=0.95, epsilon=1e-5)
    assert trainers.moments(chosen) == {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5}
    assert optimizer.moments(chosen) == {"betas": (0.8, 0.95), "eps": 1e-5}
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).defaults
    assert optimizer.moments(Scratch()) == {key: plain[key] for key in ("betas", "eps")}


@pytest.mark.parametrize(
    "sft, said",
    [
        ("schedule: constant, min_lr_ratio: 0.1", "sft.min_lr_ratio: has no effect with schedule: constant"),
        ("schedule: constant, warmup_ratio: 0.1", "sft.warmup_ratio: has no effect with schedule: constant"),
        (
            "schedule: constant, warmup_start_ratio: 0.1",
            "warmup_start_ratio: has no effect with schedule",
        ),
        ("warmup_steps: 0, warmup_start_ratio: 0.1", "sft.warmup_start_ratio: has no effect without warm-up"),
        ("warmup_ratio: 0.0, schedule: inverse_sqrt", "sft.schedule: inverse_sqrt needs warm-up"),
        ("steps: 19, warmup_start_ratio: 0.1", "sft.warmup_start_ratio: has no effect without warm-up"),
        ("warmup_steps: 3, warmup_ratio: 0.1", "sft.warmup_ratio: has no effect with warmup_steps: 3"),
    ],
)
def test_what_has_no_effect_is_refused(here, sft, said):
    (here / "config/experiments").mkdir(parents=True)
    (here / "config/config.yaml").write_text("experiments: [one]\n")
    text = "question: Why?\nbase: {scratch: {}}\nprepare: {world: {}}\nsft: {%s}\n"
    (here / "config/experiments/one.yaml").write_text(text % sft)
    with pytest.raises(UserError, match=said):
        campaign.load("config/config.yaml")
    (here / "config/experiments/one.yaml").write_text(text % "min_lr_ratio: 0.1, warmup_ratio: 0.03, beta1: 0.8")
    campaign.load("config/config.yaml")

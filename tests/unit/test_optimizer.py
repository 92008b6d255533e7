"""Optimisers by their names: the bytes of their state as planned, PPO's as the trainers', and what is refused."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from posttrain.config.sections import Sft
from posttrain.dag import campaign
from posttrain.ground.errors import UserError
from posttrain.resources import architecture, optimizer, steps
from posttrain.training import optimizer as training
from posttrain.training import parallel, trainers

NAMES = ("adamw", "rmsprop", "adafactor", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=False,
)  # fmt: skip


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def of_trainer(section: Sft, learner, tmp_path):
    """The optimiser that transformers' trainer creates."""
    return Trainer(learner, TrainingArguments(**trainers.arguments(section, tmp_path))).create_optimizer()


def take_steps(made, learner, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        for weight in learner.parameters():
            weight.grad = torch.randn_like(weight)
        made.step()


def state_bytes(made) -> int:
    """Bytes of the state's tensors, without counters and the table of 256 values that all tensors share."""
    held = [(key, value) for state in made.state.values() for key, value in state.items() if torch.is_tensor(value)]
    return sum(value.nbytes for key, value in held if value.ndim and not key.startswith("qmap"))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", [*NAMES, "muon"])
def test_the_plan_counts_the_bytes_of_the_real_state(name, tmp_path):
    section, learner = Sft(optimizer=name, seed=0), model()
    made = training.chosen(section, learner) or of_trainer(section, learner, tmp_path)
    take_steps(made, learner, 0, 1)
    optimizers = [made.muon, made.adamw] if name == "muon" else [made]
    shape = architecture.from_config(CONFIG.to_dict())
    trained = steps._everything(shape)
    assert trained.numbers == shape.parameters == learner.num_parameters()
    planned = optimizer.state(name, trained.tensors)
    assert sum(map(state_bytes, optimizers)) == planned
    same = name in ("adamw", "paged_adamw")
    assert (planned == optimizer.state(None, trained.tensors) == 8 * shape.parameters) == same, "control"


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", NAMES)
def test_ppos_is_the_trainers_and_continues_to_the_same_bytes(name, tmp_path):
    section = Sft(optimizer=name, seed=0, weight_decay=0.0, beta1=0.8, epsilon=1e-7)
    learner, other, continued = model(), model(), model()
    made = of_trainer(section, learner, tmp_path)
    take_steps(made, learner, 0, 4)
    groups = [{"params": list(other.parameters())}]
    first = training.of_groups(section, groups, other.modules())
    take_steps(first, other, 0, 2)
    torch.save([first.state_dict(), other.state_dict()], tmp_path / "saved.pt")
    state, weights = torch.load(tmp_path / "saved.pt", weights_only=True)
    continued.load_state_dict(weights)
    second = training.of_groups(section, [{"params": list(continued.parameters())}], continued.modules())
    second.load_state_dict(state)
    take_steps(second, continued, 2, 4)
    pairs = list(zip(learner.parameters(), continued.parameters(), strict=True))
    assert all(torch.equal(one, two) for one, two in pairs)
    take_steps(first, other, 2, 3)
    assert not torch.equal(next(other.parameters()), pairs[0][0]), "control"


def test_large_paged_states_are_the_hosts():
    small, large = optimizer.Tensors(3, (16, 4096)), optimizer.Tensors(2, (64, 4096))
    assert optimizer.paged("paged_adamw", [small, large]) == 8 * 2 * 64 * 4096
    assert optimizer.paged("paged_adamw_8bit", [large]) == pytest.approx(2 * 2 * 64 * 4096 * (1 + 4 / 256))
    assert optimizer.paged("adamw_8bit", [large]) == optimizer.paged(None, [large]) == 0, "control"


def test_shards_take_what_needs_no_whole_tensor(monkeypatch):
    monkeypatch.setattr(parallel, "sharded", True)
    for name in NAMES[2:]:
        with pytest.raises(UserError, match=f"optimizer: {name} needs whole tensors.*take adamw or rmsprop"):
            training.of_trainer(Sft(optimizer=name))
    assert [training.of_trainer(Sft(optimizer=name)) for name in ("rmsprop", None)] == ["rmsprop", "adamw_torch"]


SAID = {
    "optimizer: rmsprop, beta1: 0.8": "sft.beta1: has no effect with optimizer: rmsprop",
    "optimizer: rmsprop, weight_decay: 0.1": "sft.weight_decay: has no effect with optimizer: rmsprop",
    "optimizer: adafactor, beta2: 0.9": "sft.beta2: has no effect with optimizer: adafactor",
    "optimizer: adafactor, epsilon: 1e-9": "sft.epsilon: has no effect with optimizer: adafactor",
    "optimizer: muon": "sft.optimizer: muon is only for base.scratch, and for longctx with tuning: full",
    "method: prompt, label_smoothing: 0.1": "sft.label_smoothing: has no effect with method: prompt",
    "optimizer: lion": "sft.optimizer: found 'lion', it should be",
}


@pytest.mark.parametrize("sft", SAID)
def test_what_has_no_effect_is_refused(here, sft):
    (here / "config/experiments").mkdir(parents=True)
    (here / "config/config.yaml").write_text("experiments: [one]\n")
    text = "question: Why?\nbase: {scratch: {}}\nprepare: {world: {}}\nsft: {%s}\n"
    (here / "config/experiments/one.yaml").write_text(text % sft)
    with pytest.raises(UserError, match=SAID[sft]):
        campaign.load("config/config.yaml")
    (here / "config/experiments/one.yaml").write_text(text % "optimizer: adafactor, weight_decay: 0.1")
    plan = campaign.load("config/config.yaml")
    assert plan.experiments["one"].sft.optimizer == "adafactor" and math.isfinite(plan.experiments["one"].sft.beta2)


def longctx_of(here, **settings) -> dict:
    """The settings of a `longctx`, with defaults, by which its artifact is known."""
    (here / "config/experiments").mkdir(parents=True, exist_ok=True)
    (here / "config/config.yaml").write_text("experiments: [one]\n")
    values = {"base": {"scratch": {"context": 64}}, "prepare": {"world": {"long": {}}}, "longctx": settings}
    (here / "config/experiments/one.yaml").write_text(json.dumps({"question": "Why?"} | values))
    return json.loads(campaign.load("config/config.yaml").section("one", "longctx"))


def test_muon_is_for_all_weights_of_longctx(here):
    """An adapter's settings name an optimiser only where one is chosen, as before there was a choice."""
    assert longctx_of(here)["optimizer"] == "adamw" and longctx_of(here, optimizer="muon")["optimizer"] == "muon"
    assert "optimizer" not in longctx_of(here, tuning="qlora") and "optimizer" not in longctx_of(here, tuning="none")
    assert longctx_of(here, tuning="lora", optimizer="paged_adamw")["optimizer"] == "paged_adamw"
    with pytest.raises(
        UserError, match=r"longctx.optimizer: muon is only for base.scratch, and for longctx with tuning"
    ):
        longctx_of(here, tuning="lora", optimizer="muon")

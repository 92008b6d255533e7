"""The identities of the papers hold for the code of the stages, and fail for planted faults."""

import importlib
import inspect
import math
from pathlib import Path

import pytest
from tiny import ROOT, make

from posttrain.config.sections import Algebra
from posttrain.ground.files import read_json
from posttrain.identities.small import Identity

FOLDER = ROOT / "workflow/posttrain/identities"
HOLDS = 1e-5  # largest deviation by rounding in float32
STATED = {  # name -> what its paper states, and how far the value may be from it
    "nf4_constants": (0.5, 1e-9),
    "nf4_double_constants": (0.127, 5e-4),
    "nf4_bits": (4.127, 5e-4),
    "dpo_start": (math.log(2), 1e-6),
    "dpo_sign": (1.0, 1e-5),
    "kto_start": (0.5, 1e-6),
    "best_of_4_kl": (0.636, 5e-4),
    "best_of_16_kl": (1.835, 5e-4),
    "best_of_128_kl": (3.860, 5e-4),
}
AT_MOST = {"nf4_error": 0.9, "nf4_double_error": 1e-3, "pi_bound": 1.0}
AT_LEAST = {"pi_advantage": 589.0, "wrapped_positions": 0.1}


def holds(name: str, number: float) -> bool:
    """Whether a number is what an identity says."""
    if name in AT_MOST or name in AT_LEAST:
        return AT_LEAST.get(name, -math.inf) <= number <= AT_MOST.get(name, math.inf)
    stated, near = STATED.get(name, (0.0, HOLDS))
    return abs(number - stated) <= near


def identities(home: Path, seed: int = 0) -> dict:
    """The identities that the stage writes."""
    output = Path(f"results/algebra-{seed}/algebra/manifest.json")
    return read_json(make("algebra", Algebra(seed=seed), output).parent / "metrics.json")["identities"]


@pytest.fixture(scope="module")
def computed(home) -> dict:
    return identities(home)


def test_every_identity_holds_and_every_planted_fault_breaks_it(computed):
    assert {*STATED, *AT_MOST, *AT_LEAST} <= computed.keys()
    assert [name for name, sides in computed.items() if not holds(name, sides["value"])] == []
    assert [name for name, sides in computed.items() if holds(name, sides["control"])] == []


def test_every_identity_is_computed(computed):
    modules = [importlib.import_module(f"posttrain.identities.{file.stem}") for file in FOLDER.glob("[a-z]*.py")]
    defined = [one for module in modules for one in vars(module).values() if inspect.isfunction(one)]
    names = {one.__name__ for one in defined if inspect.signature(one).return_annotation == Identity}
    assert names == computed.keys()


def test_a_planted_fault_is_a_thousand_roundings_away(computed):
    """Of the identities whose deviation is 0."""
    exact = computed.keys() - {*STATED, *AT_MOST, *AT_LEAST}
    assert [name for name in exact if computed[name]["control"] < 1000 * HOLDS] == []


def test_they_hold_for_other_random_numbers(home, computed):
    other = identities(home, seed=1)
    assert [name for name, sides in other.items() if not holds(name, sides["value"])] == []
    assert [name for name, sides in other.items() if holds(name, sides["control"])] == []
    assert other["nf4_error"] != computed["nf4_error"], "control: the seed is read"


FAULTS = {  # a function of the stages -> what it is replaced by, and the identity that then fails
    "lora_count": ("posttrain.models.methods.targets.layers", lambda *_: ["q_proj"]),
    "prefix_count": ("posttrain.models.methods.cached_keys", lambda _: (1, 2, 8)),
    "nf4_levels": ("posttrain.models.quantization.configuration", lambda *_: fp4()),
    "nf4_double_constants": ("posttrain.models.quantization.settings", lambda *_: single()),
    "dpo_loss": ("posttrain.maths.likelihood.log_probs", lambda logits, tokens: unnormalised(logits, tokens)),
    "kto_start": ("posttrain.maths.likelihood.log_probs", lambda logits, tokens: unnormalised(logits, tokens)),
    "gradient_accumulation": ("posttrain.training.parallel.split", lambda batch, at_once, world: (at_once, 1)),
    "wrapped_positions": ("posttrain.models.positions.read_modulo", lambda _: None),
    "ppo_gae": ("posttrain.maths.ppo.advantages", lambda rewards, values, *_: (rewards - values, rewards)),
    "ppo_clip": ("posttrain.maths.ppo.policy_loss", lambda logp, old, advantage, _: -(logp - old).exp() * advantage),
    "ppo_reward": ("posttrain.maths.ppo.token_rewards", lambda scores, kl, mask, beta: -beta * kl * mask),
    "rloo_unbiased": ("posttrain.maths.grpo.advantages", lambda rewards, *_: rewards - rewards.mean()),
    "grpo_equal_rewards": ("posttrain.maths.grpo.advantages", lambda rewards, *_: rewards),
    "kl_unbiased": ("posttrain.maths.likelihood.kl_k3", lambda logp, reference: (logp - reference).square() / 2),
    "kl_sign": ("posttrain.maths.likelihood.kl_k3", lambda logp, reference: logp - reference),
    "best_of_16_kl": ("posttrain.maths.best_of_n.kl", math.log),
    "best_of_n_estimate": ("posttrain.maths.best_of_n.expected", lambda worth, *_: worth.mean(axis=1)),
    "pi_positions": ("posttrain.models.positions.rescale", lambda *_: None),
    "reward_padding": ("posttrain.models.reward_head.classify", lambda model, _, rows: unmasked(model, rows)),
}


def fp4():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")


def single() -> dict:
    return {"type": "nf4", "double_quantization": False, "compute": "float32"}


def unnormalised(logits, tokens):
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def unmasked(model, rows: list[list[int]]) -> list[float]:
    """Scores of rows that are padded with a token that counts as text."""
    import torch

    width = max(map(len, rows))
    return model(torch.tensor([row + [2] * (width - len(row)) for row in rows])).logits[:, 0].tolist()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_code_of_a_stage_breaks_the_identity(monkeypatch, name):
    """Each is computed with that code, and not with a copy of the equation."""
    import torch

    from posttrain.stages import algebra

    (identity,) = (one for one in algebra.IDENTITIES if one.__name__ == name)
    monkeypatch.setattr(*FAULTS[name])
    torch.manual_seed(0)
    assert not holds(name, identity()[0])

"""Compute the identities of the methods' papers with the code that the stages use; claims rule on them.

python -m posttrain algebra --config results/NAME/algebra/config.yaml --output results/NAME/algebra/manifest.json
"""

from pathlib import Path

import torch

from posttrain.config.sections import Algebra
from posttrain.ground.progress import say
from posttrain.identities import adapters, best_of_n, gradients, grpo, nf4, positions, ppo, preferences

IDENTITIES = (
    adapters.lora_count, adapters.lora_start, adapters.lora_merge, adapters.lora_merge_logits,
    adapters.prefix_count, adapters.prompt_count,
    nf4.nf4_levels, nf4.nf4_constants, nf4.nf4_double_constants, nf4.nf4_bits, nf4.nf4_error, nf4.nf4_double_error,
    preferences.dpo_start, preferences.dpo_loss, preferences.dpo_sign, preferences.dpo_weight, preferences.dpo_reward,
    preferences.kto_start, preferences.reward_loss, preferences.reward_shift, preferences.reward_padding,
    ppo.ppo_gae, ppo.ppo_clip, ppo.ppo_start, ppo.ppo_ratio, ppo.ppo_kl, ppo.ppo_reward, ppo.kl_unbiased, ppo.kl_sign,
    grpo.rloo_unbiased, grpo.grpo_equal_rewards,
    best_of_n.best_of_4_kl, best_of_n.best_of_16_kl, best_of_n.best_of_128_kl, best_of_n.best_of_n_kl,
    best_of_n.best_of_n_estimate,
    positions.rope_relative, positions.rope_norm, positions.pi_positions, positions.pi_bound, positions.pi_advantage,
    positions.wrapped_positions, positions.alibi_slopes, positions.alibi_distance, positions.alibi_shift,
    gradients.gradient_accumulation,
)  # fmt: skip


def algebra(section: Algebra, work: Path, checkpoints: Path) -> dict:
    """Return each identity by its function's name: `value`, what the code of the stages gives, and `control`, the same
    quantity from a planted fault.

    A value is a number that the paper states, or the largest deviation between two sides, 0 but for rounding. Nothing
    is judged here.
    """
    identities = {}
    for identity in IDENTITIES:
        torch.manual_seed(section.seed)  # so that no identity depends on those before it
        value, control = identity()
        say(f"{identity.__name__}: {value:.6g}, control {control:.6g}")
        identities[identity.__name__] = {"value": float(value), "control": float(control)}
    return {"identities": identities}

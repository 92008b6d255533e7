"""Hours of a training on one GPU that no record times, by its arithmetic: from the least to the most.

posttrain plan --gpu-memory-gb 80
"""

from posttrain.config.sections import Longctx, Pairs, Passes, Ppo, Sampled, Scratch
from posttrain.resources.estimates import Need
from posttrain.resources.steps import loop

# GB of a GPU's memory -> its dense arithmetic in bfloat16, FLOP/s, by the data sheets of A10, A100 and H200. Another
# GPU counts as the nearest of these.
PEAK = {24: 125e12, 80: 312e12, 141: 989e12}
# Share of it that trainings reach: the most is PaLM's 46 % (arXiv 2204.02311, table 3), rounded up; the least is ours.
LEAST, MOST = 0.15, 0.5
SHORT = 0.25  # mean length of rows beside the longest, at least
DRAWN = 0.1  # share of the least that drawing answers token by token reaches, ours


def hours(need: Need, stage: str, memory_gb: float) -> tuple[float, float] | None:
    """(fewest, most) hours of a training; None for a stage that does not train, and without a number of steps.

    FLOP for each parameter and token: 6 of forward and backward pass, 4 where only an adapter has gradients, 2 of a
    forward pass (Kaplan et al., arXiv 2001.08361, section 2.1); and attention's for each pair of tokens.
    """
    section = loop(getattr(need.settings, stage))
    without_steps = isinstance(section, Passes) and section.epochs is not None
    if without_steps or not hasattr(section, "steps"):
        return None
    shape, peak = need.shape, PEAK[min(PEAK, key=lambda gb: abs(gb - memory_gb))]
    length, rows = longest(need, section), section.batch_size * (2 if isinstance(section, Pairs) else 1)
    attention = 12 * shape.layers * shape.hidden * length / 2  # a token sees half of the others in the mean
    forward = 2 * shape.parameters + attention / 3
    trained = 3 * forward if need.trained > shape.parameters / 2 else 2 * forward
    trained += forward if getattr(section, "gradient_checkpointing", False) else 0
    tokens = section.steps * rows * length
    most = tokens * trained / LEAST
    if isinstance(section, Sampled):
        networks = 2 if isinstance(section, Ppo) else 1
        scored = (2 + networks) * forward  # by the policy, the reference, the reward model and the value function
        most = tokens * (trained * networks * section.epochs + scored) / LEAST + tokens * forward / (LEAST * DRAWN)
    packed = isinstance(section, Scratch) or getattr(section, "packing", False)
    fewest = most * LEAST / MOST * (1 if packed else SHORT)
    return fewest / peak / 3600, most / peak / 3600


def longest(need: Need, section) -> int:
    """The longest row of a training, in tokens."""
    if isinstance(section, Longctx):
        return round(need.shape.context * section.factor)
    if isinstance(section, Sampled):
        return need.settings.longest_row + section.max_new_tokens
    return getattr(section, "context", None) or getattr(section, "max_length", None) or need.settings.longest_row

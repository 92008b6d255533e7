"""The state from which an interrupted PPO resumes exactly: trained weights, optimiser, schedule, iteration."""

import math
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from posttrain.config.sections import Ppo
from posttrain.ground.errors import Diverged
from posttrain.ground.progress import say
from posttrain.models import adapters, policy
from posttrain.models.network import Network
from posttrain.training import checkpoint, interruption, parallel, schedule, spotchecks
from posttrain.training.optimizer import of_groups, rates


class Optimizers:
    """The optimiser of policy and value function. Their gradients are summed over processes, and clipped for each of
    the two."""

    def __init__(self, section: Ppo, models):
        weights = {name: [weight for _, weight in named] for name, named in models.trained().items()}
        rates = {"policy": section.learning_rate, "value": section.value_learning_rate or section.learning_rate}
        self.weights, self.step_count = weights, 0
        groups = [{"params": weights[name], "lr": rates[name]} for name in weights]
        modules = chain(models.policy.model.modules(), models.value.model.modules())
        self.both = of_groups(section, groups, modules)  # a schedule's end is a share of `learning_rate` for both

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.both.zero_grad(set_to_none=True)

    def step(self, longest: float, policy: bool) -> dict:
        """One step, of the value function only unless `policy`; returns the gradient norms before clipping to
        `longest`.
        Raises Diverged for a gradient that is not finite."""
        norms = {}
        for name, weights in self.weights.items():
            if name == "policy" and not policy:
                continue
            parallel.add_gradients(weights)
            norm = torch.nn.utils.clip_grad_norm_(weights, longest)
            norms[f"{name}_grad_norm"] = norm.item()
        if not all(map(math.isfinite, norms.values())):
            raise Diverged(f"ppo: a gradient is no number ({norms}): lower learning_rate")
        self.both.step()
        self.step_count += 1
        return {"policy_grad_norm": 0.0} | norms


def optimizers(section: Ppo, models) -> tuple[Optimizers, Any]:
    """The optimiser, and its schedule, which advances once per iteration."""
    optimizer = Optimizers(section, models)
    skipped = 0 if section.warmup_start_ratio else 1  # a first value of 0, with which an iteration would learn nothing
    advancing = rates(section, optimizer.both, schedule.warmup(section) + skipped, section.steps + skipped)
    for _ in range(skipped):
        advancing.step()
    return optimizer, advancing


def save(
    section: Ppo,
    models,
    foundation: adapters.Foundation,
    state: dict,
    optimizer: Optimizers,
    schedule,
    watch: interruption.Watch,
    checkpoints: Path,
) -> None:
    """Write a snapshot and a checkpoint where they are due; only the main process writes.

    Raises Interrupted where the run has to stop.
    """
    iteration = state["iteration"]
    if parallel.main() and iteration % section.snapshot_steps == 0 and iteration < section.steps:
        take_snapshot(models.policy, foundation, checkpoints / "snapshots" / f"{iteration:06d}")
    if watch.step(iteration) or iteration == section.steps or spotchecks.due(section, iteration):
        checkpoint.write(
            checkpoints / f"checkpoint-{iteration:06d}",
            {
                "trained": {
                    name: {key: weight.detach() for key, weight in named} for name, named in models.trained().items()
                },
                "optimizer": optimizer.both.state_dict(),
                "steps": optimizer.step_count,
                "schedule": schedule.state_dict(),
            },
            state,
        )
        spotchecks.keep(section, checkpoints)
        watch.wrote()
    if stretch := spotchecks.ended(section, iteration):
        trained = [item for named in models.trained().values() for item in named]
        spotchecks.record(stretch, checkpoints, state["history"], trained, optimizer.both)
    if stopped := watch.stop(iteration):
        raise stopped


def take_snapshot(network: Network, foundation: adapters.Foundation, folder: Path) -> None:
    """Write the policy as it is: its adapter, or the whole model, rounded to the type of the SFT policy's weights."""
    if network.adapter:
        adapters.save(network.model, folder, foundation.weights, network.adapter)
        return
    dtype = getattr(torch, policy.dtype_of(foundation.weights))
    # Tied weights are written once.
    by_place = {weight.data_ptr(): (name, weight) for name, weight in network.model.state_dict().items()}
    network.model.save_pretrained(folder, state_dict={name: weight.to(dtype) for name, weight in by_place.values()})


def resume(checkpoints: Path, models, optimizer: Optimizers, schedule) -> dict | None:
    """Load the newest valid checkpoint and return its state; None where there is none."""
    saved = checkpoint.read(checkpoints)
    if saved is None:
        return None
    tensors, state = saved
    for name, named in models.trained().items():
        for key, weight in named:
            weight.data.copy_(tensors["trained"][name][key])
    optimizer.both.load_state_dict(tensors["optimizer"])
    optimizer.step_count = tensors["steps"]
    schedule.load_state_dict(tensors["schedule"])
    say(f"continuing after iteration {state['iteration']}")
    return state

"""The state from which interrupted reinforcement learning resumes exactly: weights, optimiser, schedule, iteration."""

import math
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from posttrain.config.sections import Sampled
from posttrain.ground.errors import Diverged
from posttrain.ground.progress import say
from posttrain.models import adapters, policy
from posttrain.models.network import Network
from posttrain.training import checkpoint, interruption, parallel, schedule, spotchecks
from posttrain.training.optimizer import of_groups, rates


class Optimizers:
    """The optimiser of the policy and, where there is one, the value function. Gradients are summed over processes, and
    clipped for each of the two."""

    def __init__(self, section: Sampled, models):
        weights = {name: [weight for _, weight in named] for name, named in models.trained().items()}
        rates = {"policy": section.learning_rate, "value": getattr(section, "value_learning_rate", None)}
        self.weights, self.step_count, self.stage = weights, 0, section.__class__.__name__.lower()
        groups = [{"params": weights[name], "lr": rates[name] or section.learning_rate} for name in weights]
        networks = [network for network in (models.policy, models.value) if network]
        modules = chain.from_iterable(network.model.modules() for network in networks)
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
            raise Diverged(f"{self.stage}: a gradient is no number ({norms}): lower learning_rate")
        self.both.step()
        self.step_count += 1
        return {"policy_grad_norm": 0.0} | norms


def optimizers(section: Sampled, models) -> tuple[Optimizers, Any]:
    """The optimiser, and its schedule, which advances once per iteration."""
    optimizer = Optimizers(section, models)
    skipped = 0 if section.warmup_start_ratio else 1  # a first value of 0, with which an iteration would learn nothing
    advancing = rates(section, optimizer.both, schedule.warmup(section) + skipped, section.steps + skipped)
    for _ in range(skipped):
        advancing.step()
    return optimizer, advancing


def save(
    section: Sampled,
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

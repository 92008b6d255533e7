"""The networks of PPO: policy, value function and reference, as adapters of one model or as whole models."""

import copy
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from transformers import set_seed

from posttrain.config.sections import Ppo
from posttrain.models import adapters, policy, reward_head
from posttrain.models.network import Network


class Models(NamedTuple):
    """The networks: adapters on one set of frozen weights, or whole models."""

    policy: Network
    value: Network
    reference: Network
    value_head: torch.nn.Module
    tokenizer: object

    def trained(self) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
        """The trained weights of policy and value function, with their names."""
        return {"policy": self.policy.trained(), "value": [*self.value.trained(), *self.value_head.named_parameters()]}


def load_models(section: Ppo, foundation: adapters.Foundation, reward: Path | None = None) -> Models:
    """A policy that starts as the SFT policy, which is the reference, and a value function that starts as the SFT
    policy, with a head of zeros, or as the reward model. reward: its manifest."""
    set_seed(section.seed)
    tokenizer = policy.load_tokenizer(foundation.weights)
    start = reward if section.value_from else None
    if section.method == "full":
        learner, value, reference, weight = load_whole(foundation, start)
    else:
        learner, value, reference, weight = load_adapters(section, foundation, start)
    head = torch.nn.Linear(learner.model.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    if weight is not None:
        head.weight.data.copy_(weight)
    return Models(learner, value, reference, head.to(learner.model.device), tokenizer)


def load_adapters(section: Ppo, foundation: adapters.Foundation, reward: Path | None) -> tuple:
    """(policy, value function, reference, weight of the value function's head or None), as adapters of one model.
    reward: manifest of the reward model as which the value function starts; None for the SFT policy."""
    model, weight = adapters.load_as_sft(foundation, section, name="policy"), None
    if reward:
        weight = reward_head.load(reward, foundation, model, "value").head.weight
    else:
        model.add_adapter("value", copy.deepcopy(model.peft_config["policy"]))
        adapters.start_as_sft(model, foundation, "value")
    if foundation.adapter:
        config = peft.PeftConfig.from_pretrained(foundation.adapter.parent / "model")
        model.add_adapter("reference", config)
        adapters.start_as_sft(model, foundation, "reference")
    reference = Network(model, "reference" if foundation.adapter else None)
    return Network(model.eval(), "policy"), Network(model, "value"), reference, weight


def load_whole(foundation: adapters.Foundation, reward: Path | None) -> tuple:
    """(policy, value function, reference, weight of the value function's head or None), each a model in float32, which
    is the arithmetic of training. reward: as in `load_adapters`."""
    learner, reference = (policy.load_verified(foundation.weights, dtype="float32").eval() for _ in range(2))
    reference.requires_grad_(False)
    if reward is None:
        value, weight = policy.load_verified(foundation.weights, dtype="float32"), None
    else:
        loaded = reward_head.load(reward, foundation, dtype="float32")
        value, weight = loaded.network.model.requires_grad_(True), loaded.head.weight
    return Network(learner), Network(value.base_model.eval()), Network(reference), weight  # without the head over words

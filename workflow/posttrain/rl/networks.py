"""The networks of a method: policy, reference and value function, as adapters of one model or as whole models."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from transformers import set_seed

from posttrain.config.sections import Ppo, Sampled
from posttrain.models import adapters, policy, reward_head
from posttrain.models.network import Network


class Models(NamedTuple):
    """The networks: adapters on one set of frozen weights, or whole models."""

    policy: Network
    reference: Network
    tokenizer: Any
    value: Any = None  # a Network in PPO
    value_head: Any = None  # H -> 1

    def trained(self) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
        """The trained weights of policy and value function, with their names."""
        trained = {"policy": self.policy.trained()}
        if self.value:
            trained["value"] = [*self.value.trained(), *self.value_head.named_parameters()]
        return trained


def load_models(section: Sampled, foundation: adapters.Foundation, reward: Path | None = None) -> Models:
    """A policy that starts as the SFT policy, which is the reference; and PPO's value function, which starts as the SFT
    policy with a head of zeros, or as the reward model. reward: its manifest."""
    set_seed(section.seed)
    tokenizer = policy.load_tokenizer(foundation.weights)
    if section.method == "full":
        learner, reference = (policy.load_verified(foundation.weights, dtype="float32").eval() for _ in range(2))
        models = Models(Network(learner), Network(reference.requires_grad_(False)), tokenizer)  # in the same arithmetic
    else:
        learner = adapters.load_as_sft(foundation, section, name="policy")
        models = Models(Network(learner, "policy"), Network(learner), tokenizer)
    if isinstance(section, Ppo):
        models = with_value(models, section, foundation, reward)
    if foundation.adapter:
        learner.add_adapter("reference", peft.PeftConfig.from_pretrained(foundation.adapter.parent / "model"))
        adapters.start_as_sft(learner, foundation, "reference")
        models = models._replace(reference=Network(learner, "reference"))
    learner.eval()
    return models


def with_value(models: Models, section: Ppo, foundation: adapters.Foundation, reward: Path | None) -> Models:
    """The models with a value function: a further adapter, or a whole model in float32 without its head over words."""
    learner, started = models.policy.model, None
    if section.value_from:
        assert reward, "checked with the config"
        shared = learner if models.policy.adapter else None
        network, started = reward_head.load(reward, foundation, shared, "value", dtype="float32")
        if shared:
            adapters.hold(learner, foundation, "value")
        value = network if shared else Network(network.model.requires_grad_(True).base_model)
    elif models.policy.adapter:
        learner.add_adapter("value", copy.deepcopy(learner.peft_config["policy"]))
        adapters.start_as_sft(learner, foundation, "value")
        value = Network(learner, "value")
    else:
        value = Network(policy.load_verified(foundation.weights, dtype="float32").base_model.eval())
    head = torch.nn.Linear(learner.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    if started is not None:
        head.weight.data.copy_(started.weight)
        if started.bias is not None:
            head.bias.data.copy_(started.bias)
    return models._replace(value=value, value_head=head.to(learner.device))

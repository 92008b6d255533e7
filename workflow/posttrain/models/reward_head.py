"""Reward models: a scalar head on a language model's last token, for training by TRL and for scoring in PPO."""

import copy
from pathlib import Path
from typing import NamedTuple

import peft
import torch

from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, sha256, write_json
from posttrain.models import policy
from posttrain.models.adapters import Foundation
from posttrain.models.network import Network

MEAN = "mean_reward"  # key of the contract: what is taken from every score
HEAD = "base_model.model.score.weight"  # where PEFT saves the scalar head of a sequence classifier


def pad_apart_from_end(tokenizer):
    """The tokenizer with a padding token other than its end of turn; a changed copy where both are the same.

    A classifier reads the last token that is not padding: with one token for both, it would read the token before the
    end of turn. Any other token will do, since rows end with an end of turn.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    apart = copy.deepcopy(tokenizer)
    apart.pad_token = apart.convert_ids_to_tokens(int(tokenizer.eos_token_id == 0))
    return apart


def classify(model, tokenizer, rows: list[list[int]], batch: int = 64) -> list[float]:
    """The classifier's score of each row of tokens, padded on the right as in training."""
    model.eval()
    scores, pad = [], tokenizer.pad_token_id
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = max(map(len, part))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in part], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part], device=model.device)
        with torch.no_grad():
            scores += model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    return scores


def write_mean(folder: Path, mean: float) -> None:
    """Note in a published reward model the mean score that is to be 0."""
    file = folder / "policy.json"
    write_json(file, read_json(file) | {MEAN: mean})


class RewardModel(NamedTuple):
    """A reward model in use: the network, and its head, H -> 1, which reads the last token's hidden state."""

    network: Network
    head: torch.nn.Linear


def load(manifest: Path, foundation: Foundation, model=None, name: str = "reward", dtype: str | None = None):
    """A reward model, frozen: as an adapter, `name`, of a PEFT model on the same frozen weights, or in memory of its
    own.

    foundation: of the policies. model: the PEFT model on it, where there is one. dtype: of a whole reward model, None
    for that of its file. Raises UserError where the reward model is an adapter on other weights.
    """
    contract = policy.read_contract(manifest)
    if contract["base"] is None:
        whole = policy.load_verified(manifest, head=True, dtype=dtype).eval().requires_grad_(False)
        return RewardModel(Network(whole), head_of(whole.score.weight, whole.device, contract.get(MEAN)))
    if contract["base"] != sha256(foundation.weights):
        raise UserError(f"{manifest}: this reward model was trained on other weights than {foundation.weights}")
    folder = manifest.parent / "model"
    config = peft.PeftConfig.from_pretrained(folder)
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
    state = peft.load_peft_weights(folder, device="cpu")
    weight = state.pop(HEAD)
    if model is None or bool(contract["quantization"]) != bool(foundation.quantization):
        model = peft.PeftModel(policy.load_under(manifest, foundation.weights), config, name).eval()
    else:
        model.add_adapter(name, config)
    peft.set_peft_model_state_dict(model, state, adapter_name=name)
    return RewardModel(Network(model, name), head_of(weight, model.device, contract.get(MEAN)))


def head_of(weight: torch.Tensor, device, mean: float | None = None) -> torch.nn.Linear:
    """A frozen head in float32 with the given weight, 1 x H. mean: taken from every score; None for no bias."""
    head = torch.nn.Linear(weight.shape[1], 1, bias=mean is not None)
    head.weight.data = weight.detach().float()
    if mean is not None:
        head.bias.data.fill_(-mean)
    return head.to(device).requires_grad_(False)

"""Reward models: a scalar head on a language model's last token, for training by TRL and for scoring in PPO."""

import copy
from pathlib import Path

import peft
import torch

from posttrain.ground.errors import UserError
from posttrain.ground.files import sha256
from posttrain.models import policy

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


def add_to(model, manifest: Path, weights: Path, name: str = "reward") -> torch.nn.Linear:
    """Add a reward model's adapter to a PEFT model on the same frozen weights; returns its head, H -> 1.

    weights: manifest of the frozen weights. Raises UserError where the reward model was trained on others.
    """
    if policy.read_contract(manifest)["base"] != sha256(weights):
        raise UserError(f"{manifest}: this reward model was trained on other weights than {weights}")
    folder = manifest.parent / "model"
    config = peft.PeftConfig.from_pretrained(folder)
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
    state = peft.load_peft_weights(folder, device="cpu")
    weight = state.pop(HEAD)
    model.add_adapter(name, config)
    peft.set_peft_model_state_dict(model, state, adapter_name=name)
    head = torch.nn.Linear(weight.shape[1], 1, bias=False)
    head.weight.data = weight.float()
    return head.to(model.device).requires_grad_(False)

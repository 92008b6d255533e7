"""The optimisers by their names (of PyTorch, transformers, bitsandbytes, and Muon), and their learning rates.

Muon orthogonalises the momentum of each matrix (Jordan et al. 2024; `torch.optim.Muon`); embeddings and vectors
stay with AdamW, as its authors advise. `match_rms_adamw` lets both share a learning rate (arXiv 2502.16982).
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

from posttrain.config.sections import Optimisation
from posttrain.ground.errors import UserError
from posttrain.training import parallel, schedule

TRAINERS = {"adamw": "adamw_torch", "muon": "adamw_torch", "paged_adamw": "paged_adamw_32bit"}  # transformers' names
SHARDED = ("adamw", "rmsprop")  # whose state can be that of a share of each tensor


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimisers with one `step`, and common parameter groups for the learning-rate schedule."""

    def __init__(self, model: torch.nn.Module, learning_rate: float, weight_decay: float, **adamw):
        """adamw: its further arguments (`moments`)."""
        embeddings = {
            weight
            for layer in model.modules()
            if isinstance(layer, torch.nn.Embedding)
            for weight in layer.parameters()
        }
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        matrices = [weight for weight in trained if weight.ndim == 2 and weight not in embeddings]
        rest = [weight for weight in trained if weight.ndim != 2 or weight in embeddings]
        self.muon = torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.0, **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {"lr": learning_rate})

    def step(self, closure=None):
        """One step of both."""
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict:
        """The state of both, for checkpoints."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore both, and share the parameter groups again, so that the schedule changes them."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups[:] = [*self.muon.param_groups, *self.adamw.param_groups]


def chosen(section: Optimisation, model: torch.nn.Module) -> MuonWithAdamW | None:
    """Muon, where it is the optimiser; None for others, which transformers' trainer creates itself (`of_trainer`)."""
    if section.optimizer != "muon":
        return None
    return MuonWithAdamW(model, section.learning_rate, section.weight_decay, **moments(section))


def of_trainer(section: Optimisation) -> str:
    """The name of the optimiser for transformers' trainers. Raises UserError where weights are shared out, of which it
    needs whole tensors."""
    name = section.optimizer or "adamw"
    if parallel.sharded and name not in SHARDED:
        raise UserError(f"optimizer: {name} needs whole tensors, and --shard leaves parts: take {' or '.join(SHARDED)}")
    return TRAINERS.get(name, name)


def of_groups(section: Optimisation, groups: list[dict], modules: Iterable[torch.nn.Module]) -> torch.optim.Optimizer:
    """The optimiser of parameter groups, as transformers' trainers create it by its name. modules: which hold them; the
    state of embeddings is never in 8 bits (arXiv 2110.02861, section 2.3)."""
    name, rate = section.optimizer or "adamw", section.learning_rate
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=rate)
    if name == "adafactor":
        from transformers import Adafactor

        decay = section.weight_decay
        return Adafactor(groups, lr=rate, weight_decay=decay, scale_parameter=False, relative_step=False)
    common = {"lr": rate, "weight_decay": section.weight_decay, **moments(section)}
    if name == "adamw":
        return torch.optim.AdamW(groups, **common)
    from bitsandbytes.optim import AdamW, GlobalOptimManager

    for module in modules if name.endswith("8bit") else ():
        if isinstance(module, torch.nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return AdamW(groups, **common, optim_bits=8 if name.endswith("8bit") else 32, is_paged=name.startswith("paged"))


def moments(section: Optimisation) -> dict:
    """The decays and the epsilon of PyTorch's AdamW."""
    beta1 = 0.9 if section.beta1 is None else section.beta1
    return {"betas": (beta1, section.beta2), "eps": 1e-8 if section.epsilon is None else section.epsilon}


def rates(training: Optimisation, optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> LambdaLR:
    """The schedule of an optimiser over so many steps, of which the first `warmup` warm up."""
    from transformers import get_scheduler

    name, options = schedule.named(training)
    after = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=options)
    if not training.warmup_start_ratio:
        return after
    return LambdaLR(optimizer, partial(schedule.share, training.warmup_start_ratio, warmup, after.lr_lambdas[0]))


def start_at(trainer, training: Optimisation) -> None:
    """Let a trainer of transformers warm up from the section's share of the peak, where it has one."""
    if not training.warmup_start_ratio:
        return

    def create_scheduler(num_training_steps: int, optimizer=None):
        warmup = schedule.warmup(training)
        trainer.lr_scheduler = rates(training, optimizer or trainer.optimizer, warmup, num_training_steps)
        return trainer.lr_scheduler

    trainer.create_scheduler = create_scheduler

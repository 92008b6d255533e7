"""The optimiser of a whole model: AdamW, or Muon for its matrices and AdamW for the rest.

Muon orthogonalises the momentum of each matrix (Jordan et al. 2024; `torch.optim.Muon`); embeddings and vectors
stay with AdamW, as its authors advise. `match_rms_adamw` lets both share a learning rate (arXiv 2502.16982).
"""

import torch


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


def chosen(section, model: torch.nn.Module) -> MuonWithAdamW | None:
    """The optimiser of `section.optimizer`; None for AdamW, which transformers' trainer creates itself."""
    if section.optimizer == "adamw":
        return None
    return MuonWithAdamW(model, section.learning_rate, section.weight_decay, **moments(section))


def moments(section) -> dict:
    """The decays and the epsilon of PyTorch's AdamW."""
    beta1 = 0.9 if section.beta1 is None else section.beta1
    return {"betas": (beta1, section.beta2), "eps": 1e-8 if section.epsilon is None else section.epsilon}

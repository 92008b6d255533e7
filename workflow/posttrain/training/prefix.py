"""Checkpoints of a prefix that a network makes (Li and Liang 2021, arXiv 2101.00190, section 4.3).

PEFT saves the prefix that was made, as an artifact needs it, and reads a checkpoint into the network's input. So a
checkpoint gets the input in its place, and the network beside it.
"""

from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from posttrain.training import parallel

INPUT, NETWORK = "adapter_model.safetensors", "prefix_network.safetensors"


class Reparametrized(TrainerCallback):
    """Completes each checkpoint before it is sealed, and continues from it."""

    def __init__(self, checkpoints: Path):
        parallel.refuse_sharded("sft.prefix_projection")
        self.checkpoints = checkpoints

    def on_save(self, args, state, control, model=None, **_):
        if parallel.main():
            folder, encoder = self._folder(state), _encoder(model)
            weights = {name: weight.contiguous() for name, weight in encoder.state_dict().items()}
            save_file({"prompt_embeddings": weights["embedding.weight"]}, folder / INPUT)
            save_file(weights, folder / NETWORK)

    def on_train_begin(self, args, state, control, model=None, **_):
        if state.global_step:
            _encoder(model).load_state_dict(load_file(self._folder(state) / NETWORK))

    def _folder(self, state) -> Path:
        return self.checkpoints / f"checkpoint-{state.global_step}"


def _encoder(model):
    """The network of the adapter that is trained."""
    return model.prompt_encoder[model.active_adapter]

"""A language model in use: a whole one, or an adapter on frozen weights that several adapters share."""

import contextlib
from typing import Any, NamedTuple

from torch.nn import Parameter


@contextlib.contextmanager
def adapter(model, name: str | None):
    """Activate one adapter, for training too; `None` disables all."""
    if name is None:
        with model.disable_adapter():
            yield model
    else:
        model.set_adapter(name)
        yield model


def belongs(key: str, *names: str) -> bool:
    """Whether a weight of a PEFT model, by its key, belongs to one of the named adapters."""
    return any(f".lora_{half}.{name}." in key for half in "AB" for name in names)


class Network(NamedTuple):
    """A model of transformers, or PEFT's with the adapter to activate, where None disables all."""

    model: Any
    adapter: str | None = None

    def active(self) -> contextlib.AbstractContextManager:
        """A context in which the adapter is active, or none."""
        return adapter(self.model, self.adapter) if hasattr(self.model, "peft_config") else contextlib.nullcontext()

    def trained(self) -> list[tuple[str, Parameter]]:
        """The weights that training changes, with their names: the adapter's, or all of a whole model."""
        named = self.model.named_parameters()
        return [(key, weight) for key, weight in named if self.adapter is None or belongs(key, self.adapter)]

"""A stage of an experiment on a model and a device: what it holds in memory, by its settings.

posttrain plan EXPERIMENT/STAGE
"""

from typing import Any, NamedTuple

from posttrain.config.sections import Adapter, Optimisation, Section, Sft
from posttrain.config.stages import Experiment
from posttrain.dag import given
from posttrain.ground import weights
from posttrain.resources import memory, optimizer
from posttrain.resources.architecture import Architecture
from posttrain.resources.memory import FULL, HALF, Terms
from posttrain.resources.steps import Batch, learned, loop, micro


class Case(NamedTuple):
    """A stage of an experiment, on a model and a device."""

    settings: Experiment
    shape: Architecture
    stage: str
    policy: str  # the judged policy; "" for other stages
    longest: dict[str, int]  # kind of rows -> tokens of the longest, where the data is prepared
    gpu: bool

    @property
    def section(self) -> Section:
        """The stage's settings."""
        return getattr(self.settings, self.stage)

    @property
    def given(self) -> dict:
        """The values of a given base's `config.json`; {} for one that is trained from scratch."""
        base = self.settings.base
        return {} if base.scratch else given.given(base).config

    @property
    def size(self) -> int:
        """Bytes of a frozen weight that is not quantised."""
        return HALF if weights.frozen_dtype(self.settings.base.dtype, self.given) == "bfloat16" else FULL

    @property
    def stored(self) -> int:
        """Bytes of a number in the file of the base's weights."""
        return HALF if weights.own_dtype(self.given) in weights.SIXTEEN_BITS else FULL

    def frozen(self, quantised: bool, double: bool = True) -> Terms:
        """Frozen weights, of the base's type or in NF4."""
        return memory.weights(self.shape, quantised, double, self.size)

    def half(self, section: Any = None) -> bool:
        """Whether a stage's arithmetic is in bfloat16: by its precision, or on frozen weights of that type."""
        return self.size == HALF or getattr(section, "precision", "") == "bfloat16"

    def on_quantised(self, section: Any) -> bool:
        """Whether the SFT policy's weights, in a stage that continues or measures it, are in NF4
        (`adapters.foundation_of`)."""
        sft = self.settings.sft.method
        return section.method in (None, "qlora") if sft == "full" else sft == "qlora"

    def foundation(self, section: Any) -> Terms:
        """The SFT policy's weights in a stage that continues or measures it: in float32 where all are trained."""
        if isinstance(section, Adapter) and section.method == "full":
            return memory.weights(self.shape, False)
        return self.frozen(self.on_quantised(section), self.settings.sft.double_quantization)

    def reward_beside(self, section: Any) -> Terms:
        """The weights of a reward model that is no adapter on the weights of a stage that scores with it."""
        reward = self.settings.reward
        if reward is None or getattr(section, "reward_function", None):
            return {}
        own = "full" in (reward.method, getattr(section, "method", None) if isinstance(section, Adapter) else None)
        if not own and self.on_quantised(reward) == self.on_quantised(section):
            return {}
        quantised = reward.method != "full" and self.on_quantised(reward)
        return self.frozen(quantised, self.settings.sft.double_quantization)

    @property
    def policy_is_adapter(self) -> bool:
        """Whether the judged policy is an adapter, of `sft` or of a stage that continues it."""
        section = getattr(self.settings, self.policy, None)
        return isinstance(section, Sft | Adapter) and section.method != "full"

    def policy_is(self, *kinds: type[Section]) -> bool:
        """Whether the section of the judged policy is of one of these classes."""
        return isinstance(getattr(self.settings, self.policy, None), kinds)

    def logits(self, batch: Batch, copies: int) -> Terms:
        """The logits of a batch. copies: number of such tensors that a loss holds at once."""
        return memory.logits(self.shape, batch.rows, batch.length, copies)

    @property
    def optimiser(self) -> float:
        """Bytes of the optimiser's state on the device. On a GPU, what is paged counts for the host alone."""
        return optimizer.state(*self._trained) - self.paged

    @property
    def paged(self) -> float:
        """Bytes of the optimiser's state that a GPU hands to the host."""
        return optimizer.paged(*self._trained) if self.gpu else 0

    @property
    def _trained(self) -> tuple[str | None, list[optimizer.Tensors]]:
        """The optimiser's name, and what it trains."""
        return loop(self.section).optimizer, learned(self.settings, self.shape, self.stage).tensors

    def step(self, section: Optimisation, batch: Batch, quantised: bool, loss: Terms) -> Terms:
        """The memory of a training step in addition to the weights, in bytes. loss: the logits' terms.

        Without accumulation, gradients are created while activations are freed, and need only what exceeds these.
        """
        shape, rows, length, padded = self.shape, *batch
        trained = learned(self.settings, shape, self.stage)
        kept, norms, rank, numbers = trained.kept, trained.norms, trained.rank, trained.numbers
        frozen, autocast = numbers < shape.parameters, section.precision == "bfloat16"
        half, recomputed = self.half(section) if frozen else autocast, getattr(section, "gradient_checkpointing", False)
        terms: Terms = {"adapters": FULL * numbers} if frozen else {}
        terms |= {"gradients": FULL * numbers, "optimiser": self.optimiser}
        cast = half and not autocast
        # Nothing is kept before the first layer that trains.
        keeping = shape if recomputed else shape._replace(layers=shape.layers - trained.first)
        terms |= memory.activations(keeping, rows, length, kept, norms, half, recomputed, rank, cast)
        for term, size in memory.dora(keeping, rows * length, kept, recomputed).items() if trained.dora else ():
            terms[term] = terms.get(term, 0) + size
        terms |= memory.padding_mask(keeping, rows, length, recomputed) if padded else {}
        terms |= loss | memory.workspace(shape, rows * length, quantised, half, self.size)
        terms |= memory.half_copies(shape, quantised, autocast) if self.size == FULL or not frozen else {}
        if micro(section) == section.batch_size:
            terms["gradients"] = max(0.0, terms["gradients"] - terms["activations"] - terms.get("logits", 0))
        return terms

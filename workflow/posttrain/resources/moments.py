"""The memory of each stage in its phases: loading, training, answering, scoring; the largest one is the peak.

posttrain plan EXPERIMENT/STAGE
"""

import os
from functools import singledispatch
from typing import Any, NamedTuple

from posttrain.config.sections import (
    LARGEST_BATCH,
    Adapter,
    Base,
    Compare,
    Dpo,
    Evaluate,
    Lengths,
    Longctx,
    Optimisation,
    Pairs,
    Ppo,
    Reference,
    Reward,
    Section,
    Sft,
)
from posttrain.config.stages import STAGES, Experiment
from posttrain.data.preferences import ANSWERS
from posttrain.resources import memory
from posttrain.resources.architecture import Architecture
from posttrain.resources.memory import FULL, MB, Terms
from posttrain.resources.steps import Batch, learned, micro

# Measured resident memory in MB of Python and the libraries that a stage imports (docs/plan.md). The first entry is for
# stages that were not measured.
LIBRARIES = {Section: 640, Base: 605, Sft: 640, Reward: 625, Dpo: 640, Longctx: 610, Ppo: 500, Reference: 530,
             Compare: 490, Lengths: 490, Evaluate: 605}  # fmt: skip
COPY = 425  # MB of a process that copies a base
CUDA = 3000  # MB of host memory for CUDA's libraries and its context
HEAP = {"adapter": 1.5, "whole": 0.5}  # freed blocks that glibc keeps, as a multiple of the activations
Moments = dict[str, Terms]  # moment -> term -> bytes on the device


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
    def on_quantised(self) -> bool:
        """Whether alignment adapters are on weights in NF4: always, except after LoRA."""
        return self.settings.sft.method != "lora"

    @property
    def foundation(self) -> Terms:
        """The frozen weights of alignment: float32 after LoRA, else NF4 (`adapters.foundation_of`)."""
        return memory.weights(self.shape, self.on_quantised, self.settings.sft.double_quantization)

    def policy_is(self, *kinds: type[Section]) -> bool:
        """Whether the section of the judged policy is of one of these classes."""
        return isinstance(getattr(self.settings, self.policy, None), kinds)

    def logits(self, batch: Batch, copies: int) -> Terms:
        """The logits of a batch. copies: number of such tensors that a loss holds at once."""
        return memory.logits(self.shape, batch.rows, batch.length, copies)

    def step(self, section: Optimisation, batch: Batch, quantised: bool, loss: Terms) -> Terms:
        """The memory of a training step in addition to the weights, in bytes. loss: the logits' terms.

        Without accumulation, gradients are created while activations are freed, and need only what exceeds these.
        """
        shape, rows, length, padded = self.shape, *batch
        half, recomputed = section.precision == "bfloat16", getattr(section, "gradient_checkpointing", False)
        kept, numbers, norms, rank, muon = learned(self.settings, shape, self.stage)
        terms: Terms = {"adapters": FULL * numbers} if numbers < shape.parameters else {}
        terms |= memory.learning(numbers, muon)
        terms |= memory.activations(shape, rows, length, kept, norms, half, recomputed, rank)
        terms |= memory.padding_mask(shape, rows, length, recomputed) if padded else {}
        terms |= loss | memory.workspace(shape, rows * length, quantised, half)
        terms |= memory.half_copies(shape, quantised, half)
        if micro(section) == section.batch_size:
            terms["gradients"] = max(0.0, terms["gradients"] - terms["activations"] - terms.get("logits", 0))
        return terms


def moments(case: Case) -> Moments:
    """Moment -> term -> bytes on the device."""
    return _moments(case.section, case)


def peak(by_moment: Moments) -> tuple[str, Terms]:
    """The moment with the largest sum, and its terms."""
    moment = max(by_moment, key=lambda name: sum(by_moment[name].values()))
    return moment, by_moment[moment]


def host(case: Case, terms: Terms, trained: int) -> float:
    """Host memory of the process in bytes: the libraries and, on a CPU, all terms; on a GPU, the weights while loading.

    The file of quantised weights stays mapped, since embeddings are read from it. Unless MALLOC_MMAP_THRESHOLD_ is set,
    glibc keeps freed blocks (HEAP). A resumed run reads the optimiser's two moments into host memory before the GPU's.
    """
    if not terms:  # a base that is copied
        return COPY * MB
    shape = case.shape
    libraries = next(LIBRARIES[kind] for kind in type(case.section).__mro__ if kind in LIBRARIES) * MB
    if case.gpu:
        return libraries + CUDA * MB + max(FULL * shape.parameters, 2 * FULL * trained)
    mapped = FULL * memory.linear(shape) if "quantisation constants" in terms else 0
    kind = "whole" if trained >= shape.parameters else "adapter"
    heap = HEAP[kind] if trained and "MALLOC_MMAP_THRESHOLD_" not in os.environ else 0
    return libraries + sum(terms.values()) + mapped + heap * terms.get("activations", 0)


@singledispatch
def _moments(section: Section, case: Case) -> Moments:
    """The moments by the class of the stage's section; for a class without a function, the weights only."""
    return {"loading": memory.weights(case.shape, False)}


@_moments.register
def _base(section: Base, case: Case) -> Moments:
    scratch = section.scratch
    if scratch is None:
        return {"copying": {}}
    batch = Batch(micro(scratch), scratch.context, padded=False)
    held = case.step(scratch, batch, False, case.logits(batch, 3))
    return {"training": memory.weights(case.shape, False) | held}


@_moments.register(Sft)
def _sft(section: Any, case: Case) -> Moments:
    longest = case.longest.get("sft", section.max_length)
    length = section.max_length if section.packing else min(longest, section.max_length)
    virtual = section.virtual_tokens if section.method == "prompt" else 0
    batch = Batch(1 if section.packing else micro(section), length + virtual, not section.packing)
    if section.packing:  # one flat row with all tokens of a pass
        batch = batch._replace(length=micro(section) * length)
    quantised = section.method == "qlora"
    loss = memory.tiled_logits(case.shape, batch.rows, batch.length, case.gpu)
    held = case.step(section, batch, quantised, loss)
    return {"training": memory.weights(case.shape, quantised, section.double_quantization) | held}


@_moments.register(Adapter)
def _aligned(section: Any, case: Case) -> Moments:
    """A trainer of TRL on an adapter. A pair counts as two rows. A policy has logits, a reward model has none."""
    length = min(case.longest.get(section.task, section.max_length), section.max_length)
    batch = Batch((2 if isinstance(section, Pairs) else 1) * micro(section), length, padded=True)
    has_logits = STAGES[case.stage].makes == "policy"
    loss = memory.tiled_logits(case.shape, batch.rows, length, case.gpu) if has_logits else {}
    return {"training": case.foundation | case.step(section, batch, case.on_quantised, loss)}


@_moments.register
def _ppo(section: Ppo, case: Case) -> Moments:
    """Adapters: policy, value function, reference and reward model; the last two are assumed to be as large."""
    shape, half = case.shape, section.precision == "bfloat16"
    numbers = learned(case.settings, shape, case.stage).numbers
    length = _answer_length(case, section.prompts, section.max_new_tokens)
    rows = min(micro(section), -(-section.batch_size // section.minibatches))
    loss = memory.logits(shape, rows, section.max_new_tokens, 5)
    trained = case.step(section, Batch(rows, length, padded=True), case.on_quantised, loss)
    at_once = min(section.batch_size, section.answer_batch_size or section.batch_size)
    answered = memory.key_values(shape, at_once, length, half) | memory.logits(shape, at_once, 1, 5)
    answered |= memory.passing(shape, at_once * length, half)
    answered |= {"optimiser": memory.learning(numbers)["optimiser"]}
    held, adapters = case.foundation, {"adapters": 2 * FULL * numbers}
    return {"training": held | trained | adapters, "answering": held | answered | adapters}


def _answer_length(case: Case, prompts: str, new_tokens: int) -> int:
    """Most tokens of a prompt with its answer; a prompt is assumed to be as long as the longest row of its kind."""
    length = case.longest.get(prompts, case.settings.prepare.max_tokens) + new_tokens
    return length if case.shape.family == "bloom" else min(length, case.shape.context)


@_moments.register
def _longctx(section: Longctx, case: Case) -> Moments:
    shape, quantised = case.shape, section.tuning == "qlora"
    weights, whole = memory.weights(shape, quantised), memory.weights(shape, False)
    batch = Batch(micro(section), round(shape.context * section.factor), padded=False)
    loss = case.logits(batch, 3)
    by_moment = {"loading": both(weights, whole)}
    if section.tuning == "none":
        half = section.precision == "bfloat16"
        return by_moment | {"scoring": weights | loss | memory.passing(shape, batch.rows * batch.length, half)}
    by_moment["training"] = weights | case.step(section, batch, quantised, loss)
    if section.tuning != "full":
        adapters = {"adapters": FULL * learned(case.settings, shape, case.stage).numbers}
        by_moment["merging"] = both(weights, whole) | adapters
    return by_moment


@_moments.register
def _reference(section: Reference, case: Case) -> Moments:
    prepared = max((case.longest[task] for task in ANSWERS if task in case.longest), default=0)
    length = prepared or case.settings.prepare.max_tokens
    logits = memory.logits(case.shape, section.batch_size, length, 3)
    passing = memory.passing(case.shape, section.batch_size * length, section.precision == "bfloat16")
    return {"scoring": case.foundation | logits | passing}


@_moments.register
def _compare(section: Compare, case: Case) -> Moments:
    """The measuring model and the policy, which is a whole model or an adapter on the same frozen weights."""
    shape, rows, held = case.shape, section.batch_size, case.foundation
    held = held if case.policy_is(Sft, Adapter) else both(held, memory.weights(shape, False))
    length = _answer_length(case, "preference", section.max_new_tokens)
    part = -(-rows // 4)  # `compare.PARTS`
    answered = memory.key_values(shape, rows, length, False) | memory.logits(shape, rows, 1, 5)
    scored = memory.logits(shape, part, section.max_new_tokens, 4) | memory.passing(shape, part * length, False)
    return {"answering": held | answered | memory.passing(shape, rows * length, False), "scoring": held | scored}


@_moments.register
def _evaluate(section: Evaluate, case: Case) -> Moments:
    stretched = case.settings.longctx.factor if case.policy_is(Longctx) else 1
    rows = LARGEST_BATCH if section.batch_size == "auto" else section.batch_size
    return _judged(case, rows, section.max_length or round(case.shape.context * stretched), 2)


@_moments.register
def _lengths(section: Lengths, case: Case) -> Moments:
    return _judged(case, *_windows(section, case), 3)


def _judged(case: Case, rows: int, length: int, copies: int) -> Moments:
    """Scoring by a whole model. While it is dequantised, the quantised and the whole weights are in memory."""
    shape, whole = case.shape, memory.weights(case.shape, False)
    scored = memory.logits(shape, rows, length, copies) | memory.passing(shape, rows * length, False)
    quantised = case.policy_is(Sft, Adapter) and case.settings.sft.method == "qlora"
    held = {name: size for name, size in memory.weights(shape, True).items() if name != "experts"}  # experts: not twice
    loading = both(held, whole) if quantised else whole
    return {"loading": loading, "scoring": whole | scored}


def _windows(section: Lengths, case: Case) -> tuple[int, int]:
    """(windows, tokens of each) of the largest forward pass, over windows of one document. The built-in world's
    documents
    are as long as their window, packed ones as the longest window; the length of others is unknown."""
    longest = max(section.tokens)
    if case.settings.prepare.long and not section.packing:
        return section.batch_size, longest
    windows = [(1, longest)]
    for length in section.tokens if section.packing else []:
        more = -(-(longest - length) // max(1, int(length * section.stride)))
        windows.append((min(section.batch_size, 1 + more), length))
    return max(windows, key=lambda window: window[0] * window[1])


def both(one: Terms, other: Terms) -> Terms:
    """The sum of two sets of terms, term by term."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in one | other}

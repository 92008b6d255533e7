"""The memory of each stage in its phases: loading, training, answering, scoring; the largest one is the peak.

posttrain plan EXPERIMENT/STAGE
"""

import os
from functools import singledispatch
from typing import Any

from posttrain.config.sections import (
    LARGEST_BATCH,
    Adapter,
    Base,
    Compare,
    Dpo,
    Evaluate,
    Kto,
    Lengths,
    Longctx,
    Measured,
    Pairs,
    Ppo,
    Reference,
    Reward,
    Sampled,
    Section,
    Sft,
    step_of,
)
from posttrain.config.stages import STAGES
from posttrain.data.preferences import ANSWERS
from posttrain.resources import memory
from posttrain.resources.case import Case
from posttrain.resources.memory import FULL, MB, Terms
from posttrain.resources.steps import Batch, learned, micro

# Measured resident memory in MB of Python and the libraries that a stage imports (docs/plan.md). The first entry is for
# stages that were not measured.
LIBRARIES = {Section: 640, Base: 605, Sft: 640, Reward: 625, Dpo: 640, Longctx: 610, Sampled: 500, Reference: 530,
             Compare: 490, Lengths: 490, Evaluate: 605}  # fmt: skip
COPY = 425  # MB of a process that copies a base
CUDA = 3000  # MB of host memory for CUDA's libraries and its context
SMOOTHED = 6  # copies of the logits with label smoothing, measured
HEAP = {"adapter": 1.5, "whole": 0.5}  # freed blocks that glibc keeps, as a multiple of the activations
Moments = dict[str, Terms]  # moment -> term -> bytes on the device


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
    glibc keeps freed blocks (HEAP). A resumed run reads the optimiser's state into host memory before the GPU's, and a
    paged state stays there where the GPU's memory runs out.
    """
    if not terms:  # a base that is copied
        return COPY * MB
    shape = case.shape
    libraries = next(LIBRARIES[kind] for kind in type(case.section).__mro__ if kind in LIBRARIES) * MB
    if case.gpu:
        state = case.optimiser + case.paged if trained else 0
        return libraries + CUDA * MB + max(case.stored * shape.parameters, state)
    mapped = case.stored * memory.linear(shape) if "quantisation constants" in terms else 0
    kind = "whole" if trained >= shape.parameters else "adapter"
    heap = HEAP[kind] if trained and "MALLOC_MMAP_THRESHOLD_" not in os.environ else 0
    return libraries + sum(terms.values()) + mapped + heap * terms.get("activations", 0)


@singledispatch
def _moments(section: Section, case: Case) -> Moments:
    """The moments by the class of the stage's section; for a class without a function, the weights only."""
    return {"loading": case.frozen(False)}


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
    if section.label_smoothing:
        loss = case.logits(batch, SMOOTHED)
    held = case.step(section, batch, quantised, loss)
    whole = memory.weights(case.shape, False)
    frozen = whole if section.method == "full" else case.frozen(quantised, section.double_quantization)
    return {"training": frozen | held}


@_moments.register(Adapter)
def _aligned(section: Any, case: Case) -> Moments:
    """A trainer of TRL on an adapter or a whole model. A pair counts as two rows. A policy has logits, a reward model
    has none."""
    length = min(case.longest.get(section.task, section.max_length), section.max_length)
    batch = Batch((2 if isinstance(section, Pairs) else 1) * micro(section), length, padded=True)
    has_logits = STAGES[case.stage].makes == "policy"
    loss = memory.tiled_logits(case.shape, batch.rows, length, case.gpu) if has_logits else {}
    held, quantised = case.foundation(section), case.on_quantised(section)
    if isinstance(section, Kto) and section.method == "full" and section.loss == "kto":  # the reference
        held = both(held, held)
    return {"training": held | case.step(section, batch, quantised, loss)}


@_moments.register(Sampled)
def _sampled(section: Any, case: Case) -> Moments:
    """Adapters: policy, in PPO a value function, reference and reward model; the last two are assumed to be as large as
    the policy's. Whole models: policy, value function and reference, all in float32. A reward model may have weights of
    its own."""
    shape, half = case.shape, case.half(section)
    numbers = learned(case.settings, shape, case.stage).numbers
    length = _answer_length(case, section.prompts, section.max_new_tokens)
    rows = min(micro(section), -(-section.batch_size // section.minibatches))
    loss = memory.logits(shape, rows, section.max_new_tokens, 5)
    trained = case.step(section, Batch(rows, length, padded=True), case.on_quantised(section), loss)
    at_once = min(section.batch_size, section.answer_batch_size or section.batch_size)
    answered = memory.key_values(shape, at_once, length, half) | memory.logits(shape, at_once, 1, 5)
    answered |= memory.passing(shape, at_once * length, half)
    answered |= {"optimiser": case.optimiser}
    learners = 2 if isinstance(section, Ppo) else 1
    held, adapters = case.foundation(section), {"adapters": (learners + 2) * FULL * numbers // learners}
    if section.method == "full":
        held, adapters = {name: (learners + 1) * size for name, size in held.items()}, {}
    held = both(held, case.reward_beside(section))
    return {"training": held | trained | adapters, "answering": held | answered | adapters}


def _answer_length(case: Case, prompts: str, new_tokens: int) -> int:
    """Most tokens of a prompt with its answer; a prompt is assumed to be as long as the longest row of its kind, or as
    `prepare.max_prompt_tokens` lets it be."""
    prepare = case.settings.prepare
    row = case.longest.get(prompts, prepare.max_tokens)
    length = min(row, prepare.max_prompt_tokens or row) + new_tokens
    return length if case.shape.family == "bloom" else min(length, case.shape.context)


@_moments.register
def _longctx(section: Longctx, case: Case) -> Moments:
    """A policy's adapter and a tuned one are merged in float32, and the result is rounded to the base's type."""
    shape, quantised = case.shape, section.tuning == "qlora"
    whole = memory.weights(shape, False)
    held = whole if section.tuning == "full" else case.frozen(quantised)
    merged = case._replace(policy=section.policy).policy_is_adapter
    batch = Batch(micro(section), round(shape.context * section.factor), padded=False)
    loss = case.logits(batch, 3)
    by_moment = {"loading": both(held, whole if merged else case.frozen(False))}
    if section.tuning == "none":
        half = case.half(section)
        return by_moment | {"scoring": held | loss | memory.passing(shape, batch.rows * batch.length, half)}
    by_moment["training"] = held | case.step(section, batch, quantised, loss)
    if section.tuning != "full":
        adapters = {"adapters": FULL * learned(case.settings, shape, case.stage).numbers}
        by_moment["merging"] = both(memory.weights(shape, quantised), whole) | adapters
    return by_moment


@_moments.register
def _reference(section: Reference, case: Case) -> Moments:
    prepared = max((case.longest[task] for task in ANSWERS if task in case.longest), default=0)
    length = prepared or case.settings.prepare.max_tokens
    logits = memory.logits(case.shape, section.batch_size, length, 3)
    passing = memory.passing(case.shape, section.batch_size * length, case.half(section))
    return {"scoring": case.foundation(section) | logits | passing}


@_moments.register
def _compare(section: Compare, case: Case) -> Moments:
    """The measuring model, the policy, which is a whole model or an adapter on these frozen weights or on others, and a
    reward model with weights of its own."""
    shape, rows, half = case.shape, section.batch_size, case.half()
    held = both(case.foundation(section), case.reward_beside(section))
    sft = case.settings.sft
    measuring = (sft.quantization or "nf4") if sft.method == "qlora" else ""
    under = case.policy_is(Base) and section.four_bits == measuring  # the measuring model's weights
    judged = getattr(case.settings, case.policy)
    if case.policy_is(Adapter) and judged.method != "full":
        under = case.on_quantised(judged) == case.on_quantised(section)
        held = held if under else both(held, case.foundation(judged))
    elif not (case.policy_is(Sft) or under):
        held = both(held, case.frozen(bool(section.quantize)))
    length = _answer_length(case, "preference", section.max_new_tokens)
    part = -(-rows // 4)  # `compare.PARTS`
    answered = memory.key_values(shape, rows, length, half) | memory.logits(shape, rows, 1, 5)
    scored = memory.logits(shape, part, section.max_new_tokens, 4) | memory.passing(shape, part * length, half)
    return {"answering": held | answered | memory.passing(shape, rows * length, half), "scoring": held | scored}


@_moments.register
def _evaluate(section: Evaluate, case: Case) -> Moments:
    stretched = case.settings.longctx.factor if case.policy_is(Longctx) else 1
    rows = LARGEST_BATCH if section.batch_size == "auto" else section.batch_size
    rows *= max((task.generation.num_beams or 1 for task in section.tasks or [] if task.generation), default=1)
    return _judged(section, case, rows, section.max_length or round(case.shape.context * stretched), 2)


@_moments.register
def _lengths(section: Lengths, case: Case) -> Moments:
    moments = _judged(section, case, *_windows(section, case), 3)
    if section.passkey:  # one question at a time
        moments["scoring"] = moments["scoring"] | memory.key_values(case.shape, 1, max(section.tokens), case.half())
    return moments


def _judged(section: Measured, case: Case, rows: int, length: int, copies: int) -> Moments:
    """Scoring by a whole model, or by an adapter on frozen weights. Merging is in float32: while weights are
    dequantised for it, the quantised and the whole ones are in memory."""
    shape, sft = case.shape, case.settings.sft
    scored = memory.logits(shape, rows, length, copies) | memory.passing(shape, rows * length, case.half())
    if not case.policy_is_adapter:
        held = case.frozen(bool(section.quantize))
        return {"scoring": held | scored | _dequantised(case, held)}
    quantised = case.on_quantised(getattr(case.settings, case.policy))
    mergeable = sft.method not in ("prefix", "prompt")
    if mergeable and (case.size == FULL if section.merge is None else section.merge):
        whole = memory.weights(shape, False)
        held = {name: size for name, size in memory.weights(shape, True).items() if name != "experts"}  # not twice
        return {"loading": both(held, whole) if quantised else whole, "scoring": case.frozen(False) | scored}
    held = case.frozen(quantised, sft.double_quantization)
    adapters = {"adapters": FULL * learned(case.settings, shape, case.policy).numbers}
    return {"scoring": held | adapters | scored | _dequantised(case, held)}


def _dequantised(case: Case, held: Terms) -> Terms:
    """The matrix that is dequantised in a forward pass on weights in NF4; nothing on others."""
    quantised = "quantisation constants" in held
    return {"work space": memory.dequantised(case.shape, case.size)} if quantised else {}


def _windows(section: Lengths, case: Case) -> tuple[int, int]:
    """(windows, tokens of each) of the largest forward pass, over windows of one document. The built-in world's
    documents
    are as long as their window, packed ones as the longest window; the length of others is unknown."""
    longest = max(section.tokens)
    if case.settings.prepare.long and not section.packing:
        return section.batch_size, longest
    windows = [(1, longest)]
    for length in section.tokens if section.packing else []:
        more = -(-(longest - length) // step_of(section, length))
        windows.append((min(section.batch_size, 1 + more), length))
    return max(windows, key=lambda window: window[0] * window[1])


def both(one: Terms, other: Terms) -> Terms:
    """The sum of two sets of terms, term by term."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in one | other}

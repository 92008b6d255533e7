"""What each stage holds at its peak, moment by moment: loading, training, answering, scoring; the largest counts.

posttrain plan EXPERIMENT/STAGE
"""

import os

from posttrain.config.experiment import Experiment
from posttrain.resources import memory
from posttrain.resources.architecture import Architecture
from posttrain.resources.memory import FULL, MB, Terms
from posttrain.resources.steps import Batch, learned, micro, step

# Resident memory in MB of Python and the libraries that a stage imports, measured (docs/plan.md).
LIBRARIES = {"base": 605, "sft": 640, "reward": 625, "dpo": 640, "longctx": 610, "ppo": 500, "reference": 530,
             "compare": 490, "lengths": 490, "evaluate": 605}  # fmt: skip
GIVEN = 425  # MB of a base that is copied
CUDA = 3000  # MB of the host's that CUDA's libraries and its context take
HEAP = {"adapter": 1.5, "whole": 0.5}  # of the activations: freed blocks that glibc keeps between those in use


def moments(
    settings: Experiment, shape: Architecture, stage: str, policy: str, rows: dict[str, int], gpu: bool
) -> dict[str, Terms]:
    """Moment -> term -> bytes on the device. rows: longest row in tokens of each kind, where it is known."""
    if stage == "base":
        return _base(settings, shape)
    if stage == "sft":
        return _sft(settings, shape, rows, gpu)
    if stage in ("reward", "dpo"):
        return _pairs(settings, shape, stage, rows, gpu)
    if stage == "ppo":
        return _ppo(settings, shape, rows)
    if stage == "longctx":
        return _longctx(settings, shape)
    if stage in ("reference", "compare"):
        return _compared(settings, shape, stage, policy, rows)
    return _judged(settings, shape, stage, policy)


def peak(found: dict[str, Terms]) -> tuple[str, Terms]:
    """The moment that needs most, and its terms."""
    moment = max(found, key=lambda name: sum(found[name].values()))
    return moment, found[moment]


def host(shape: Architecture, stage: str, terms: Terms, trained: int, gpu: bool) -> float:
    """Bytes of the process: the libraries, and on a CPU all that a GPU would hold; on a GPU the weights on their way.

    Of quantised weights the file stays mapped, since embeddings are read from it. Unless MALLOC_MMAP_THRESHOLD_ is set,
    glibc keeps freed blocks between those in use, as many times the activations. A run that is continued reads the
    optimiser's two moments into the process before they go to the GPU.
    """
    if not terms:  # a base that is copied
        return GIVEN * MB
    libraries = LIBRARIES[stage] * MB
    if gpu:
        return libraries + CUDA * MB + max(FULL * shape.parameters, 2 * FULL * trained)
    mapped = FULL * memory.linear(shape) if "quantisation constants" in terms else 0
    kind = "whole" if trained >= shape.parameters else "adapter"
    heap = HEAP[kind] if trained and "MALLOC_MMAP_THRESHOLD_" not in os.environ else 0
    return libraries + sum(terms.values()) + mapped + heap * terms.get("activations", 0)


def _base(settings: Experiment, shape: Architecture) -> dict[str, Terms]:
    section = settings.base.scratch
    if section is None:
        return {"copying": {}}
    batch = Batch(micro(section), section.context, padded=False)
    made = step(shape, section, batch, learned(settings, shape, "base"), False, _logits(shape, batch, 3))
    return {"training": memory.weights(shape, False) | made}


def _logits(shape: Architecture, batch: Batch, copies: int) -> Terms:
    return memory.logits(shape, batch.rows, batch.length, copies)


def _sft(settings: Experiment, shape: Architecture, known: dict[str, int], gpu: bool) -> dict[str, Terms]:
    section = settings.sft
    length = section.max_length if section.packing else min(known.get("sft", section.max_length), section.max_length)
    virtual = section.virtual_tokens if section.method == "prompt" else 0
    batch = Batch(1 if section.packing else micro(section), length + virtual, not section.packing)
    if section.packing:  # one flat row of all that a pass holds
        batch = batch._replace(length=micro(section) * length)
    loss, quantised = memory.tiled_logits(shape, batch.rows, batch.length, gpu), section.method == "qlora"
    made = step(shape, section, batch, learned(settings, shape, "sft"), quantised, loss)
    return {"training": memory.weights(shape, quantised, section.double_quantization) | made}


def _foundation(settings: Experiment, shape: Architecture) -> Terms:
    """The frozen weights that alignment rests on: float32 after LoRA, else NF4 (`adapters.foundation`)."""
    return memory.weights(shape, settings.sft.method != "lora", settings.sft.double_quantization)


def _pairs(settings: Experiment, shape: Architecture, stage: str, known: dict, gpu: bool) -> dict[str, Terms]:
    section = getattr(settings, stage)
    length = min(known.get("preference", section.max_length), section.max_length)
    batch = Batch(2 * micro(section), length, padded=True)
    loss = memory.tiled_logits(shape, batch.rows, length, gpu) if stage == "dpo" else {}
    quantised = settings.sft.method != "lora"
    made = step(shape, section, batch, learned(settings, shape, stage), quantised, loss)
    return {"training": _foundation(settings, shape) | made}


def _ppo(settings: Experiment, shape: Architecture, known: dict[str, int]) -> dict[str, Terms]:
    """Adapters: policy and value function; reference and reward model are taken to be as large."""
    section, what = settings.ppo, learned(settings, shape, "ppo")
    quantised, half = settings.sft.method != "lora", section.precision == "bfloat16"
    held, length = _foundation(settings, shape), _answered(settings, shape, section, known)
    rows = min(micro(section), -(-section.batch_size // section.minibatches))
    loss = memory.logits(shape, rows, section.max_new_tokens, 5)
    made = step(shape, section, Batch(rows, length, padded=True), what, quantised, loss)
    said = memory.key_values(shape, section.batch_size, length, half) | memory.logits(shape, section.batch_size, 1, 3)
    said |= memory.passing(shape, section.batch_size * length, half)
    said |= {"optimiser": memory.learning(what.numbers)["optimiser"]}
    adapters = {"adapters": 2 * FULL * what.numbers}
    return {"training": held | made | adapters, "answering": held | said | adapters}


def _answered(settings: Experiment, shape: Architecture, section, known: dict[str, int]) -> int:
    """Tokens of a prompt with its answer, at most: a prompt is taken to be as long as the longest row."""
    kind = section.prompts if settings.ppo is section else "preference"
    length = known.get(kind, settings.prepare.max_tokens) + section.max_new_tokens
    return length if shape.family == "bloom" else min(length, shape.context)


def _longctx(settings: Experiment, shape: Architecture) -> dict[str, Terms]:
    section = settings.longctx
    quantised, what = section.tuning == "qlora", learned(settings, shape, "longctx")
    held, whole = memory.weights(shape, quantised), memory.weights(shape, False)
    batch = Batch(micro(section), round(shape.context * section.factor), padded=False)
    loss = _logits(shape, batch, 3)
    found = {"loading": both(held, whole)}
    if section.tuning == "none":
        half = section.precision == "bfloat16"
        return found | {"scoring": held | loss | memory.passing(shape, batch.rows * batch.length, half)}
    found["training"] = held | step(shape, section, batch, what, quantised, loss)
    if section.tuning != "full":
        found["merging"] = both(held, whole) | {"adapters": FULL * what.numbers}
    return found


def _compared(settings: Experiment, shape: Architecture, stage: str, policy: str, known: dict) -> dict[str, Terms]:
    section, held = getattr(settings, stage), _foundation(settings, shape)
    rows = section.batch_size
    if stage == "reference":
        length, half = known.get("preference", settings.prepare.max_tokens), section.precision == "bfloat16"
        made = memory.logits(shape, rows, length, 3) | memory.passing(shape, rows * length, half)
        return {"scoring": held | made}
    held = both(held, memory.weights(shape, False)) if policy in ("base", "longctx") else held
    length, part = _answered(settings, shape, section, known), -(-rows // 4)  # `compare.PARTS`
    said = memory.key_values(shape, rows, length, False) | memory.logits(shape, rows, 1, 3)
    read = memory.logits(shape, part, section.max_new_tokens, 4) | memory.passing(shape, part * length, False)
    return {"answering": held | said | memory.passing(shape, rows * length, False), "scoring": held | read}


def _judged(settings: Experiment, shape: Architecture, stage: str, policy: str) -> dict[str, Terms]:
    """Dequantising holds the quantised and the whole weights at once."""
    section, whole = getattr(settings, stage), memory.weights(shape, False)
    context = shape.context * (settings.longctx.factor if policy == "longctx" else 1)
    rows, length = section.batch_size, getattr(section, "max_length", None) or round(context)
    if stage == "lengths":
        rows, length = _windows(settings)
    made = memory.logits(shape, rows, length, 3 if stage == "lengths" else 2)
    made |= memory.passing(shape, rows * length, False)
    quantised = policy in ("sft", "ppo", "dpo") and settings.sft.method == "qlora"
    loading = both(memory.weights(shape, True), whole) if quantised else whole
    return {"loading": loading, "scoring": whole | made}


def _windows(settings: Experiment) -> tuple[int, int]:
    """(windows, tokens of each) of the forward pass of `lengths` that holds most: windows of one document. The built-in
    world's are as long as their window, packed ones as the longest; of others the length is not known."""
    section, longest = settings.lengths, max(settings.lengths.tokens)
    if settings.prepare.long and not section.packing:
        return section.batch_size, longest
    found = [(1, longest)]
    for length in section.tokens if section.packing else []:
        more = -(-(longest - length) // max(1, int(length * section.stride)))
        found.append((min(section.batch_size, 1 + more), length))
    return max(found, key=lambda windows: windows[0] * windows[1])


def both(one: Terms, other: Terms) -> Terms:
    """Term by term, the sum of what is held at once."""
    return {
        name: one.get(name, 0) + other.get(name, 0) for name in [*one, *(name for name in other if name not in one)]
    }

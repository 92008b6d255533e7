"""The terms of a stage's memory, in bytes; docs/plan.md has their measured error.

Weights are float32, of the base's type where they are frozen, or NF4 (`policy.load_model`). Sources: AdamW's two
moments, Loshchilov and Hutter, arXiv 1711.05101; NF4 and its constants, Dettmers et al., arXiv 2305.14314, section 3;
activations kept for the backward pass, Korthikanti et al., arXiv 2205.05198, section 4, recounted for this code.
"""

from posttrain.resources.architecture import UNFUSED, Architecture

MB = 1e6
FULL, HALF = 4, 2  # bytes of a float32 and of a bfloat16
TILE = 4096, 32768  # tokens and vocabulary in one tile of TRL's fused output embedding
Terms = dict[str, float]


def weights(shape: Architecture, quantised: bool, double: bool = True, size: int = FULL) -> Terms:
    """`size` bytes per parameter. NF4: half a byte per parameter in the layers' matrices, and a constant for each 64 of
    them of 4 bytes, or (double) of 1 byte, with 4 bytes for each 256 constants. Embeddings, norms and biases keep their
    size, and the experts of a mixture."""
    inside = linear(shape)
    if not quantised:
        return {"weights": size * shape.parameters}
    blocks = inside / 64
    constants = blocks + FULL * blocks / 256 if double else FULL * blocks
    experts = {"experts": size * shape.layers * shape.experts} if shape.experts else {}
    dense = shape.parameters - inside - shape.layers * shape.experts
    return {"weights": size * dense + inside / 2, **experts, "quantisation constants": constants}


def linear(shape: Architecture) -> int:
    """Parameters in the matrices of all layers."""
    return shape.layers * sum(out * into for out, into in shape.linear.values())


def targets(shape: Architecture, modules: list[str] | str | None) -> list[str]:
    """The matrices of a layer that get an adapter."""
    last = [name.rpartition(".")[2] for name in modules] if isinstance(modules, list) else list(shape.linear)
    return [name for name in shape.linear if name in last]


def lora(shape: Architecture, rank: int, modules: list[str] | str | None) -> int:
    """Parameters of a LoRA: rank x (out + in) for each adapted matrix (Hu et al., arXiv 2106.09685, section 4.1)."""
    return shape.layers * sum(rank * sum(shape.linear[name]) for name in targets(shape, modules))


def activations(
    shape: Architecture,
    rows: int,
    length: int,
    kept: list[str],
    norms: bool,
    half: bool,
    recomputed: bool,
    rank: int = 0,
    cast: bool = False,
) -> Terms:
    """Activations that the forward pass keeps for the backward pass, of rows x length tokens.

    kept: matrices that are trained or have an adapter of `rank`, whose input is kept. norms: whether norms are trained.
    half: bfloat16, by autocast or of frozen weights. recomputed: gradient checkpointing, which keeps the input of each
    layer and recomputes one layer's activations at a time. cast: whether each adapter keeps a float32 copy of its
    input, as on frozen weights in bfloat16 without autocast.
    """
    inputs = sum(shape.linear[name][1] for name in kept) * FULL if cast else 0
    tokens, one = rows * length, layer(shape, length, [] if cast else kept, norms, half) + inputs
    one += rank * len(kept) * (HALF if half and not cast else FULL)
    if recomputed:
        return {"activations": tokens * (FULL * shape.hidden * shape.layers + one)}
    return {"activations": tokens * one * shape.layers}


def dora(shape: Architecture, tokens: int, kept: list[str], recomputed: bool) -> Terms:
    """What DoRA adds (PEFT 0.21): of each adapted matrix its output and BA's are kept for the gradient of the rows'
    lengths; at once, the matrix, BA and their sum in float32, and the identity of which BA is computed."""
    outputs = 2 * FULL * tokens * sum(shape.linear[name][0] for name in kept)
    whole = max((3 * out * into + into * into for out, into in (shape.linear[name] for name in kept)), default=0)
    return {"activations": outputs * (1 if recomputed else shape.layers), "DoRA's products": FULL * whole}


def layer(shape: Architecture, length: int, kept: list[str], norms: bool, half: bool) -> float:
    """Bytes that one layer keeps for each token. H: hidden size, I: intermediate size.

    Always in float32: the residual before each norm (2 H) and, where norms are trained, the normalised values (2 H).
    Attention: queries, keys, values and output and, without a fused kernel, the probabilities (heads x length).
    Norms' outputs that feed a kept matrix (H each; under autocast a copy for each such matrix). Feed-forward part:
    gate, its SiLU and up (3 I; 1 I without a gate), and their product (I) where the last matrix is kept.
    """
    h, size = shape.hidden, HALF if half else FULL
    names = list(shape.linear)
    last, output = names[-1], "dense" if shape.family == "bloom" else "o_proj"
    after_norms = [name for name in names if name in kept and name not in (last, output)]
    fed = len(after_norms) if half else len({name in names[:3] for name in after_norms})
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head
    attention += shape.heads * length if shape.family in UNFUSED else 0
    inner = (3 if shape.gated else 1) * shape.intermediate + (shape.intermediate if last in kept else 0)
    return FULL * h * (4 if norms else 2) + size * (fed * h + attention + inner)


def padding_mask(shape: Architecture, rows: int, length: int, recomputed: bool) -> Terms:
    """The float32 attention mask of padded rows, length x length for each row, kept by each layer; by one layer with
    gradient checkpointing (recomputed)."""
    return {"masks": FULL * rows * length * length * (1 if recomputed else shape.layers)}


def workspace(shape: Architecture, tokens: int, quantised: bool, half: bool, size: int = FULL) -> Terms:
    """Temporary tensors: gradients of one layer's activations, and its largest matrix dequantised (`dequantised`)."""
    matrix = dequantised(shape, size) if quantised else 0
    return {"work space": tokens * (HALF if half else FULL) * 2 * shape.intermediate + matrix}


def dequantised(shape: Architecture, size: int) -> int:
    """A layer's largest matrix in numbers of `size` bytes."""
    return size * max(out * into for out, into in shape.linear.values())


def logits(shape: Architecture, rows: int, length: int, copies: int) -> Terms:
    """Logits, rows x length x vocabulary in float32. copies: number of such tensors that a loss holds at once."""
    return {"logits": FULL * rows * length * shape.vocab * copies}


def tiled_logits(shape: Architecture, rows: int, length: int, gpu: bool) -> Terms:
    """Logits of TRL's fused output embedding: one tile; on a CPU, without Triton, its backward pass has seven more."""
    return {"logits": FULL * min(rows * length, TILE[0]) * min(shape.vocab, TILE[1]) * (1 if gpu else 8)}


def key_values(shape: Architecture, rows: int, length: int, half: bool) -> Terms:
    """Keys and values of every layer for each token, and of one layer twice while a token is added."""
    size = HALF if half else FULL
    return {"KV cache": 2 * size * rows * length * shape.kv_heads * shape.head * (shape.layers + 1)}


def half_copies(shape: Architecture, quantised: bool, half: bool) -> Terms:
    """The bfloat16 copy of each float32 matrix that autocast keeps until the backward pass."""
    matrices = (0 if quantised else linear(shape)) + shape.vocab * shape.hidden
    return {"bfloat16 copies of weights": HALF * matrices} if half else {}


def passing(shape: Architecture, tokens: int, half: bool) -> Terms:
    """Activations of a forward pass without a backward pass: one layer's residual, norm and feed-forward part."""
    size = HALF if half else FULL
    return {"activations": tokens * (2 * FULL * shape.hidden + 3 * size * shape.intermediate)}

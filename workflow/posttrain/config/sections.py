"""Every setting: its type, bounds, default and meaning; the only schema. `posttrain schema` writes its documentation.

A section holds the settings of one stage. A stage reads its own section only, so a changed key reruns the stage of its
section and what depends on it. `resolve` fills in the defaults that follow from another section.
"""

import functools
import re
import types
import typing
from collections.abc import Iterator
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

NAME = r"[a-z0-9][a-z0-9_-]{0,62}"  # safe as a folder of results/, a job name and a tracker id
WORD = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
PATTERNS = {  # of texts: pattern -> what it allows
    rf"^{NAME}$": "a name of lower-case letters, digits, - and _ (at most 63)",
    r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$": "a name on the hub, organisation/name",
    rf"^{WORD}(/{WORD})*$": "a commit of 40 digits, or a branch or tag",
    r"^[^\x00]*$": "text without a zero byte",
    r"^https?://[A-Za-z0-9.\[\]:-]+(/[A-Za-z0-9._~-]+)*$": "an address http(s)://HOST/PATH without user or query",
    r"^[A-Z][A-Z0-9_]*_(API_KEY|TOKEN|SECRET)$": "an environment variable that ends with _API_KEY, _TOKEN or _SECRET",
    r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])$": "a date, as 2024-07-26",
    r"^(paper|authors-later|[\w.-]+/[\w.-]+@[0-9a-f]{7,40})$": "paper, authors-later, or owner/repository@commit",
}
_NAME, _HUB_ID, _REVISION, _TEXT, _URL, _VARIABLE, _DATE, _VARIANT = PATTERNS
LARGEST = 10**9  # of numbers: no setting needs a larger one, and sums of larger ones would overflow
Name = Annotated[str, Field(pattern=_NAME)]
HubId = Annotated[str, Field(pattern=_HUB_ID)]
Revision = Annotated[str, Field(pattern=_REVISION, max_length=100)]
Text = Annotated[str, Field(min_length=1, pattern=_TEXT)]
Day = Annotated[str, Field(pattern=_DATE)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
Weight = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Rate = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def is_name(text: str) -> bool:
    """Whether a text is a name of an experiment."""
    return bool(re.fullmatch(NAME, text))


def only_with(**keys: tuple[str | None, ...]) -> dict:
    """Mark a key as meaningful only while other keys of its section have one of the given values; None: are not set."""
    return {"only_with": {key: list(values) for key, values in keys.items()}}


def also(*stages: str) -> dict:
    """Mark a key as one that also sets defaults of other stages, and therefore reruns them."""
    return {"also": list(stages)}


def refused(reasons: dict[str, str]) -> dict:
    """Mark values that a key may not have: beginning of the value -> the reason, which `check` tells."""
    return {"refused": reasons}


class Section(BaseModel):
    """Settings are immutable, unknown keys are errors, and no value is silently converted."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def replaced(self, **values):
        """The section with other values."""
        return self.model_copy(update=values)


@functools.cache
def conditional(model: type[Section]) -> dict[str, dict[str, list]]:
    """Key -> other key -> the other key's values with which the first has an effect. Keys that always have one lack."""
    conditions = {key: declared(field).get("only_with") for key, field in model.model_fields.items()}
    return {key: condition for key, condition in conditions.items() if condition}


def declared(field: FieldInfo) -> dict[str, Any]:
    """The marks of a key: `only_with`, `also`, `refused`."""
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {}


def section_class(annotation) -> type[Section] | None:
    """The class of the section, or of the list of sections, that a key holds; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, Annotated):
        return next(filter(None, map(section_class, typing.get_args(annotation))), None)
    return None


@functools.cache
def has_hub_items(model: type[Section]) -> bool:
    """Whether a section, or a section within it, can name something on the hub."""
    if issubclass(model, HubModel | Source | Task):
        return True
    inner = (section_class(field.annotation) for field in model.model_fields.values())
    return any(has_hub_items(part) for part in inner if part)


@functools.cache
def subsections(model: type[Section]) -> list[str]:
    """The keys of a section that hold sections, or lists of them."""
    return [key for key, field in model.model_fields.items() if section_class(field.annotation)]


def inapplicable(section: Section) -> Iterator[tuple[str, str]]:
    """Keys of a section that have no effect with its other settings, each with the reason."""
    for key, condition in conditional(section.__class__).items():
        for other, allowed in condition.items():
            value = getattr(section, other)
            if value not in allowed:
                way_out = f"leave one of the two out, or set {other}: null" if allowed == [None] else ""
                way_out = way_out or f"only with {' or '.join(filter(None, allowed))}"
                yield key, f"has no effect with {other}: {value} ({way_out})"


def slice_of(section: Section) -> dict:
    """A section as plain values, without unset keys and keys that have no effect."""
    without_effect = {key for key, _ in inapplicable(section)}
    values: dict[str, Any] = {}
    for key, value in sorted(section, key=itemgetter(0)):
        if key in without_effect:
            continue
        if isinstance(value, list):
            values[key] = [slice_of(item) if isinstance(item, Section) else item for item in value]
        elif value is not None:
            values[key] = slice_of(value) if isinstance(value, Section) else value
    return values


class Watched:
    """A section that adds each dotted key that is read from it to the set `read`."""

    def __init__(self, section: Section, read: set[str], prefix: str = ""):
        self.__dict__.update(_section=section, _read=read, _prefix=prefix)

    @property  # type: ignore[misc]  # so that `isinstance` sees the section
    def __class__(self):
        return type(self._section)

    def __getattr__(self, key: str):
        section, read, prefix = (self.__dict__[name] for name in ("_section", "_read", "_prefix"))
        if key not in type(section).model_fields:
            if key in ("model_dump", "model_copy"):  # taken as a whole
                read.update(f"{prefix}{name}" for name in type(section).model_fields)
            derived = getattr(type(section), key, None)
            return derived.__get__(self) if isinstance(derived, property) else getattr(section, key)
        read.add(f"{prefix}{key}")
        value = getattr(section, key)
        if isinstance(value, Section):
            return Watched(value, read, f"{prefix}{key}.")
        if isinstance(value, list) and value and isinstance(value[0], Section):
            return [Watched(item, read, f"{prefix}{key}[{number}].") for number, item in enumerate(value)]
        if isinstance(value, dict):
            read.update(f"{prefix}{key}.{name}" for name in value)
        return value

    def replaced(self, **values) -> "Watched":
        """The section with other values, whose keys are added to the same set when they are read."""
        section, read, prefix = (self.__dict__[name] for name in ("_section", "_read", "_prefix"))
        return Watched(section.model_copy(update=values), read, prefix)

    def __eq__(self, other):
        return self._section == getattr(other, "_section", other)

    def __hash__(self):
        return id(self)


def unread(slice: dict, read: set[str], prefix: str = "") -> list[str]:
    """The dotted keys of a section's slice that were not read; for an unread section within it, only its key. A key of
    a list's sections counts as read where one of them was asked for it."""
    keys, read = [], {re.sub(r"\[\d+\]", "", key) for key in read}
    for key, value in slice.items():
        if f"{prefix}{key}" not in read:
            keys.append(f"{prefix}{key}")
        elif isinstance(value, dict):
            keys += unread(value, read, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            keys += [name for item in value for name in unread(item, read, f"{prefix}{key}.")]
    return sorted(set(keys))


class HubModel(Section):
    """A model repository on the Hugging Face hub."""

    id: HubId
    """Repository, `organisation/name`."""
    revision: Revision
    """Full 40-digit commit; a branch or tag only with `allow_floating`."""
    allow_floating: bool = False
    """Accept a revision that can move; the manifest records its commit."""


class Source(Section):
    """Rows for one kind of training: local files or a data set on the hub."""

    path: Text | None = None
    """A file, a folder of files, or a pattern such as `shards/*.jsonl`, relative to the working directory. Files are
    `.jsonl`, `.json` (an array too), `.csv` or `.tsv` with a header line, also with `.gz` or `.zst`, or `.parquet`; for
    `text` and `long` also `.txt`. Several are read in the order of their names."""
    dataset: HubId | None = None
    """Data set on the hub, `organisation/name`; give `revision` too."""
    revision: Revision | None = None
    """Full 40-digit commit of `dataset`; a branch or tag only with `allow_floating`."""
    allow_floating: bool = False
    """Accept a data set revision that can move; the manifest records its commit."""
    subset: str | None = None
    """Configuration of `dataset`, where it has several."""
    rows: str = "train"
    """Split of `dataset` to read, or a slice of one, as `train[:1000]` or `train[10%:20%]`."""
    files: Annotated[list[Text], Field(min_length=1)] | None = None
    """Patterns of data files of `dataset`, as `data/train-*.parquet`, instead of `subset` and `rows`: these alone are
    fetched, and read as local files are."""
    format: Literal[
        "auto", "messages", "sharegpt", "prompt_completion", "instruction", "preference", "transcript", "kto", "text",
        "ranking", "score",
    ] = "auto"  # fmt: skip
    """Layout of a row; `auto` recognises it by its keys. `preference` in `sft` trains on the chosen answers, `text` on
    whole texts. `ranking`: `completions` with `scores`, `ranks` or the number of the `best` from 0; else the best comes
    first. `score`: a completion with its `score`, in rows sorted by prompt. Of both, all pairs of a prompt are made."""
    threshold: float | None = None
    """Score from which an answer is wanted, where `kto` reads rows with scores."""
    columns: Annotated[dict[str, Text | list[Text]], Field(min_length=1)] | None = None
    """Columns under other names, as `{prompt: question, completion: answers.text.0}`: key -> column, or a dotted path
    to a value within one; a list of these where the key holds a list, as `{completions: [answer_a, answer_b]}`."""
    template: Annotated[dict[str, Text], Field(min_length=1)] | None = None
    """Texts made of columns, as `{prompt: "Question: {question} Answer:", completion: " {answer}"}`: key -> text with
    columns in braces; `{{` and `}}` are braces. `prompt` and `completion` are plain text, `instruction` and `output`
    the turns of a conversation."""
    system: Text | None = None
    """System turn of every conversation that has none of its own."""
    weight: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Weight of the source among those of its kind, of which others have 1: its share of the rows that are trained on.
    The data card says how often each row is read. Default: without any weight, all rows equally often."""
    max_rows: Count | None = None
    """Most rows that are taken: the first that can be used, in the order of the files; nothing is read behind them."""
    sample: Literal["random"] | None = None
    """`random`: `max_rows` of all rows are taken, at random by `prepare.seed`, in the order of the files."""
    separator: str = ""
    """Text put between a plain-text prompt and its completion or answers (often one space)."""
    licence: Text | None = None
    """Licence of the rows, as their publisher names it, for the data card. Default: unknown."""
    origin: Text | None = None
    """Where the rows come from, for the data card. Default: the data set and its commit, else unknown."""
    languages: Annotated[list[Text], Field(min_length=1)] | None = None
    """Languages of the rows, for the data card. Default: unknown."""
    use: Literal["split", "train", "test"] = "split"
    """`split` divides the rows by `test_fraction` and drops held-out rows that occur in training rows. `train` and
    `test` put all rows on one side; a test row that occurs in training rows is then an error."""


class Long(Section):
    """Documents with long dependence, of chosen length: repeated motifs, pass words, diaries."""

    context: Annotated[int, Field(ge=32, le=LARGEST)] = 64
    """Longest document of the pretraining text, in words; should equal `base.scratch.context`."""
    factor: Annotated[int, Field(ge=2, le=LARGEST)] = 4
    """Documents for `longctx` are this many times as long; held-out ones are 1, 2, 4, ... times the context long."""
    documents: Count = 1600
    """Documents for `longctx`."""
    questions: Count = 200
    """Held-out questions of `passkey_N` and of `recall_N`, for each length of N tokens."""


class World(Section):
    """The built-in world: a small language with facts, exercises, manners and long texts, generated from a seed."""

    documents: Count = 9000
    """Documents of pretraining text."""
    questions: Count = 6000
    """Question and answer rows for supervised fine-tuning."""
    test_questions: Count = 720
    """Held-out questions; none occurs in any training text."""
    pairs: Count = 6000
    """Preference pairs."""
    long: Long | None = None
    """Generate documents with long dependence, for `longctx` and as pretraining text in place of the everyday ones."""


class Tokenizer(Section):
    """Where the tokenizer comes from: trained on the text, a local model directory, or a model on the hub."""

    vocab_size: Annotated[int, Field(ge=300, le=LARGEST)] | None = None
    """Train a byte-level BPE tokenizer of this many tokens on the pretraining text."""
    path: Text | None = None
    """Directory of a model whose tokenizer is used."""
    hub: HubModel | None = None
    """Model on the hub whose tokenizer is used."""


class Prepare(Section):
    """Read the data, check it line by line, split it, and count it in a data card."""

    seed: Seed = 0
    """Seed of the built-in world and of the split; the experiment's `seed` has no effect on them."""
    world: World | None = None
    """Generate the built-in world; its rows come before those of the sources below."""
    text: list[Source] = []
    """Plain documents, for training a base from scratch."""
    long: list[Source] = []
    """Long plain documents, for `longctx` and `lengths`."""
    sft: list[Source] = []
    """Conversations, prompts with completions, or instructions, for supervised fine-tuning."""
    preference: list[Source] = []
    """Prompts with a chosen and a rejected answer."""
    kto: list[Source] = []
    """Prompts with a completion and a label: `true` for a completion that is wanted, `false` for one that is not."""
    choices: list[Source] = []
    """Questions with several answers, of which one is right; they become the benchmark task `choices`."""
    answers: list[Source] = []
    """Questions with their answer as text, such as GSM8K's; they become the benchmark task `answers`. Of a greedy reply
    the last number, or the first line where answers are words, must be the answer, which is what follows `####`."""
    test_fraction: Fraction = 0.1
    """Share of each source's groups that is held out with `use: split`."""
    weigh_by: Literal["tokens"] | None = None
    """`tokens`: the weights of sources are shares of the tokens that are read. Default: of the rows."""
    group_key: Text = "group"
    """Key of a row that names its group; a group is never split. Rows without it are grouped by equal prompts."""
    tokenizer: Tokenizer | None = None
    """Default: the tokenizer of the base (`base.path`, `base.hub`), or one of 1024 tokens trained on the text."""
    chat_template: Text | None = None
    """A `.jinja` file, `default` (one token per role) or `tokenizer` (the tokenizer's own).
    Default: the tokenizer's own, else `default` where the training rows are conversations, else none."""
    end_of_turn: Text | None = None
    """Token with which the chat template ends a turn, such as `<end_of_turn>`; it then ends every text too. Default:
    the tokenizer's end-of-sequence token."""
    date: Day | None = None
    """Date, as 2024-07-26, that a chat template writes where it asks for today's. Default: 2024-07-26, which Llama 3's
    falls back to."""
    system_turns: Literal["user"] | None = None
    """`user`: put the text of a system turn at the beginning of the first user turn, for templates without a system
    role. Default: system turns stay."""
    conversations: Literal["split"] | None = None
    """`split`: make a row of each reply of an SFT conversation, with the turns before it, of which only that reply is
    trained; for templates that write earlier replies differently, such as without their thinking. Default: one row."""
    max_tokens: Annotated[int, Field(ge=8, le=LARGEST)] | None = None
    """Longest training row, in tokens, chat template included. Default: `base.scratch.context`, else 512."""
    max_prompt_tokens: Annotated[int, Field(ge=8, le=LARGEST)] | None = None
    """Longest prompt of a row of `sft`, `preference` or `kto`, in tokens: all that the chat template writes before the
    last reply that is trained (512 in DPO's and Zephyr's code and in TL;DR's, arXiv 2403.17031; `source_max_len` in
    QLoRA's). Default: no limit but `max_tokens`."""
    max_answer_tokens: Annotated[int, Field(ge=8, le=LARGEST)] | None = None
    """Longest answer of such a row, its end of turn included; of a pair, the longer one (`target_max_len` in QLoRA's
    code, 53 in TL;DR's, arXiv 2403.17031). Default: no limit but `max_tokens`."""
    long_rows: Literal["drop", "cut"] = "drop"
    """What happens to longer rows: `drop` them, or `cut` their longest text (prompts lose their beginning, replies
    their end) so that reply tokens remain. Preference pairs lose the beginning of a prompt over `max_prompt_tokens`
    alone; pairs that are longer otherwise are always dropped."""
    control_text: Literal["plain"] | None = None
    """`plain`: keep rows whose own text holds a control token of the tokenizer, such as `</s>`, and read it as plain
    text. Default: such rows are dropped, as it would end a turn or begin another. Documents of `text` are read as they
    are: they may be written in the form of a chat."""
    overlap: Literal["drop"] | None = None
    """`drop`: rows of `use: test` that are in the training rows too are dropped, counted and listed, as those that a
    split holds out are; for public data sets whose own test rows are partly in training. Default: they are an error."""
    max_line_mb: Annotated[float, Field(gt=0, le=4096)] = 16.0
    """Longest line of a file, in MiB; a longer line is an error."""
    allow_empty_user: bool = False
    """Keep rows in which a user says nothing."""


SOURCES = tuple(key for key, field in Prepare.model_fields.items() if section_class(field.annotation) is Source)
ASKED = ("choices", "answers")  # sources that become benchmarks
TRAINED = tuple(key for key in SOURCES if key not in ASKED)  # each has a training and a held-out side
DOCUMENTS = ("text", "long")  # kinds of data whose rows are one text
ANSWERED = tuple(key for key in TRAINED if key not in DOCUMENTS)  # kinds whose rows hold an answer to a prompt


Optimizer = Literal["adamw", "rmsprop", "adafactor", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"]
WITH_MOMENTS = ("adamw", None, "muon", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
MOMENTS = only_with(optimizer=WITH_MOMENTS)


class Optimisation(Section):
    """Settings of every training loop. The batch is global: micro-batches and accumulation follow from it."""

    optimizer: Optimizer | None = None
    """`rmsprop` (DPO, arXiv 2305.18290, appendix B; PyTorch's, which averages squares with 0.99); `adafactor` with
    `learning_rate` as its step (prompt tuning, arXiv 2104.08691, section 3.1); bitsandbytes' AdamW in 8 bits
    (`adamw_8bit`) or paged (QLoRA, arXiv 2305.14314, section 3): a GPU whose memory runs out hands a paged state to the
    host; on a CPU nothing is paged. `muon`, in `base.scratch` and in `longctx` with `tuning: full`: Muon for matrices,
    AdamW for the rest, at one learning rate. Default: `adamw`."""
    seed: Seed | None = None
    """Seed of initialisation, data order, dropout and sampling. Default: the experiment's `seed`."""
    learning_rate: Rate
    """Peak learning rate."""
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt"] = "cosine"
    """Learning-rate schedule after warm-up. `inverse_sqrt`: sqrt(warm-up / step) of the peak, as of the Transformer
    (arXiv 1706.03762, section 5.3)."""
    warmup_steps: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    """Steps over which the learning rate rises from 0. Default: a twentieth of `steps`."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, json_schema_extra=only_with(warmup_steps=(None,))
    )
    """Warm-up as a share of `steps`, rounded up to a step (0.1 in Zephyr, arXiv 2310.16944), in place of
    `warmup_steps`."""
    warmup_start_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the peak learning rate at which warm-up starts (0.1 in position interpolation, arXiv 2306.15595, section
    3.1). Default: it starts at 0."""
    min_lr_ratio: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, json_schema_extra=only_with(schedule=("linear", "cosine"))
    )
    """Share of the peak learning rate at which `linear` and `cosine` end (0.1 in Llama 2, arXiv 2307.09288, section
    2.2). Default: they end at 0."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, json_schema_extra=only_with(optimizer=(*WITH_MOMENTS, "adafactor"))
    )
    """Decoupled weight decay; with `optimizer: muon`, of the matrices only."""
    beta1: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, json_schema_extra=MOMENTS)
    """AdamW's decay of the gradient's average (Kingma and Ba, arXiv 1412.6980, algorithm 1). Default: 0.9."""
    epsilon: Annotated[float, Field(gt=0, le=1)] | None = Field(None, json_schema_extra=MOMENTS)
    """AdamW's addend of the denominator (ibid.; 1e-5 in Llama 2, section 2.2). Default: 1e-8."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = Field(0.999, json_schema_extra=MOMENTS)
    """AdamW's decay of the squared gradient's average."""
    max_grad_norm: Positive = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it."""
    steps: Count
    """Optimiser steps."""
    batch_size: Count
    """Sequences in one optimiser step, over all devices."""
    micro_batch_size: Count | None = None
    """Most sequences in one forward pass on one device. A smaller number saves memory and does not change what is
    learned. Default: the whole batch."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward and backward pass (bfloat16 by autocast). Frozen weights compute in their own type."""
    checkpoint_minutes: Positive = 10.0
    """Minutes between checkpoints, from which an interrupted run continues; does not change what is learned."""
    checkpoint_steps: Count | None = None
    """Steps between further checkpoints. Default: by the clock only."""


EXECUTION = {"micro_batch_size", "checkpoint_minutes", "checkpoint_steps"}  # keys that do not change what is learned


class Training(Optimisation):
    """Settings of the trainers of transformers and TRL."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    log_steps: Count = 20
    """Steps whose mean is one point of the training curve."""
    eval_steps: Count | None = None
    """Steps between measurements of the held-out loss. Default: before the first and after the last step only."""
    order: Literal["file"] | None = None
    """`file`: every pass through the rows is in the order in which `prepare` wrote them. Default: in a random order of
    its own, by `seed`."""


class Passes(Training):
    """Training on rows, for a number of steps or of passes through all of them."""

    epochs: Annotated[float, Field(gt=0, le=10000)] | None = None
    """Passes through the training rows, in place of `steps`: so many rows are read, rounded up to a whole batch. The
    rows are those that `prepare` left; of ranked lists the prompts, of `kto` with `rows: preference` both answers."""


class Scratch(Training):
    """A model trained from scratch on the prepared text."""

    positions: Literal["rope", "alibi"] = "rope"
    """`rope`: Llama (RoFormer, arXiv 2104.09864). `alibi`: BLOOM (Press et al., arXiv 2108.12409)."""
    hidden_size: Annotated[int, Field(ge=64, le=LARGEST, multiple_of=64)] = 128
    """Width; a multiple of 64 for 4-bit blocks."""
    layers: Count = 4
    """Transformer blocks."""
    heads: Count = 4
    """Attention heads; must divide `hidden_size`."""
    intermediate_size: Annotated[int, Field(ge=64, le=LARGEST, multiple_of=64)] = Field(
        384, json_schema_extra=only_with(positions=("rope",))
    )
    """Width of the feed-forward layer (BLOOM fixes it at four times `hidden_size`)."""
    rope_theta: Annotated[float, Field(gt=1, le=LARGEST)] = Field(
        10000.0, json_schema_extra=only_with(positions=("rope",))
    )
    """Base of RoPE's frequencies."""
    context: Annotated[int, Field(ge=16, le=LARGEST)] = Field(128, json_schema_extra=also("prepare"))
    """Length of a training sequence, in tokens."""
    locality: Annotated[float, Field(ge=0, le=4)] = Field(0.0, json_schema_extra=only_with(positions=("rope",)))
    """Strength with which half of the heads of the first two layers attend to the previous token at initialisation; a
    small model then learns in half the steps. 0: an ordinary initialisation, without biases on queries and keys."""
    optimizer: Optimizer = "adamw"
    """`muon`: Muon for matrices, AdamW for the rest, at one learning rate. Others: as of `sft`."""
    learned: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Largest held-out perplexity of the base, as a share of a unigram model's; over it, the stage fails."""
    learning_rate: Rate = 3e-3
    """Peak learning rate."""
    steps: Count = 1000
    """Optimiser steps."""
    batch_size: Count = 16
    """Sequences of `context` tokens in one optimiser step, over all devices."""


class Base(Section):
    """The untouched model: exactly one of `path`, `hub` and `scratch`."""

    path: Text | None = Field(None, json_schema_extra=also("prepare"))
    """Directory of a model in the transformers format (safetensors only)."""
    hub: HubModel | None = Field(None, json_schema_extra=also("prepare"))
    """Model on the hub at a pinned commit."""
    scratch: Scratch | None = None
    """Train a model from scratch."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of frozen weights in every later stage, in which whole models are written too; what is trained is float32.
    Default: `bfloat16` where the `config.json` of a given model names a type of 16 bits, else `float32`."""


BY_STEPS = only_with(epochs=(None,))
ADAPTERS = only_with(method=("lora", "qlora"))
ALIGNING = only_with(method=(None, "lora", "qlora"))
VIRTUAL = only_with(method=("prefix", "prompt"))
REWRITES = "it rewrites the base's weights, and later stages start from the base as it is"
FITTED = "it is fitted to the training data before the first step, which is not built"
INITIALIZATIONS = refused(dict.fromkeys(("pissa", "olora", "corda", "loftq", "lora_ga"), REWRITES) | {"eva": FITTED})


class Sft(Passes):
    """Supervised fine-tuning on the assistant's tokens, with TRL's SFTTrainer."""

    method: Literal["full", "lora", "qlora", "prefix", "prompt"] = "qlora"
    """`full` weights; `lora` (arXiv 2106.09685); `qlora`: LoRA on a base quantised to 4 bits
    (arXiv 2305.14314); `prefix` (arXiv 2101.00190); `prompt` (arXiv 2104.08691). The last two cannot be merged."""
    rank: Count = Field(16, json_schema_extra=ADAPTERS)
    """Rank r of the update BA."""
    alpha: Positive = Field(32.0, json_schema_extra=ADAPTERS)
    """The update is scaled by alpha / rank, or as `rank_stabilized` says."""
    rank_stabilized: bool | None = Field(None, json_schema_extra=ADAPTERS)
    """The update is scaled by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732, section 3), in every later stage too.
    Default: no."""
    dora: bool | None = Field(None, json_schema_extra=ADAPTERS)
    """Train the length of each of W's rows apart from its direction, which BA changes (DoRA, arXiv 2402.09353, eq. 5),
    in every later stage too; on frozen weights in float32 only. Slower, in more memory. Default: no."""
    initialization: Literal["gaussian", "orthogonal"] | None = Field(None, json_schema_extra=ADAPTERS | INITIALIZATIONS)
    """Start of A and B, whose product is 0: `gaussian`: A normal, B = 0 (arXiv 2106.09685, section 4.1); `orthogonal`
    (PEFT's): both in orthogonal subspaces, only with method: lora. Default: A uniform by Kaiming's rule, B = 0, as in
    LoRA's code."""
    dropout: Fraction = Field(0.0, json_schema_extra=ADAPTERS)
    """Dropout on the adapter's input; the base's own dropout is always off."""
    target_modules: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] = Field(
        "all-linear", json_schema_extra=ADAPTERS
    )
    """Matrices that get an adapter. In a mixture whose experts are one tensor, `all-linear` leaves them out. A matrix
    that holds queries, keys and values (`c_attn`, `Wqkv`, `query_key_value`, `qkv_proj`) gets one adapter, of all three
    but for `fused_parts`."""
    fused_parts: Annotated[list[Literal["query", "key", "value"]], Field(min_length=1, max_length=2)] | None = Field(
        None, json_schema_extra=ADAPTERS
    )
    """Parts that the adapter of such a matrix changes, in every later stage too; B's other rows stay 0 (queries and
    values in LoRA, arXiv 2106.09685, section 4.2). One A of `rank` rows serves both, where the authors' code has one
    for each part. Default: all three."""
    layers: Annotated[list[Annotated[int, Field(ge=0, le=LARGEST)]], Field(min_length=1)] | None = Field(
        None, json_schema_extra=ADAPTERS
    )
    """Numbers, from 0, of the layers in which matrices get adapters, in every later stage too (LoRA adapts any subset
    of weights, arXiv 2106.09685, section 4.2). Default: all."""
    quantization: Literal["nf4", "fp4"] | None = Field(None, json_schema_extra=only_with(method=("qlora",)))
    """Type of the base's 4 bits: `nf4`, 4-bit NormalFloat, or `fp4`, bitsandbytes' 4-bit float (compared in arXiv
    2305.14314, tables 2 to 4). Every later stage has the same. Default: `nf4`."""
    double_quantization: bool = Field(True, json_schema_extra=only_with(method=("qlora",)))
    """Quantise the quantisation constants too."""
    compute: Literal["float32", "bfloat16"] | None = Field(None, json_schema_extra=only_with(method=("qlora",)))
    """Arithmetic on the dequantised weights. Default: the type of the base's frozen weights (`base.dtype`)."""
    virtual_tokens: Count = Field(16, json_schema_extra=VIRTUAL)
    """Number of trained virtual tokens."""
    prefix_projection: Count | None = Field(None, json_schema_extra=only_with(method=("prefix",)))
    """Width of a network of two layers that makes the prefix while it is trained, and is dropped afterwards
    (arXiv 2101.00190, section 4.3; 512 in its code for tables to text). Default: the prefix itself is trained."""
    prompt_text: Text | None = Field(None, json_schema_extra=only_with(method=("prompt",)))
    """Text whose tokens' embeddings the virtual tokens start as, again and again until all have one (the start from
    text of prompt tuning, arXiv 2104.08691, section 3.2, by PEFT's TEXT, with the tokenizer's own BOS). Default:
    embeddings of random tokens."""
    packing: bool = Field(False, json_schema_extra=only_with(method=("full", "lora", "qlora")))
    """Put several rows in one sequence; they cannot see each other."""
    max_length: Annotated[int, Field(ge=8, le=LARGEST)] | None = None
    """Longest sequence in tokens. Default: `prepare.max_tokens`."""
    label_smoothing: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, json_schema_extra=only_with(method=("full", "lora", "qlora", "prefix"))
    )
    """Share of a token's probability that the loss wants spread over the whole vocabulary (Szegedy et al., arXiv
    1512.00567, section 7; 0.1 in LoRA, arXiv 2106.09685, table 11). The held-out loss is without it. It needs all
    logits, and a second forward pass. Default: none."""
    group_by_length: bool | None = None
    """Let the rows of a batch be of like length, which saves padding: up to 50 batches at a time are drawn, sorted by
    length and read from the longest, as transformers does for QLoRA's Guanaco (arXiv 2305.14314, appendix B).
    Default: no."""
    neftune_alpha: Positive | None = None
    """Alpha of NEFTune (arXiv 2310.05914, algorithm 1): uniform noise within alpha / sqrt(length x width) on the
    embeddings of a padded row, in training only. Default: none."""
    learning_rate: Rate = 2e-3
    """Peak learning rate."""
    steps: Count = Field(200, json_schema_extra=BY_STEPS)
    """Optimiser steps."""
    batch_size: Count = 32
    """Rows (packed sequences, where `packing`) in one optimiser step, over all devices."""


class Adapter(Section):
    """What is trained of the SFT policy. A LoRA starts from the adapter of `sft`; after `sft.method: full` a new one is
    trained on the fine-tuned model, quantised to NF4 unless `method` says otherwise."""

    method: Literal["full", "lora", "qlora"] | None = Field(None, json_schema_extra=also("reference", "compare"))
    """After `sft.method: full`: `full` trains all weights, as the papers of RLHF and DPO do (arXiv 2203.02155;
    2305.18290), `lora` a LoRA on the fine-tuned model as it is, `qlora` one on it in NF4. Default: `qlora`; after
    another `sft.method` that one, whose adapter is continued."""
    rank: Count | None = Field(None, json_schema_extra=ALIGNING)
    """Rank of the update; at least that of `sft`. Default: that of `sft`, or 16 after full fine-tuning."""
    alpha: Positive | None = Field(None, json_schema_extra=ALIGNING)
    """The update is scaled by alpha / rank, or as `sft.rank_stabilized` says. Default: the scale of `sft`, or 2 after
    full fine-tuning."""
    target_modules: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] | None = Field(
        None, json_schema_extra=ALIGNING
    )
    """Layers that get an adapter; they must include those of `sft`. Default: those of `sft`, else all linear layers."""

    @property
    def task(self) -> str:
        """The key of `prepare` whose rows are trained on; a section may have a key `rows` to choose it."""
        return getattr(self, "rows", "preference")


def method_of(sft: Sft, section: Adapter) -> str:
    """What a stage trains: `full`, or the adapter on the SFT policy: `lora`, or `qlora` on weights in NF4."""
    return section.method or ("qlora" if sft.method == "full" else sft.method)


def trains_on_whole(sft: Sft | None, section: Adapter | None) -> bool:
    """Whether a stage trains on a whole SFT policy that is not quantised."""
    return bool(sft and section and sft.method == "full" and section.method in ("full", "lora"))


class Judged(Section):
    """Which answers count as better: the chosen ones of preference pairs, or those with the label `true`."""

    labels: Literal["chosen", "swapped", "shuffled"] = "chosen"
    """`swapped` counts the other answers as better, `shuffled` either at random: controls that must fail."""


class Pairs(Judged):
    """Training on preference pairs: each row holds two answers to one prompt."""


class Reward(Passes, Adapter, Pairs):
    """A reward model: an adapter or all weights, and a scalar head, trained on preference pairs with TRL's
    RewardTrainer (Bradley-Terry loss; Ouyang et al., arXiv 2203.02155, eq. 1)."""

    dropout: Fraction = Field(0.0, json_schema_extra=ALIGNING)
    """Dropout on the adapter's input; the base's own dropout is always off."""
    margin: Positive | None = None
    """The reward of the better answer is to be larger by the difference of both ratings, times this (Llama 2, arXiv
    2307.09288, eq. 2): of rows with a `margin`, with `score_chosen` and `score_rejected`, or with a score of each
    answer. The held-out loss is without it. Default: no margin."""
    centering: Annotated[float, Field(ge=0, le=LARGEST)] = 0.01
    """Weight of the squared sum of both rewards, a term that keeps their mean near 0 (arXiv 2312.09244, eq. 2)."""
    normalize: Literal["demonstrations"] | None = None
    """`demonstrations`: after training, shift all rewards by one number, so that the training rows of `sft` have a mean
    of 0 (arXiv 2203.02155, section 3.5; 2403.17031). Default: rewards as they were learned, which pairs leave free."""
    max_length: Annotated[int, Field(ge=8, le=LARGEST)] | None = None
    """Longest prompt with answer, in tokens. Default: `prepare.max_tokens`."""
    learning_rate: Rate = 2e-3
    """Peak learning rate."""
    steps: Count = Field(300, json_schema_extra=BY_STEPS)
    """Optimiser steps."""
    batch_size: Count = 32
    """Pairs in one optimiser step, over all devices; prompts, each with all pairs of its answers, where rows are ranked
    lists."""


class Reference(Section):
    """Log-probabilities of the judged answers under the SFT policy, computed once for all runs that read them."""

    method: Literal["full"] | None = None
    """`full`: the SFT policy, a whole model, is not quantised, as `dpo` or `kto` train on it as it is; written by the
    workflow."""
    batch_size: Count = 64
    """Rows in one forward pass; does not change a result."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass (bfloat16 by autocast); that of `dpo`, for an exact first loss."""


DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip

WHOLE_BATCH = {"sft", "aot", "aot_unpaired"}  # losses that TRL computes over all pairs of a forward pass together


class Referenced(Passes, Adapter, Judged):
    """Training on judged answers, with the SFT policy's log-probabilities of them as the reference."""

    beta: Positive = 0.1
    """Strength of the pull towards the SFT policy."""
    dropout: Fraction = Field(0.0, json_schema_extra=ALIGNING)
    """Dropout on the adapter's input; the base's own dropout is always off."""
    max_length: Annotated[int, Field(ge=8, le=LARGEST)] | None = None
    """Longest prompt with answer, in tokens. Default: `prepare.max_tokens`."""
    learning_rate: Rate = 1e-4
    """Peak learning rate."""
    steps: Count = Field(150, json_schema_extra=BY_STEPS)
    """Optimiser steps."""
    batch_size: Count = 32
    """Rows in one optimiser step, over all devices."""


class Dpo(Referenced, Pairs):
    """Direct preference optimisation from the SFT policy, with TRL's DPOTrainer (arXiv 2305.18290, eq. 7)."""

    loss: Annotated[list[DpoLoss], Field(min_length=1)] = ["sigmoid"]
    """TRL's names of the losses that are summed; `sigmoid` is the paper's."""
    loss_weights: Annotated[list[Weight], Field(min_length=1)] | None = None
    """Weights of the losses. Default: 1 each."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of labels assumed to be wrong, in the losses `robust`, `exo_pair`, `aot` and `aot_unpaired`."""


class Kto(Referenced):
    """Kahneman-Tversky optimisation on answers labelled as wanted or not, with TRL's KTOTrainer (arXiv 2402.01306)."""

    rows: Literal["kto", "preference"] = "kto"
    """Rows of `prepare`: `kto`, or both answers of each pair of `preference`, the chosen one as wanted (section 5)."""
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`kto`: eq. 7; `apo_zero_unpaired`: APO-zero (arXiv 2408.06266, eq. 7) by row, which has no reference point."""
    desirable_weight: Positive = 1.0
    """Lambda_D, weight of wanted answers. Where there are fewer of them, let weight x number be equal (eq. 8)."""
    undesirable_weight: Positive = 1.0
    """Lambda_U, weight of the others."""


class Rails(Section):
    """Limits beyond which reinforcement learning fails, with the reason."""

    max_kl: Positive = 50.0
    """Largest KL to the SFT policy, in nats per answer."""
    max_ratio_error: Positive = 1e-2
    """Largest distance of the first minibatch's probability ratio from 1, which it equals but for rounding."""
    min_eos_rate: Fraction = 0.1
    """Smallest share of answers that end by themselves; checked once the share has been that large."""
    max_growth: Annotated[float, Field(gt=1, le=LARGEST)] = 3.0
    """Largest mean length, as a multiple of the first iteration's."""
    min_entropy: Positive | None = None
    """Smallest mean entropy of the next token, in nats, below which the policy always gives the same answer."""


class Sampled(Optimisation, Adapter):
    """Reinforcement learning from the SFT policy: its answers to prompts are scored, and it is updated on them."""

    reward_function: Text | None = Field(None, json_schema_extra=also("compare"))
    """A hand-written reward instead of the reward model: `file.py:function` or `package.module:function`, called as
    `function(prompt: str, reply: str, answer: str | None) -> float`. Default: the model of section `reward`."""
    reward_code: Text | None = None
    """Fingerprint of the function's file; written by the workflow."""
    gold_function: Text | None = None
    """A function, named and called like `reward_function`, that scores answers to rows with an `answer`. Its score is
    recorded and not trained on. Default: the built-in world's (`posttrain.world.gold:gold_reward`) where
    `prepare.world` is set."""
    gold_code: Text | None = None
    """Fingerprint of the gold function's file; written by the workflow."""
    prompts: Literal["preference", "sft"] = "preference"
    """Training rows whose prompts are answered."""
    max_new_tokens: Count = 48
    """Longest answer, in tokens."""
    temperature: Positive = 1.0
    """Sampling and log-probabilities use the softmax of logits / temperature."""
    epochs: Count = 4
    """Passes over the answers of an iteration."""
    minibatches: Count = 1
    """Optimiser steps in one epoch."""
    clip: Positive = 0.2
    """Epsilon of the clipped policy loss."""
    kl_coefficient: Annotated[float, Field(ge=0, le=LARGEST)] = 0.05
    """Beta: penalty for a nat of KL to the SFT policy."""
    sft_coefficient: Annotated[float, Field(ge=0, le=LARGEST)] = 0.0
    """Weight of an added SFT loss, on as many SFT rows as answers: PPO-ptx (arXiv 2203.02155, eq. 2)."""
    missing_eos_penalty: Annotated[float, Field(ge=0, le=LARGEST)] = 1.0
    """Subtracted from the reward of an answer that does not end by itself."""
    snapshot_steps: Count = 10
    """Iterations between snapshots: policies stored beside the last one, for the reward-KL frontier and for replay.
    With as many as `steps` there is none."""
    rails: Rails = Rails()
    """Limits beyond which the run fails."""
    learning_rate: Rate = 1e-3
    """Peak learning rate of the policy."""
    steps: Count = 40
    """Iterations of answering, scoring and updating."""
    batch_size: Count = 64
    """Answers in one iteration, over all devices."""
    answer_batch_size: Count | None = None
    """Most answers that are drawn at once on one device. A smaller number saves memory, most of which is their cache,
    and does not change an answer but for rounding. Default: all of an iteration."""

    @property
    def task(self) -> str:
        return self.prompts

    @property
    def without(self) -> set[str]:
        """Optional roles whose artifact it does not read."""
        return {"reward"} if self.reward_function else set()


class Ppo(Sampled):
    """Proximal policy optimisation from the SFT policy against a reward (arXiv 1707.06347; 2203.02155)."""

    value_clip: Positive = 0.2
    """Epsilon of the clipped value loss."""
    value_learning_rate: Rate | None = None
    """Peak learning rate of the value function. Default: `learning_rate`."""
    value_from: Literal["reward"] | None = None
    """`reward`: the value function starts as the reward model, with its head (arXiv 2203.02155, appendix C.4). Default:
    as the SFT policy, with a head of zeros."""
    value_warmup: Annotated[int, Field(ge=0, le=LARGEST)] = 2
    """Number of first iterations that train the value function only."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of generalised advantage estimation."""
    whiten_rewards: bool = False
    """Scale the rewards of an iteration to variance 1."""
    kl_coefficient: Annotated[float, Field(ge=0, le=LARGEST)] = 0.05
    """Beta: penalty for a nat of KL to the SFT policy; with `kl_target`, its initial value."""
    kl_target: Positive | None = None
    """KL to which beta adapts, in nats per answer. Default: beta is fixed."""
    kl_horizon: Count = 10000
    """Answers over which beta adapts; only with `kl_target`."""


class RewardPart(Section):
    """One term of a reward that is a sum."""

    kind: Literal["model", "function", "exact", "pattern", "tags", "length"]
    """`model`: the reward model; `function`: `reward_function`. The others are 1 where they hold and else 0. `exact`:
    the reply's answer is the row's `answer`; `pattern`: a regular expression is found in the reply; `tags`: each pair
    of tags stands once in it, in this order; `length`: the reply has at most so many words."""
    weight: Weight = 1.0
    """Factor of the term."""
    answer: Literal["number", "text"] = Field("number", json_schema_extra=only_with(kind=("exact",)))
    """What is compared: the last number of the reply, as GSM8K's task does (arXiv 2110.14168), or the whole reply,
    without case, punctuation and articles, as SQuAD's measure does (arXiv 1606.05250)."""
    pattern: Text | None = Field(None, json_schema_extra=only_with(kind=("exact", "pattern")))
    """Regular expression of Python, searched for in the reply, for at most a second; `.` also matches line breaks.
    With `exact`, its first group is the reply's answer, as lm-eval's `regex` filter takes it."""
    tags: Annotated[list[Name], Field(min_length=1)] | None = Field(None, json_schema_extra=only_with(kind=("tags",)))
    """Names of tags, such as `[think, answer]` for `<think>...</think><answer>...</answer>`."""
    words: Count | None = Field(None, json_schema_extra=only_with(kind=("length",)))
    """Most words of a reply."""


class Grpo(Sampled):
    """Group relative policy optimisation from the SFT policy: several answers to each prompt, whose mean reward stands
    in for a value function (arXiv 2402.03300, section 4.1); RLOO with `advantage: leave_one_out` (arXiv 2402.14740)."""

    rewards: Annotated[list[RewardPart], Field(min_length=1)] | None = Field(None, json_schema_extra=also("compare"))
    """Terms of the reward, which are summed. Default: the reward model, or `reward_function`. `compare` measures each
    term that a program checks, and where nothing else scores answers their sum is its reward."""
    reward_seconds: Positive = Field(10.0, json_schema_extra=also("compare"))
    """Longest time that `reward_function` may take for an answer, in a process of its own. Where it takes longer, fails
    or returns no finite number, the answer counts as 0, and the row is named."""
    group: Annotated[int, Field(ge=2, le=LARGEST)] = 8
    """Answers to each prompt; must divide `batch_size`."""
    advantage: Literal["group", "leave_one_out"] = "group"
    """Baseline of an answer's reward: `group`, the mean of its group (arXiv 2402.03300, section 4.1.2);
    `leave_one_out`, the mean of the others, which is unbiased (arXiv 2402.14740, RLOO)."""
    scale: bool = True
    """Divide advantages by the standard deviation of the group's rewards; Dr. GRPO and RLOO do not (arXiv 2503.20783,
    section 3.2)."""
    average: Literal["answers", "tokens", "longest"] = "answers"
    """How token losses are averaged: `answers`, over each answer's tokens and then over answers (arXiv 2402.03300, eq.
    3); `tokens`, over all tokens (DAPO, arXiv 2503.14476, section 3.3); `longest`, divided by `max_new_tokens`, so that
    no answer's length has a weight (Dr. GRPO, arXiv 2503.20783, section 3.2)."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio of each token, or of the whole answer, as its mean by token (GSPO, arXiv 2507.18071, eq. 7)."""
    labels: Literal["own", "shuffled"] = "own"
    """`shuffled` deals the rewards of a group out among its answers at random: a control that must fail."""
    clip_high: Positive | None = None
    """Epsilon of the upper bound (DAPO, arXiv 2503.14476, section 3.1). Default: `clip`."""
    kl: Literal["loss", "reward"] = "loss"
    """Where KL counts: in the loss, estimated by k3 for each token (arXiv 2402.03300, eq. 4), or in the reward of the
    answer (arXiv 2402.14740). With `kl_coefficient: 0` nowhere."""
    kl_coefficient: Annotated[float, Field(ge=0, le=LARGEST)] = 0.04
    """Beta: penalty for a nat of KL to the SFT policy."""
    redraws: Annotated[int, Field(ge=0, le=100)] = 0
    """How often, at most, prompts whose answers all have one reward are replaced by others in an iteration (dynamic
    sampling, arXiv 2503.14476, section 3.2)."""
    unended: Literal["trained", "masked"] = "trained"
    """`masked`: an answer that does not end by itself is left out of the loss (arXiv 2503.14476, section 3.4)."""
    epochs: Count = 1
    """Passes over the answers of an iteration."""

    @property
    def without(self) -> set[str]:
        reads = {part.kind for part in self.rewards or []} or {"function" if self.reward_function else "model"}
        return set() if "model" in reads else {"reward"}

    @property
    def for_compare(self) -> dict[str, Any]:
        """What `compare` is told of its rewards."""
        checks = [part for part in self.rewards or [] if part.kind not in ("model", "function")]
        seconds = {"reward_seconds": self.reward_seconds} if self.reward_function else {}
        return ({"checks": checks} if checks else {}) | seconds


class Judgement(Section):
    """How a judged policy is in memory."""

    quantize: bool | Literal["fp4"] | None = None
    """Quantise a whole model, as the base is one, before it is judged, to NF4 (`true`) or to 4-bit floats (`fp4`;
    compared in arXiv 2305.14314, table 2): for a model that fits into memory in no other way. Its results change.
    Default: no."""

    @property
    def four_bits(self) -> str | None:
        """The type of 4 bits to which a whole model is quantised; None where it is not."""
        return ("fp4" if self.quantize == "fp4" else "nf4") if self.quantize else None


class Measured(Judgement):
    """A judgement of the policy alone, whose adapter can be merged."""

    merge: bool | None = None
    """Merge an adapter into its weights, dequantised, before it is judged, which makes it faster; `false` judges it on
    the weights that it was trained on, those in NF4 after QLoRA, in less memory. The results differ by rounding.
    Default: yes on frozen weights in float32, no on others, to which a merged model is rounded."""


class Judge(Section):
    """A language model that judges answers in pairs, each in both orders (arXiv 2306.05685; win rates by GPT-4 in DPO,
    arXiv 2305.18290, section 6)."""

    url: Annotated[str, Field(pattern=_URL)]
    """OpenAI-compatible endpoint up to its version, such as `http://localhost:8000/v1`; requests go to
    `/chat/completions` below it."""
    model: Text
    """The model's name at the endpoint."""
    against: Literal["sft", "given"] = "sft"
    """Each answer is judged beside the SFT policy's, or beside the given one: the chosen answer of a held-out pair, the
    last reply of an SFT row."""
    prompt: Text | None = None
    """What is asked, with `{prompt}`, `{first}` and `{second}`; the reply's verdict is `Verdict: A`, `B` or `tie`
    (or `Preferred:`, `More helpful:`, `Better:`, as in DPO, appendix C.2). Default: the text in
    `evaluation/judging.py`."""
    key_variable: Annotated[str, Field(pattern=_VARIABLE)] | None = None
    """Environment variable with the endpoint's key, which is written nowhere. Default: no key."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Of the judge's sampling."""
    max_tokens: Count = 256
    """Longest reply of the judge, in tokens."""
    timeout: Positive = 60.0
    """Seconds to wait for a reply."""
    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Requests for one verdict, after errors and replies without a verdict, before it counts as failed."""
    pause: Annotated[float, Field(ge=0, le=600)] = 2.0
    """Seconds before the second attempt; then 3, 7, ... times as long."""


class Compare(Judgement):
    """Answers of every policy to held-out prompts: rewards, win rate against the SFT policy, KL."""

    method: Literal["full"] | None = None
    """`full`: the SFT policy, a whole model, is not quantised, as a policy is trained on it as it is; written by the
    workflow."""
    seed: Seed = 0
    """Seed of the choice of prompts and of sampling."""
    prompts: Count = 400
    """Held-out prompts that every policy answers."""
    max_new_tokens: Count = 48
    """Longest answer, in tokens."""
    temperature: Positive = 1.0
    """Sampling and log-probabilities use the softmax of logits / temperature."""
    reward_function: Text | None = None
    """The hand-written reward of `ppo`, where it has one; written by the workflow."""
    reward_code: Text | None = None
    """Fingerprint of the function's file; written by the workflow."""
    reward_seconds: Positive | None = None
    """That of `grpo`, where its reward is a function; written by the workflow."""
    checks: list[RewardPart] | None = None
    """The terms of `grpo.rewards` that a program checks; written by the workflow."""
    gold_function: Text | None = None
    """A function, `file.py:function` or `package.module:function`, called as `function(prompt: str, reply: str,
    answer: str) -> float`, that scores answers to rows with an `answer`. Its score is not trained on. Default: the
    built-in world's (`posttrain.world.gold:gold_reward`) where `prepare.world` is set."""
    gold_code: Text | None = None
    """Fingerprint of the gold function's file; written by the workflow."""
    judge: Judge | None = None
    """A language model that judges the answers, for win rates. Default: none is asked."""
    best_of: Count = 16
    """Answers of the SFT policy to each prompt, for best-of-n; 1: no best-of-n."""
    batch_size: Count = 64
    """Answers in one forward pass; does not change a result but for rounding."""


SHIFTED = refused(
    dict.fromkeys(
        ("longlora", "shift", "s2", "ssa"),
        "LongLoRA's shifted sparse attention (arXiv 2309.12307, section 3.2) trains another attention than is used",
    )
)


class Longctx(Training):
    """A longer context: RoPE's frequencies are rescaled and the model is tuned on long documents. The artifact is a
    whole model with merged adapters; its configuration holds the rescaling."""

    policy: Name = "base"
    """Policy whose context is extended: a policy of this experiment."""
    method: Literal["linear", "ntk", "dynamic", "yarn", "modulo", "none"] = Field("linear", json_schema_extra=SHIFTED)
    """`linear`: position interpolation (arXiv 2306.15595); `ntk`: NTK-aware scaling by a fixed factor (arXiv
    2309.00071, section 3.1); `dynamic`: by the text's length, and `yarn` (both arXiv 2309.00071); `modulo`: positions
    begin again after each old context, which `export` refuses; `none`: unchanged positions. Of a model that is rescaled
    already: `yarn` with llama3 or yarn, `linear` with linear or longrope, `ntk` with linear, `dynamic` with dynamic
    (`maths/rope.py` says why)."""
    factor: Annotated[float, Field(gt=1, le=LARGEST)] = 4.0
    """New context divided by the old one."""
    tuning: Literal["full", "lora", "qlora", "none"] = "full"
    """What is trained: all weights, a LoRA, a LoRA on the model quantised to NF4, or nothing."""
    rank: Count = Field(16, json_schema_extra=only_with(tuning=("lora", "qlora")))
    """Rank of the update."""
    alpha: Positive = Field(32.0, json_schema_extra=only_with(tuning=("lora", "qlora")))
    """The update is scaled by alpha / rank."""
    target_modules: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] = Field(
        "all-linear", json_schema_extra=only_with(tuning=("lora", "qlora"))
    )
    """Layers that get an adapter."""
    embeddings_and_norms: bool = Field(True, json_schema_extra=only_with(tuning=("lora", "qlora")))
    """Train embeddings and norms beside the adapter (LongLoRA, arXiv 2309.12307, section 3.3)."""
    packing: bool = False
    """Concatenate documents and cut at the new context; otherwise a row is the beginning of one document."""
    optimizer: Optimizer | None = Field(None, json_schema_extra=only_with(tuning=("full", "lora", "qlora")))
    """`muon`, with `tuning: full` alone: Muon for matrices, AdamW for the rest, at one learning rate. Others: as of
    `sft`. Default: `adamw`."""
    learning_rate: Rate = 1e-3
    """Peak learning rate."""
    steps: Count = 200
    """Optimiser steps."""
    batch_size: Count = 8
    """Rows of the new context's length in one optimiser step, over all devices."""


class Passkey(Section):
    """A number of five digits that stands in a text without meaning is asked for at its end, in the prompt of Landmark
    attention (arXiv 2305.16300) and without a chat template; replies are greedy."""

    questions: Count = 100
    """Questions at each of `lengths.tokens`, whose length is that with the reply (320 in position interpolation, arXiv
    2306.15595, section 3.3)."""
    depths: Annotated[int, Field(ge=2, le=101)] = 5
    """Equally spaced places of the number, from the beginning to the end of the text, in turn (32 in position
    interpolation)."""


class Lengths(Measured):
    """Perplexity of every policy by length and by position, on held-out long documents; passkey retrieval."""

    tokens: Annotated[list[Annotated[int, Field(ge=16, le=LARGEST)]], Field(min_length=1)]
    """Lengths of the window, in tokens."""
    passkey: Passkey | None = None
    """Passkey retrieval at these lengths, on any model, as tasks `landmark_passkey_N`; held-out long documents are not
    needed for it. `k_max` is the largest distance up to which at least 20 % of the numbers are found at each depth
    (arXiv 2306.15595, section 3.3). Default: none."""
    documents: Count = 64
    """Held-out documents for each length."""
    packing: bool = False
    """Concatenate documents and cut at the longest window, for documents that are shorter."""
    stride: Annotated[float, Field(gt=0, le=1)] = Field(0.5, json_schema_extra=only_with(stride_tokens=(None,)))
    """Step of the window over a longer document, as a share of the window; each token counts once."""
    stride_tokens: Count | None = None
    """The step in tokens, in place of `stride` (256 in position interpolation, arXiv 2306.15595, section 3.2, and in
    YaRN, arXiv 2309.00071, section 4.3.1)."""
    batch_size: Count = 16
    """Windows in one forward pass; does not change a result but for rounding."""
    buckets: Count = 8
    """Equal parts of the longest window; the loss is reported for each."""


def step_of(section: Lengths, window: int) -> int:
    """Tokens between the ends of two windows of a length; under it, as a window's first token is not predicted."""
    return min(section.stride_tokens or max(1, int(window * section.stride)), window - 1)


class Generation(Section):
    """How the answers to a task are generated; an unset key is as the task itself says."""

    num_beams: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Beams of the search (10 for LoRA on E2E, arXiv 2106.09685, appendix D.3); 1: no search."""
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    """Power of a beam's length by which its log-probability is divided (0.9 ibid., 0.8 in LoRA's repository)."""
    no_repeat_ngram_size: Count | None = None
    """Tokens in a row that may not occur twice in prompt and answer (4 ibid.)."""
    do_sample: bool | None = None
    """Draw each token at random, by `evaluate.seed`; the answers depend on `batch_size` too, which must be a number."""
    temperature: Positive | None = None
    """Sampling uses the softmax of logits / temperature (0.7 for Guanaco, arXiv 2305.14314, section 5.2). Default with
    `do_sample`: the task's, else 1."""
    top_p: Rate | None = None
    """Sample from the likeliest tokens that have this probability together (nucleus sampling, arXiv 1904.09751; 0.9 for
    Guanaco). Default with `do_sample`: the task's, else all."""
    max_gen_toks: Count | None = None
    """Longest answer, in tokens."""


WITHOUT_CIDER = refused(
    {"cider": "its package, pycocoevalcap, is of 2020 and splits words by a Java program; give it data/samples by hand"}
)
TextMetric = Literal["bleu", "nist", "rouge_1", "rouge_2", "rouge_l", "meteor"]


class Task(Section):
    """One lm-eval task."""

    task: Text
    """Name of a task that `prepare` makes (`world`, `heldout_text`, `heldout_sft`, `choices`, `answers`; with
    `world.long` `passkey_N` and `recall_N` for lengths of N tokens), of `task_files`, or of lm-eval."""
    revision: Revision | None = None
    """Full 40-digit commit of the task's data set on the hub, where it has one."""
    allow_floating: bool = False
    """Accept a data set revision that can move; the manifest records its commit."""
    shots: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    """Examples before each question. Default: the task's own number."""
    generation: Generation | None = None
    """How the answers are generated. Default: as the task says, which mostly is greedily."""
    metrics: Annotated[list[TextMetric], Field(min_length=1)] | None = Field(None, json_schema_extra=WITHOUT_CIDER)
    """Of the answers as texts against one or more references, in place of the task's own metrics: BLEU (sacrebleu) and
    NIST (Doddington 2002), F1 of ROUGE-1, -2 and -L (rouge-score, unstemmed), METEOR (nltk's, of 2007). For `answers`,
    whose question is then asked as it is, with the answers of all its rows as references, and for `task_files` that
    generate, whose doc_to_target is a text or a list. Default: the task's own metrics."""


LARGEST_BATCH = 64  # of `batch_size: auto`


class Evaluate(Measured):
    """Benchmarks of every policy with lm-eval."""

    seed: Seed = 0
    """Seed of the few-shot examples, the bootstrap and sampling, where a task has them."""
    tasks: list[Task] | None = None
    """Default: every task that `prepare` made (`world`, `heldout_text`, `heldout_sft`, `choices`, `answers`)."""
    task_files: Annotated[list[Text], Field(min_length=1)] | None = None
    """Your own tasks and groups that `tasks` names, each a file in lm-eval's YAML. What it includes and its local data
    count with it; data on the hub need the task's `revision`."""
    task_functions: Annotated[list[Text], Field(min_length=1)] | None = None
    """Python functions, `FILE.py:NAME`, that these files may call by `!function`; others are refused."""
    batch_size: Count | Literal["auto"] = "auto"
    """Requests in one forward pass; does not change a result. `auto`: 64, or the largest power of two below that fits
    by `posttrain plan` into the memory of a GPU (`gpu_memory_gb` of the SLURM site, or this machine's) or, on a CPU,
    into half of this machine's. One at a time where positions depend on the text's length
    (dynamic NTK, longrope) and `max_length` is over the length up to which they do not."""
    limit: Count | None = None
    """Number of first questions of each task to ask; for trying out only. Default: all."""
    chat_template: bool | None = None
    """Apply the chat template to questions. Default: where the policy has one and was not trained on plain text alone;
    another form than that of training is a warning in log and report."""
    max_length: Annotated[int, Field(ge=8, le=LARGEST)] | None = None
    """Longest input in tokens. Default: the model's own context."""


class Algebra(Section):
    """Identities of the methods' papers, computed with the code that the stages use; nothing is trained."""

    seed: Seed = 0
    """Seed of the random weights, tokens and numbers that identities are computed on."""


class Paper(Section):
    """The paper whose recipe an experiment follows. It is told by `posttrain check` and changes no artifact."""

    title: Text
    """Title of the paper."""
    id: Text
    """Where the paper is, as `arXiv 2310.16944`."""
    table: Text | None = None
    """Table, figure or section whose numbers the experiment is to show."""
    variant: Annotated[str, Field(pattern=_VARIANT)]
    """Whose settings these are: `paper`; `owner/repository@commit`, where the official code differs from the paper; or
    `authors-later`, where the authors corrected them."""
    deviations: dict[Text, Text]
    """Each setting that differs from the variant, with the reason, forced ones included; `{}` where none does."""
    rows: dict[Literal["text", "long", "sft", "preference", "kto"], Count] | None = None
    """Training rows of each kind, as the data sets state them: for `posttrain plan` before they are prepared."""


class Chain(Section):
    """One chain of stages. A stage runs when its section is set; a section inherits from that of `extends`."""

    question: str = ""
    """What the experiment asks, in one sentence."""
    paper: Paper | None = None
    """The paper whose recipe it follows. Not inherited."""
    extends: Name | None = None
    """Experiment whose settings this one inherits; stages with equal settings share their artifacts."""
    seed: Seed = 0
    """Default seed of the training stages."""
    grid: dict[str, Annotated[list, Field(min_length=1)]] | None = None
    """Dotted keys, each with a list of values. Each combination is an experiment, `NAME@beta=0.5@seed=1`, which
    replaces this one. Inherited key by key; `null`: no grid."""

    _seeded: frozenset[str] = frozenset()  # the stages that use the experiment's seed

    @property
    def longest_row(self) -> int:
        """`prepare.max_tokens`, or its default, in tokens."""
        scratch = self.base.scratch
        return self.prepare.max_tokens or (scratch.context if scratch else 512)

    if TYPE_CHECKING:  # the sections, one for each stage, which `stages.Experiment` adds

        def __getattr__(self, stage: str) -> Any: ...


class Wandb(Section):
    """Weights & Biases. Stages write offline; `posttrain wandb-sync` uploads."""

    mode: Literal["disabled", "offline"] = "disabled"
    """`offline` writes runs to `results/wandb`."""
    project: Name = "posttrain"
    """Project of the runs."""


class Campaign(Section):
    """What one `snakemake` call covers."""

    title: str = ""
    """Heading of the report."""
    experiments: Annotated[list[Name], Field(min_length=1)]
    """Names of the experiments; NAME is read from `experiments/NAME.yaml` beside the campaign's file."""
    verify: list[Name] = []
    """Names of further experiments whose claims `snakemake verify` rules on; nothing else runs them."""
    grid: dict[str, Annotated[list, Field(min_length=1)]] | None = None
    """Grid of every experiment, such as `seed: [0, 1, 2]`; a key of the experiment's own `grid` has precedence."""
    keep_gb: Annotated[float, Field(ge=0, le=LARGEST)] = 20.0
    """GB of replaced artifacts to keep. A kept one is reused when a stage has its settings, inputs and code again;
    0 keeps none."""
    spotchecks: Annotated[int, Field(ge=0, le=100)] = 0
    """Places of each training at which its state is kept, so that `posttrain spotcheck` can replay the next steps. It
    holds for trainings from then on, and reruns none. A state takes as much disk as a checkpoint."""
    scale: Literal["toy", "reduced", "paper"] = "paper"
    """Size of its models and data beside the papers'. A claim that needs a larger scale is not tested."""
    strict: bool = False
    """Rerun every stage when the software versions (`envs/requirements.txt`) change."""
    wandb: Wandb = Wandb()
    """Experiment tracker."""

"""What the configuration and the headers of a given base tell before any job: its shape, context and limits.

Read from a folder, from `posttrain fetch --shapes`, from the cache of fetched models, or from `config/models/`, which
has the models of the papers' recipes; without torch.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from posttrain.config.sections import Base, HubModel
from posttrain.config.sources import hub_items
from posttrain.config.stages import STAGES, Experiment
from posttrain.data import hub
from posttrain.ground import weights
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_object
from posttrain.maths import rope

# Families whose packed rows see each other, and families that PEFT's prefix tuning cannot run (transformers 5.23).
UNPACKED = ("opt", "bloom", "mpt", "falcon", "xglm", "biogpt", "openai-gpt", "mamba", "falcon_mamba",
            "recurrent_gemma", "rwkv", "jamba", "bamba", "qwen3_next")  # fmt: skip
WITHOUT_PREFIX = ("openai-gpt", "mamba", "falcon_mamba", "recurrent_gemma", "rwkv", "jamba",
                  "bamba", "qwen3_next")  # fmt: skip
# Families of which transformers has a language model and no classifier, as a reward model needs (transformers 5.23).
WITHOUT_CLASSIFIER = """
    afmoe apertus aria_text bailing_hybrid bamba beam bert-generation bitnet blenderbot blenderbot-small blt codegen
    cohere cohere2 cohere2_moe cpmant cwm dbrx deepseek_v32 deepseek_v4 dots1 dots3_note dots3_note_text emu3
    ernie4_5 ernie4_5_moe exaone_moe falcon_h1 falcon_mamba flex_olmo flint fuyu gemma3n gemma3n_text gemma4
    gemma4_assistant gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text git glm4_moe
    glm4_moe_lite glm_moe_dsa got_ocr2 gpt_neox_japanese granite granite_swa granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared hrm_text hy_v3 hy_v4 hyperclovax inkling2_text inkling_text internlm3
    iquestcoder jais2 kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama4 llama4_text longcat_flash mamba mamba2
    marian mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text mllama moshi moss_transcribe_diarize musicgen
    musicgen_melody nanochat nemotron_h olmo_hybrid olmoe pegasus phi4_multimodal prophetnet qwen3_5_moe
    qwen3_5_moe_text qwen4_exp qwen4_exp_text recurrent_gemma rwkv solar_open trocr vaultgemma whisper xglm xlstm
    youtu zaya
"""
SHAPES = "shapes.json"  # beside a hub model's manifest: `config`, its config.json, and `weights`, name -> shape
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")  # of `config.json`: the number of layers
KNOWN = "config/models"  # the same of the recipes' models, NAME.json; `*` in a weight's name is each layer's number


class Given(NamedTuple):
    """A model that was made elsewhere, as far as it is known; empty where it is not here."""

    config: dict  # of `config.json`; of a multimodal model, its text part
    shapes: dict[str, list[int]]  # weight -> its shape

    @property
    def context(self) -> int | None:
        """The longest text in tokens; None where the configuration states none. BLOOM's ALiBi has no end."""
        return None if self.config.get("model_type") == "bloom" else rope.context(self.config)


def given(base: Base) -> Given:
    """What is known of a base's model; nothing of one that is trained from scratch or not fetched."""
    if base.path:
        return in_folder(base.path)
    for item in hub_items(base):
        shapes, manifest = (Path("results/fetch", item, name) for name in (SHAPES, "manifest.json"))
        if shapes.is_file():
            return _read(str(shapes), _changed(shapes))
        try:
            return in_folder(str(hub.snapshot(hub.read_manifest(manifest)["repos"][0])))  # of this model alone
        except UserError:  # not fetched, or no longer in the cache
            continue
    if base.hub and (file := known(base.hub)).is_file():
        return _read(str(file), _changed(file))
    return Given({}, {})


def known(model: HubModel) -> Path:
    """The file in `config/models/` of a model at a commit, which need not exist."""
    return Path(KNOWN, f"{model.id.replace('/', '--')}@{model.revision}.json")


def in_folder(folder: str) -> Given:
    """What is known of the model in a folder; its files are read again when one is added or `config.json` changes."""
    return _in_folder(folder, _changed(folder), _changed(f"{folder}/config.json"))


@cache
def _in_folder(folder: str, *changed: int) -> Given:
    return of_values(read_object(Path(folder, "config.json")), weights.headers(Path(folder)))


@cache
def _read(file: str, changed: int) -> Given:
    content = read_object(Path(file))
    config, weights = content.get("config") or {}, content.get("weights") or {}
    layers = next((config[name] for name in LAYERS if name in config), 0)
    each = {
        name.replace("*", str(n)): shape for name, shape in weights.items() for n in range(layers if "*" in name else 1)
    }
    return of_values(config, each)


def _changed(path: str | Path) -> int:
    """When a file or a folder changed; 0 where it does not exist."""
    return os.stat(path).st_mtime_ns if os.path.exists(path) else 0


def of_values(config: dict, shapes: dict[str, list[int]]) -> Given:
    """The model of a `config.json`. Of a multimodal one, the text part with its own weights."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return Given(config, shapes)
    own = {name: shape for name, shape in shapes.items() if weights.text_name(name)}
    return Given(text | {"dtype": weights.own_dtype(config)}, own)


def given_mistakes(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Settings that a given model cannot have: (dotted key, what is wrong and what would be right)."""
    base, sft, prepare = experiment.base, experiment.sft, experiment.prepare
    folder = Path(base.path) if base.path and os.path.isdir(base.path) else None
    pickles = sorted(file.name for file in folder.glob("*.bin")) if folder else []
    if folder and pickles and not weights.named(folder):
        problem = f"{folder} has {pickles[0]}, but no {weights.WHOLE} and no {weights.INDEX}"
        yield "base.path", f"{problem}; pickles are never loaded"
    model = given(base)
    family, context = model.config.get("model_type"), model.context
    if sft and sft.packing and family in UNPACKED:
        yield "sft.packing", f"cannot be combined with {family}, whose packed rows see each other; set packing: false"
    if sft and sft.method == "prefix" and without_prefix(model.config):
        yield "sft.method", f"prefix cannot be combined with {family} (PEFT cannot run it); use lora, qlora or full"
    if experiment.reward and family in WITHOUT_CLASSIFIER.split():
        yield "reward", f"transformers has no classifier of {family} to train; use ppo.reward_function, or another base"
    if context and experiment.longest_row > context:
        default = "" if prepare.max_tokens else ", the default,"
        problem = f"{experiment.longest_row}{default} is longer than the base's context ({context}); set it to at most"
        yield "prepare.max_tokens", f"{problem} {context}"
    longest = experiment.evaluate.max_length
    if context and longest and longest > context and not experiment.longctx:
        yield "evaluate.max_length", f"{longest} is longer than the base's context ({context})"
    yield from _answers(experiment, context or _of_scratch(base))


def without_prefix(config: dict) -> bool:
    """Whether PEFT's prefix tuning cannot run a model: it gives keys and values one width, and latent attention, of
    DeepSeek-V2 and others (arXiv 2405.04434, section 2.1), has two."""
    return config.get("model_type") in WITHOUT_PREFIX or bool(config.get("kv_lora_rank"))


def _of_scratch(base: Base) -> int | None:
    """The context of a model that is trained from scratch; None for ALiBi, which has no end, and for a given model."""
    return base.scratch.context if base.scratch and base.scratch.positions == "rope" else None


def _answers(experiment: Experiment, context: int | None) -> Iterator[tuple[str, str]]:
    """Stages whose longest answer leaves no room for a prompt."""
    for stage in STAGES:
        section = getattr(experiment, stage)
        if context and getattr(section, "max_new_tokens", 0) >= context:
            problem = f"{section.max_new_tokens} leave no room for a prompt in a context of {context} tokens"
            yield f"{stage}.max_new_tokens", problem

"""Write a recipe at small size: its models with random weights, rows of its data's shape, and its settings scaled down.

posttrain toy CAMPAIGN --output FOLDER
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import yaml

from posttrain.config.sections import ASKED, SOURCES, HubModel
from posttrain.config.settings import Settings, read_settings
from posttrain.config.stages import ALIGNED, STAGES
from posttrain.dag import campaign
from posttrain.dag.given import LAYERS, given, known
from posttrain.dag.layers import Merged, oldest_first, read_layers
from posttrain.ground import progress
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_object, write_jsonl
from posttrain.maths import rope

CONTEXT = 128  # tokens, of every model
LONGEST = 112  # tokens of a row, so that virtual tokens fit before them
VOCABULARY = 600  # at most
PASSKEY = 2 * CONTEXT  # tokens, in which the shortest text with a number fits
ROWS = 24  # of every source
WORDS = [start + end for start in "bdfgklmnprstvw" for end in ("ad", "en", "ill", "oma", "usk", "ery", "oto", "ile")]

# Largest value of a key in any section, where it is set.
CAPS: dict[str, float] = {
    "steps": 2, "batch_size": 8, "micro_batch_size": 2, "answer_batch_size": 4, "log_steps": 1, "eval_steps": 1,
    "warmup_steps": 1, "checkpoint_steps": 1, "snapshot_steps": 2, "value_warmup": 1, "redraws": 1, "minibatches": 2,
    "max_tokens": LONGEST, "max_length": LONGEST, "max_prompt_tokens": 80, "max_answer_tokens": 80, "max_new_tokens": 8,
    "rank": 4, "virtual_tokens": 16, "group": 4, "prompts": 8, "documents": 4,
    "questions": 4, "depths": 2, "num_beams": 2, "max_gen_toks": 8, "prefix_projection": 16, "best_of": 2, "limit": 4,
    "stride_tokens": 32, "buckets": 4, "hidden_size": 64, "layers": 2, "heads": 4, "intermediate_size": 128,
    "context": CONTEXT, "epochs": 1, "max_rows": ROWS, "learned": 0.99,
}  # fmt: skip
# What a section gets where it is not set, since its default is large.
SMALL: dict[str, dict[str, Any]] = {
    "prepare": {"max_tokens": LONGEST},
    "sft": {"steps": 2}, "reward": {"steps": 2}, "dpo": {"steps": 2}, "kto": {"steps": 2},
    "ppo": {"steps": 2, "batch_size": 8, "max_new_tokens": 8, "value_warmup": 1},
    "grpo": {"steps": 2, "batch_size": 8, "max_new_tokens": 8},
    "longctx": {"steps": 2},
    "lengths": {"documents": 4},
    "evaluate": {"limit": 4},
    "compare": {"prompts": 8, "best_of": 2, "max_new_tokens": 8, "batch_size": 8},
}  # fmt: skip
SCRATCH = {"learned": 0.99, "steps": 60, "warmup_steps": 5, "learning_rate": 3e-3}  # it must have learned something
LEFT_OUT = ("claims", "paper")
PREPARED = ("heldout_text", "heldout_sft", *ASKED)  # tasks that need no hub
HUB = ("path", "dataset", "revision", "allow_floating", "subset", "rows", "files")  # keys that say where rows are


def toy(file: Path, output: Path) -> str:
    """Write the models, rows, experiments and campaign of a recipe at small size; returns the command that runs it.

    Raises UserError where the recipe is wrong, or where a model's or a data set's file beside it is missing.
    """
    plan = campaign.load(file)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; give a new folder")
    settings = read_settings(file)
    layers = read_layers(settings["experiments"], [], settings.places, file.parent / "experiments", [])
    root = Settings({"grid": settings.get("grid")}, {})
    texts: list[str] = []
    for merged in oldest_first(layers, root, []):
        context = _context(plan.experiments.get(merged.name) or next(iter(plan.experiments.values())))
        scaled = experiment(merged, layers, context, file.parent / "rows", output, texts)
        _write_yaml(output / "experiments" / f"{name(merged.name)}.yaml", scaled)
    for model in {item.base.hub for item in plan.experiments.values()} - {None}:
        write_model(model, output / "models" / folder(model.id), texts)
    values = {key: value for key, value in settings.items() if key != "verify"} | {"scale": "toy"}
    values["experiments"] = [name(item) for item in settings["experiments"]]
    _write_yaml(output / "campaign.yaml", values)
    return f"snakemake --configfile {output}/campaign.yaml --cores 2"


def name(experiment: str) -> str:
    """The name at small size, so that the results of the recipe itself stay."""
    return f"toy-{experiment}"


def folder(repository: str) -> str:
    """The folder of a model under `models/`."""
    return repository.replace("/", "--")


def _context(experiment) -> int:
    """The context of an experiment's base as the paper has it, in tokens."""
    base = experiment.base
    return (base.scratch.context if base.scratch else given(base).context) or CONTEXT


def experiment(merged: Merged, layers: dict, context: int, rows: Path, output: Path, texts: list[str]) -> dict:
    """An experiment's own file at small size; writes its rows, and adds their texts to `texts`."""
    above = {key for parent in merged.ancestors for key in layers[parent]}
    own = {key: value for key, value in merged.own.items() if key not in LEFT_OUT}
    if "extends" in own:
        own["extends"] = name(own["extends"])
    if not merged.ancestors:  # stages that run by default, with defaults of many questions
        own |= {stage: own.get(stage) or {} for stage in ("evaluate", *(["compare"] if own.keys() & ALIGNED else []))}
    for stage, section in own.items():
        if stage in STAGES and isinstance(section, dict):
            small = {} if stage in above else SMALL.get(stage, {})
            own[stage] = {key: value for key, value in small.items() if not (key == "steps" and "epochs" in section)}
            own[stage] |= _capped(section)
    if isinstance(own.get("grid"), dict):
        own["grid"] = {key: [_cap(key.rpartition(".")[2], values[0])] for key, values in own["grid"].items()}
    if own.get("prepare"):
        own["prepare"] |= _sources(own["prepare"], rows, output / "rows", texts)
    if scratch := (own.get("base") or {}).get("scratch"):
        own["base"]["scratch"] = scratch | SCRATCH
    if hub := (own.get("base") or {}).pop("hub", None):
        own["base"]["path"] = str(output / "models" / folder(hub["id"]))
    if tokens := (own.get("lengths") or {}).get("tokens"):
        least = PASSKEY if merged.values["lengths"].get("passkey") else 16
        own["lengths"]["tokens"] = _unique([max(least, tokens * CONTEXT // context) for tokens in tokens])
    if tasks := (own.get("evaluate") or {}).get("tasks"):  # those of lm-eval need the hub
        own["evaluate"]["tasks"] = [task for task in tasks if task["task"] in PREPARED] or None
    if own.get("compare"):
        own["compare"].pop("judge", None)
    return own


def _unique(values: list) -> list:
    """The values without repetitions."""
    return [value for number, value in enumerate(values) if value not in values[:number]]


def _capped(section: dict) -> dict:
    """A section with no number over that of `CAPS`."""
    return {key: _cap(key, value) for key, value in section.items()}


def _cap(key: str, value):
    """A value, or the largest that its key may have; of sections within it, each value."""
    if isinstance(value, dict):
        return _capped(value)
    if isinstance(value, list):
        return [_cap(key, item) if isinstance(item, dict) else item for item in value]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return type(value)(min(value, CAPS[key])) if number and key in CAPS else value


def _sources(prepare: dict, rows: Path, folder: Path, texts: list[str]) -> dict:
    """The sources of `prepare`, which read rows of the same shape."""
    sources: dict[str, list] = {}
    for task in {*SOURCES} & prepare.keys():
        sources[task] = []
        for source in prepare[task]:
            file = Path(f"{source.get('dataset') or Path(source['path']).stem}.jsonl".replace("/", "--"))
            part = re.sub(r"\W+", "-", f"{file.stem}-{source.get('files') or source.get('rows') or 'all'}").strip("-")
            made = list(filled(rows / file, seed=part))
            target = folder / f"{part}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(target, made)
            texts += [text for row in made for text in _texts(row)]
            kept = {key: value for key, value in source.items() if key not in HUB}
            sources[task].append(kept | {"path": str(target)})
    return sources


def filled(file: Path, seed: str) -> Iterator[dict]:
    """`ROWS` rows of the shape of those in a file: `~` becomes some words, `~N` so many, `~#` a number, and a capital
    letter, as in `~P`, the same words in all of a row.

    Raises UserError where the file is missing.
    """
    if not file.is_file():
        raise UserError(f"{file}: missing; it holds rows of the data set's shape, with ~ in place of words")
    shapes = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    numbers = random.Random(seed)
    for number in range(ROWS):
        yield _filled(shapes[number % len(shapes)], numbers, {letter: words(6, numbers) for letter in ascii_uppercase})


def _filled(value, numbers: random.Random, named: dict[str, str]):
    """A value of a row, its texts filled. named: letter -> its words."""
    if isinstance(value, dict):
        return {key: _filled(item, numbers, named) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, numbers, named) for item in value]
    if not isinstance(value, str):
        return value
    text = re.sub("~([A-Z])", lambda place: named[place[1]], value)
    text = re.sub("~#", lambda _: str(numbers.randrange(2, 99)), text)
    return re.sub(r"~(\d*)", lambda place: words(int(place[1] or 6), numbers), text)


def words(count: int, numbers: random.Random) -> str:
    """Words, each at even odds the one after the last in the list, so that there is something to learn."""
    places = [numbers.randrange(len(WORDS))]
    while len(places) < count:
        places.append((places[-1] + 1) % len(WORDS) if numbers.random() < 0.5 else numbers.randrange(len(WORDS)))
    return " ".join(WORDS[place] for place in places)


def _texts(value) -> Iterator[str]:
    """The texts in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def write_model(model: HubModel, target: Path, texts: list[str]) -> None:
    """Write a model of the same class in small, with random weights, and a tokenizer with the same special tokens.

    Raises UserError where `config/models/` lacks the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not known(model).is_file():
        raise UserError(f"{known(model)}: missing; it holds the config.json and special tokens of {model.id}")
    facts = read_object(known(model))
    tokenizer = train_tokenizer(facts["tokenizer"], texts)
    config = AutoConfig.for_model(**small(facts["config"], len(tokenizer)))
    config.update({key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
    tokenizer.save_pretrained(target)
    progress.say(f"{target}: {model.id} in small, with random weights")


def small(config: dict, vocabulary: int) -> dict:
    """A `config.json` of the same class with the sizes of a toy."""
    heads = next(config[key] for key in ("num_attention_heads", "n_head", "n_heads") if key in config)
    shared = max(1, 4 * config.get("num_key_value_heads", heads) // heads)
    sizes = dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64) | dict.fromkeys(LAYERS, 2)
    sizes |= dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4) | {"num_key_value_heads": shared}
    sizes |= dict.fromkeys((*rope.CONTEXT, "n_ctx", "sliding_window"), CONTEXT) | {"intermediate_size": 128}
    sizes |= {"head_dim": 16, "vocab_size": vocabulary, "max_window_layers": 2}
    return {key: sizes.get(key, value) for key, value in config.items()}


def train_tokenizer(facts: dict, texts: list[str]):
    """A byte-level BPE tokenizer, trained on texts, with a model's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    ends = {f"{key}_token": facts[key] for key in ("bos", "eos", "unk") if facts.get(key)}
    special = list(dict.fromkeys([*ends.values(), *facts.get("others", [])]))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    if facts.get("adds_bos"):
        bos = facts["bos"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, model_max_length=CONTEXT, clean_up_tokenization_spaces=False, **ends
    )


def _write_yaml(file: Path, values: dict) -> None:
    """Write settings as YAML."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")

"""A model that was made elsewhere: its files copied, of a multimodal model the text part alone, and checked whole."""

import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from posttrain.ground import weights
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_object, write_json
from posttrain.ground.progress import say

MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")  # settings on which others depend


def copy(source: Path, folder: Path) -> dict:
    """Copy the configuration and the weights that it names, nothing else, and return the metrics.

    Raises UserError where there are no safetensors, or where the copy cannot be loaded whole.
    """
    from transformers import AutoConfig

    files = weights.named(source)
    if not files:
        kinds = (".safetensors", ".bin", ".pt", ".pth")
        others = ", ".join(sorted(file.name for file in source.iterdir() if file.suffix in kinds)) or "none"
        wanted = f"{weights.WHOLE} and no {weights.INDEX}"
        raise UserError(f"base: {source} has no {wanted} (other weights: {others}); pickles are never loaded")
    refuse_absent(source, files)
    folder.mkdir()
    with loadable(source):
        config, left_out = AutoConfig.from_pretrained(source, trust_remote_code=False), {}
        multimodal = config.get_text_config() is not config
        if multimodal:
            left_out = copy_text(source, folder, files, config)
    for file in [] if multimodal else ["config.json", *files]:
        shutil.copyfile(source / file, folder / file)
    dropped = copy_generation_settings(source, folder)
    refuse_damaged(folder, source, strict=multimodal)
    size = sum((folder / file).stat().st_size for file in weights.named(folder) if file.endswith(".safetensors"))
    changes = {"weights left out": left_out, "generation settings left out": dropped}
    changes = {key: part for key, part in changes.items() if part}
    return {"summary": {"weights_mb": round(size / 1e6, 1)}, **({"changes": changes} if changes else {})}


def refuse_absent(source: Path, files: list[str]) -> None:
    """Raise UserError for a file of weights that lies outside the folder or does not exist."""
    outside = [file for file in files if Path(file).name != file]
    absent = [file for file in files if file not in outside and not (source / file).is_file()]
    problems = [f"base: {source}: {file} is not a file of this folder" for file in outside]
    problems += [f"base: {source}: there is no file {file}, which the index names" for file in absent]
    if problems:
        raise UserError(*problems)


@contextmanager
def loadable(source: Path, folder: Path | None = None):
    """Turn any exception into a UserError that names the model. folder: its copy, whose name is not shown.

    Damaged files make transformers, safetensors and tokenizers raise anything.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).replace(str(folder), str(source)).partition("\n")[0]
        raise UserError(f"base: {source} cannot be loaded: {type(error).__name__}: {reason}") from None


def copy_text(source: Path, folder: Path, files: list[str], config) -> dict[str, int]:
    """Write the text part of a multimodal model as a model of its own; returns the number of other weights by part.

    Weights keep their bytes and get the names of the text model.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    text, other = config.get_text_config(), Counter[str]()
    places: dict[str, str] = {}
    for file in (file for file in files if file.endswith(".safetensors")):
        with safe_open(source / file, "pt") as opened:
            names = {name: weights.text_name(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
            part = {new: opened.get_tensor(name) for name, new in names.items() if new}
        other.update(name.removeprefix("model.").partition(".")[0] for name, new in names.items() if not new)
        if part:
            save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    if files[0].endswith(".json"):
        write_json(folder / files[0], {"metadata": {}, "weight_map": places})
    text.dtype = text.dtype or config.dtype
    if "lm_head.weight" not in places and config.tie_word_embeddings:  # the whole model decides on it
        text.tie_word_embeddings = True
    text.save_pretrained(folder)
    say(f"only the text part of {source} is used ({text.model_type}), without {other.total()} weights: {dict(other)}")
    return dict(other)


def copy_generation_settings(source: Path, folder: Path) -> dict:
    """Copy `generation_config.json` without settings that have no effect beside the others, which are returned.

    transformers refuses to save a model with one, such as a `temperature` without `do_sample`, after training.
    """
    from transformers import GenerationConfig

    settings = read_object(source / "generation_config.json")
    kept: dict = {}
    for key in sorted(settings, key=lambda key: key not in MODES):
        try:
            GenerationConfig(**kept, **{key: settings[key]}).validate(strict=True)
        except (ValueError, TypeError):
            continue
        kept[key] = settings[key]
    dropped = {key: value for key, value in settings.items() if key not in kept}
    if dropped:
        say(f"warning: settings of {source / 'generation_config.json'} have no effect and are left out: {dropped}")
        write_json(folder / "generation_config.json", kept)
    elif settings:
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    return dropped


def refuse_damaged(folder: Path, source: Path, strict: bool = False) -> None:
    """Raise UserError for a model that cannot be loaded or lacks a weight, which transformers would initialise
    randomly. strict: also where a weight is not used.

    Only the headers of the files are read.
    """
    from transformers import AutoModelForCausalLM

    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    with loadable(source, folder):
        _, loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
    unused = loaded["unexpected_keys"]
    wrong = {"missing": loaded["missing_keys"], "of another shape": [key for key, *_ in loaded["mismatched_keys"]]}
    wrong |= {"not those of this architecture": unused} if strict else {}
    problems = [f"{len(keys)} weights are {how}, among them {min(keys)}" for how, keys in wrong.items() if keys]
    if problems:
        raise UserError(*(f"base: {source}: {problem}: the model is incomplete" for problem in problems))
    if unused:
        say(f"warning: the model does not use {len(unused)} weights of {source}, among them {min(unused)}")

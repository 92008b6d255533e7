"""LoRA adapters that begin as the SFT policy, on the frozen weights that policy rests on.

Rewards, PPO and DPO all start here: after LoRA and QLoRA the frozen weights are the base and the adapter begins as
the one that `sft` made; after full fine-tuning they are the fine-tuned model, quantised to NF4 once, and the adapter
begins as nothing.
"""

from pathlib import Path
from typing import NamedTuple

from posttrain.config.sections import Adapter
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, sha256
from posttrain.models.policy import MERGEABLE, load_contract, load_weights

NF4 = {"type": "nf4", "double_quantization": True, "compute": "float32"}


class Foundation(NamedTuple):
    """Frozen weights, how they are quantised, and the artifact whose adapter is the SFT policy (None: no adapter)."""

    weights: Path
    quantization: dict | None
    adapter: Path | None


def foundation(base: Path, sft: Path) -> Foundation:
    """What the SFT policy rests on. base, sft: manifests; after full fine-tuning `base` is the SFT policy itself.

    Raises UserError for virtual tokens, which no further adapter can follow, and for the adapter of another base.
    """
    contract = load_contract(sft)
    if contract["method"] == "weights":
        return Foundation(sft, NF4, None)
    if contract["method"] not in MERGEABLE:
        raise UserError(f"{sft}: {contract['method']} tuning cannot be aligned; set sft.method to lora, qlora or full")
    if sha256(base) != contract["base"]:
        raise UserError(f"{sft}: its adapter was trained on another base than {base}")
    return Foundation(base, contract["quantization"], sft)


def lora(section, found: Foundation, dropout: float = 0.0, **options):
    """PEFT's configuration of an adapter that can begin as the SFT policy's; options are LoraConfig's.

    Raises UserError where the new adapter has no room for the old one.
    """
    import peft

    old = read_json(found.adapter.parent / "model" / "adapter_config.json") if found.adapter else {}
    rank = section.rank or old.get("r", 16)
    scale = old["lora_alpha"] / old["r"] if old else 2.0
    modules = section.target_modules or old.get("target_modules") or "all-linear"
    if old and rank < old["r"]:
        raise UserError(f"rank {rank} is under that of the SFT policy's adapter ({old['r']}), as which it begins")
    missing = sorted(set(old.get("target_modules") or []) - set(modules)) if modules != "all-linear" else []
    if missing:
        raise UserError(f"target_modules lacks {', '.join(missing)}, which the SFT policy's adapter has")
    alpha = scale * rank if section.alpha is None else section.alpha
    return peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules, **options)


def load_as_sft(found: Foundation, section: Adapter | None = None, dropout: float = 0.0, name: str = "default"):
    """The SFT policy as an adapter on its frozen weights, ready to be trained on.

    section: the adapter's shape; None for just that of the SFT policy.
    """
    import peft

    config = lora(section or Adapter(), found, dropout, task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_weights(found.weights, found.quantization), config, adapter_name=name)
    start_as_sft(model, found, name)
    return model


def start_as_sft(model, found: Foundation, name: str = "default") -> None:
    """Make a fresh adapter the same function as the SFT policy's: its A and B in the first ranks, and B = 0 beyond.

    What the new scale alpha / rank does to the update is taken back in B.
    """
    import peft

    state = peft.get_peft_model_state_dict(model, adapter_name=name)
    odd = sorted(key for key in state if not key.endswith(("lora_A.weight", "lora_B.weight", "score.weight")))
    if odd:
        raise UserError(f"target_modules: {odd[0]} is no adapter of a linear layer; name linear layers only")
    if found.adapter is None:
        return
    old = peft.load_peft_weights(found.adapter.parent / "model", device="cpu")
    known = read_json(found.adapter.parent / "model" / "adapter_config.json")
    config = model.peft_config[name]
    rescale = (known["lora_alpha"] / known["r"]) / (config.lora_alpha / config.r)
    for key, weight in old.items():
        if "lora_A" in key:
            state[key][: weight.shape[0]] = weight
        else:
            state[key].zero_()
            state[key][:, : weight.shape[1]] = weight * rescale
    peft.set_peft_model_state_dict(model, state, adapter_name=name)


def belongs(key: str, *names: str) -> bool:
    """Whether a weight of a PEFT model is one of these adapters'."""
    return any(f".lora_{half}.{name}." in key for half in "AB" for name in names)


def save(model, folder: Path, base: Path, name: str = "default", state: dict | None = None) -> None:
    """Write one adapter; the same bytes for the same weights. base: manifest of the weights it rests on; state: the
    weights where they are not those of the model (`training.whole`)."""
    config = model.peft_config[name]
    config.base_model_name_or_path = str(base.parent / "model")
    if isinstance(getattr(config, "target_modules", None), set):
        config.target_modules = sorted(config.target_modules)  # a set's order follows the hash seed
    model.save_pretrained(folder, selected_adapters=[name], state_dict=state)
    if name != "default":  # PEFT gives every other name a folder of its own
        for file in (folder / name).iterdir():
            file.replace(folder / file.name)
        (folder / name).rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # a model card with this machine's paths

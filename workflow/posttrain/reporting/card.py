"""The model card of a policy: README.md with its data, method, settings, metrics, base and licence.

It is in the Hugging Face format and part of the artifact's bytes: equal settings and inputs give equal text, without
dates, hosts or folders. What is not recorded is called unknown. Only the card of an exported model has benchmarks,
since a policy is evaluated after it was published.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.config.sections import EXECUTION
from posttrain.config.stages import STAGES
from posttrain.ground.files import read_json, sha256
from posttrain.reporting.records import training_summary
from posttrain.reporting.text import clean, short, visible

UNKNOWN = "unknown"
FROM_SCRATCH = "trained-from-scratch"  # tag of a model whose base was trained on the prepared text
MODULO = "RoPE's are taken modulo {original_context}, which transformers alone does not do"
HOW_TO_LOAD = {"transformers": "a whole model", "peft": "an adapter: load it with PEFT on its base"}


def write_published(model: Path, stage: str, section: dict, inputs: dict, metrics: dict) -> None:
    """Write the card into the folder `model` of an artifact, where that holds a language model.

    section: the stage's settings; inputs: role -> manifest or manifests.
    """
    if (model / "policy.json").is_file():
        text = card(stage, section, inputs, metrics, read_json(model / "policy.json"))
        (model / "README.md").write_text(text, encoding="utf-8")


def write_exported(policy: Path, folder: Path) -> None:
    """Write the card of an exported policy into `folder`, with its benchmarks where the policy was evaluated.

    policy: manifest. An input that is missing or has changed is called unknown.
    """
    home = policy.parent
    record = optional(home / "provenance.json")
    inputs = {
        role: Path(file)
        for role, files in record.get("inputs", {}).items()
        for file, digest in files.items()
        if Path(file).name == "manifest.json" and Path(file).is_file() and sha256(Path(file)) == digest
    }
    contract = read_json(home / "model" / "policy.json")
    whole = contract | {"method": "weights", "merged": contract["method"]}
    stage = record.get("stage", home.name)
    rows = benchmarks(policy, home.parent / "evaluate" / stage)
    text = card(stage, optional(home / "config.yaml"), inputs, optional(home / "metrics.json"), whole, rows)
    (folder / "README.md").write_text(text, encoding="utf-8")


def optional(file: Path) -> dict:
    """The content of a JSON file; {} where it does not exist."""
    return read_json(file) if file.is_file() else {}


def benchmarks(policy: Path, evaluation: Path) -> list[dict]:
    """The rows of an evaluation; none where it evaluated other bytes than the policy's."""
    judged = optional(evaluation / "provenance.json").get("inputs", {}).get("policy", {})
    return optional(evaluation / "metrics.json").get("rows", []) if sha256(policy) in judged.values() else []


def card(stage: str, section: dict, inputs: dict, metrics: dict, contract: dict, rows: Sequence[dict] = ()) -> str:
    """The text of a card. contract: the content of `policy.json`; rows: benchmarks, as recorded by the evaluation."""
    inherited = metadata_of(inputs.get("base") or inputs.get("sft") or inputs.get("policy"))
    hub = section.get("hub") or {}
    metadata: dict[str, Any] = {
        "base_model": hub.get("id"),
        "license": license_of(hub, inputs),
        "tags": ["posttrain", stage],
    }
    metadata |= {key: inherited[key] for key in ("base_model", "license") if key in inherited}
    if section.get("scratch") or FROM_SCRATCH in inherited.get("tags", []):
        metadata["tags"].append(FROM_SCRATCH)
    whole = contract["method"] == "weights" or contract.get("base", "") is None  # a reward model may be whole
    metadata["library_name"] = "transformers" if whole else "peft"
    metadata["datasets"] = datasets_of(inputs.get("data")) or None
    metadata["pipeline_tag"] = "text-classification" if contract["method"] == "reward" else "text-generation"
    positions = contract.get("positions", {})
    origin = "trained from scratch" if FROM_SCRATCH in metadata["tags"] else metadata["base_model"]
    method = f"{contract['merged']}, merged" if contract.get("merged", "weights") != "weights" else contract["method"]
    facts = {
        "stage": f"{stage}: {STAGES[stage].help}" if stage in STAGES else stage,
        "method": f"{method}; {HOW_TO_LOAD[metadata['library_name']]}",
        "base model": origin,
        "revision of the base": hub.get("revision"),
        "licence": metadata["license"],
        "context, tokens": positions.get("context"),
        **({"positions": MODULO.format(**positions)} if positions.get("type") == "modulo" else {}),
        **({"type of frozen weights": contract["dtype"]} if "dtype" in contract else {}),
        **{f"{role}, sha256 of its manifest": sha256(file) for role, file in inputs.items() if isinstance(file, Path)},
    }
    parts = [
        f"---\n{yaml_of(metadata, rows)}---\n\n# Model of the stage {stage}\n",
        table(["", ""], facts.items()),
        "## Data\n",
        table(["source", "task", "rows"], sources_of(inputs.get("data"))) or "Unknown.\n",
        f"## Settings\n\n```json\n{json.dumps(clean(described(section)), indent=1, ensure_ascii=False)}\n```\n",
        "## Training metrics\n",
        table(["metric", "value"], training_summary(metrics).items()) or "Unknown.\n",
        "## Benchmarks\n",
        table(["task", "metric", "value", "standard error", "n"], [
            [row.get(key) for key in ("task", "metric", "value", "stderr", "n")] for row in rows
        ]) or "Unknown: this card was written without them.\n",
        "## Intended use, limits and bias\n\nUnknown: nothing was recorded.\n",
    ]  # fmt: skip
    return "\n".join(parts)


def yaml_of(metadata: dict, rows: Sequence[dict]) -> str:
    """The metadata block, with benchmarks in the format of the Hugging Face hub (`model-index`)."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult("text-generation", row["task"], row["task"], row["metric"], row["value"])
        for row in map(clean, rows)
        if math.isfinite(row["value"])
    ]
    named: dict[str, Any] = {"model_name": "policy", "eval_results": results} if results else {}
    return ModelCardData(**clean(metadata), **named).to_yaml() + "\n"


def metadata_of(manifest: Path | None) -> dict:
    """The metadata block of an artifact's card; {} where it has none."""
    from huggingface_hub import metadata_load

    file = manifest.parent / "model" / "README.md" if manifest else Path()
    return (metadata_load(file) or {}) if file.is_file() else {}


def license_of(hub: dict, inputs: dict) -> str:
    """The licence in the card of a fetched model; "unknown" where there is none."""
    from huggingface_hub import metadata_load

    if not hub:
        return UNKNOWN
    from posttrain.data.hub import fetched_repo

    file = fetched_repo("model", hub["id"], hub.get("revision"), list(inputs.get("fetched", []))) / "README.md"
    named = (metadata_load(file) or {}).get("license") if file.is_file() else None
    return named if isinstance(named, str) else UNKNOWN


def datasets_of(data: Path | None) -> list[str]:
    """Names of the hub's data sets in the settings of the prepared data."""
    sources = optional(data.parent / "config.yaml") if data else {}
    listed = [source for value in sources.values() if isinstance(value, list) for source in value]
    names = [source.get("dataset") for source in listed if isinstance(source, dict)]
    return sorted({name for name in names if name})


def sources_of(data: Path | None) -> list[list]:
    """Name, task and number of kept rows of every source of the data."""
    sources = optional(data.parent / "metrics.json").get("sources", []) if data else []
    return [[described(source.get("name")), source.get("task"), source.get("kept")] for source in sources]


def described(value):
    """The settings that a card shows: without keys that do not change what is learned, and of absolute paths only the
    last name."""
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items() if key not in EXECUTION}
    if isinstance(value, list):
        return [described(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def table(head: list[str], lines) -> str:
    """A Markdown table with a row for each of `lines`, every cell as code; "" without lines."""
    rows = [f"| {' | '.join(map(code, line))} |\n" for line in lines]
    return "".join([f"| {' | '.join(head)} |\n", f"|{'---|' * len(head)}\n", *rows]) if rows else ""


def code(value: object) -> str:
    """A value as inline code, escaped so that it contains no markup and no end of the cell."""
    text = visible(short(value)).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text else UNKNOWN

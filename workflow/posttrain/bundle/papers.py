"""The texts of a bundle for its readers: how to check it, cards of its data, and checklists that are filled in.

Answers link to files of the bundle. What is not recorded is called unknown, or left to the authors.
"""

from pathlib import Path
from typing import Any

from posttrain.ground.files import read_json
from posttrain.ground.identity import record_of
from posttrain.reporting.card import UNKNOWN, metadata_of
from posttrain.reporting.text import cell, clean, short

TEMPLATES = {
    "README-bundle.md": "README-bundle.md",
    "checklists/neurips.md": "neurips.md",
    "checklists/acm.md": "acm.md",
    "cards/models.md": "model-cards.md",
}


def texts(index: dict, verdict: dict) -> dict[str, str]:
    """Path in the bundle -> text. verdict: the content of verdict.json, {} where there is none."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("posttrain", "templates"), autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"short": short, "cell": lambda value: cell(str(value))}
    records = {one["name"]: record_of(Path(one["name"])) for one in index["artifacts"]}
    facts = clean({**index, "verdict": verdict, "used": used(records), "data": data(index), "models": models(index)})
    written = {name: environment.get_template(template).render(facts) for name, template in TEMPLATES.items()}
    cards = {card["file"]: environment.get_template("data-card.md").render(card) for card in facts["data"]}
    return written | cards


def used(records: dict[str, dict]) -> dict[str, Any]:
    """What the runs of the artifacts used together; machines by their processors and GPUs."""
    shapes = [record.get("shape", {}) for record in records.values()]
    versions = [tuple(sorted(shape.get("versions", {}).items())) for shape in shapes]
    return {
        "hours": sum(record.get("seconds", 0.0) for record in records.values()) / 3600,
        "cpu_hours": sum(record.get("cpu_seconds", 0.0) for record in records.values()) / 3600,
        "memory_mb": max((record.get("peak_memory_mb") or 0 for record in records.values()), default=0),
        "gpu_memory_mb": max((record.get("peak_gpu_memory_mb") or 0 for record in records.values()), default=0),
        "disk_mb": sum(record.get("disk_mb", 0.0) for record in records.values()),
        "devices": sorted({f"{shape.get('device', 'cpu')} ({shape.get('machine', UNKNOWN)})" for shape in shapes}),
        "python": sorted({record.get("python", UNKNOWN) for record in records.values()}),
        "versions": sorted({f"{name} {version}" for one in versions for name, version in one}),
        "commits": sorted({record.get("git_commit", UNKNOWN) for record in records.values()}),
    }


def data(index: dict) -> list[dict]:
    """What the card of each prepared data set tells."""
    cards = []
    for one in index["artifacts"]:
        if one["stage"] == "prepare":
            metrics = read_json(Path(one["name"], "metrics.json"))
            sources = [origin_of(source) | source for source in metrics["sources"]]
            facts = {"sources": sources, "splits": metrics.get("splits", {}), "tokens": metrics.get("tokens", {})}
            name = one["name"].partition("/")[2].replace("/", "-")
            cards.append({"file": f"cards/{name}.md", "name": one["name"]} | facts)
    return cards


def origin_of(source: dict) -> dict[str, str]:
    """Licence, origin and languages of a source that does not give them; of counts over all sources none."""
    if not source["total"]:
        return dict.fromkeys(("licence", "origin", "languages"), "")
    if source["name"].startswith("world, "):
        return {"licence": "MIT, as the code", "origin": "written by workflow/posttrain/world", "languages": "English"}
    return dict.fromkeys(("licence", "origin", "languages"), UNKNOWN)


def models(index: dict) -> list[dict]:
    """The models with a card: folder, and what the card's metadata say of base and licence."""
    cards = ((one["name"], metadata_of(Path(one["name"], "manifest.json"))) for one in index["artifacts"])
    return [
        {"name": name, "base": card.get("base_model", "trained from scratch"), "licence": card.get("license", UNKNOWN)}
        for name, card in cards
        if card
    ]

"""What the attempts at stages cost, failed ones too: time, GPU hours, memory, and an estimate of the energy.

`jobs.compute` writes a file about each attempt: results/compute/EXPERIMENT/STAGE/START-RANDOM.json.
"""

from pathlib import Path

from posttrain.config.stages import STAGES
from posttrain.ground.files import read_object
from posttrain.ground.identity import record_of
from posttrain.reporting.text import clean, short, visible

FOLDER = "compute"  # in the folder of results
OUTCOMES = ("done", "reused", "failed", "interrupted", "killed")  # `reused`: an earlier artifact was taken
AMOUNTS = ("seconds", "cpu_seconds", "gpus", "peak_memory_mb", "peak_gpu_memory_mb")
# Of a busy core of any CPU: Green Algorithms, Lannelongue et al. 2021, doi.org/10.1002/advs.202100707
CORE_WATTS = 12.0
# Nameplate power by the name that the driver gives, from NVIDIA's data sheets.
GPU_WATTS = {
    "Tesla T4": 70, "Tesla V100-PCIE-16GB": 250, "Tesla V100-PCIE-32GB": 250, "Tesla V100-SXM2-16GB": 300,
    "Tesla V100-SXM2-32GB": 300, "NVIDIA A10": 150, "NVIDIA A30": 165, "NVIDIA A40": 300, "NVIDIA A100-PCIE-40GB": 250,
    "NVIDIA A100 80GB PCIe": 300, "NVIDIA A100-SXM4-40GB": 400, "NVIDIA A100-SXM4-80GB": 400, "NVIDIA L4": 72,
    "NVIDIA L40": 300, "NVIDIA L40S": 350, "NVIDIA H100 PCIe": 350, "NVIDIA H100 NVL": 400,
    "NVIDIA H100 80GB HBM3": 700, "NVIDIA H200": 700, "NVIDIA B200": 1000, "NVIDIA RTX A6000": 300,
    "NVIDIA RTX 6000 Ada Generation": 300, "NVIDIA GeForce RTX 3090": 350, "NVIDIA GeForce RTX 4090": 450,
}  # fmt: skip
ASSUMED = (
    f"Energy is an estimate: {CORE_WATTS:g} W for each busy core of a CPU (Green Algorithms, Lannelongue et al. 2021), "
    "and the nameplate power of a GPU for as long as it was reserved. Memory, disks, network and cooling are left out, "
    "and so is CO2, which depends on the place."
)
SHOWN = 20  # attempts without a result that are listed


def attempts(results: Path, artifact: str = "") -> list[dict]:
    """The attempts at an artifact, as `tiny/sft`, or at all artifacts; by artifact, in the order of their starts.

    `outcome` is "" for an attempt of which no end is on record: it was killed with its job, or is running. `result`:
    whether it led to a result: an attempt with the same settings, inputs and code ended, perhaps a later one.
    """
    folder = results / FOLDER
    every = [read_attempt(file, folder) for file in sorted((folder / artifact).glob("**/*.json"))]
    ended = {(one["artifact"], one["identity"]) for one in every if one["outcome"] in ("done", "reused")}
    others = {one["artifact"] for one in every if (one["artifact"], one["identity"]) not in ended}
    ended |= {(name, record_of(results / name).get("identity")) for name in others}  # a stage may outlive its attempt
    return [one | {"result": bool(one["identity"]) and (one["artifact"], one["identity"]) in ended} for one in every]


def read_attempt(file: Path, folder: Path) -> dict:
    """One attempt; what is missing or malformed in its file counts as nothing."""
    record = clean(read_object(file))
    artifact = file.parent.relative_to(folder)
    texts = {key: str(record.get(key) or "") for key in ("started", "gpu", "reason")}
    outcome = record.get("outcome") if record.get("outcome") in OUTCOMES else ""
    named = {"artifact": visible(artifact), "stage": artifact.parts[1] if len(artifact.parts) > 1 else ""}
    named |= {"identity": str(record.get("identity") or ""), "outcome": outcome}
    return named | texts | {key: amount(record.get(key)) for key in AMOUNTS}


def amount(value: object) -> float:
    """A number above 0; 0 for anything else, and for one that nothing takes."""
    return float(value) if isinstance(value, int | float) and 0 < value < 1e15 else 0.0


def by_provenance(artifact: dict) -> dict:
    """An artifact that was made elsewhere, or before attempts were recorded, as one attempt, by its provenance."""
    made = artifact["provenance"]
    shape = made.get("shape") if isinstance(made.get("shape"), dict) else {}
    gpu = str(shape.get("device", "cpu"))
    on_gpu = {"gpu": "" if gpu == "cpu" else gpu, "gpus": amount(shape.get("processes", 1)) * (gpu != "cpu")}
    amounts = {key: amount(made.get(key)) for key in AMOUNTS}
    named = {"artifact": name_of(artifact["name"]), "stage": artifact["stage"].partition("/")[0]}
    return named | amounts | on_gpu | {"outcome": "done", "reason": "", "result": True}


def kwh(attempt: dict) -> float:
    """The energy of an attempt by CORE_WATTS and GPU_WATTS; a GPU of unknown power is left out."""
    joules = attempt["cpu_seconds"] * CORE_WATTS
    joules += attempt["gpus"] * attempt["seconds"] * GPU_WATTS.get(attempt["gpu"], 0)
    return joules / 3.6e6


def total(some: list[dict]) -> dict:
    """The number of attempts by outcome, the sums of what they took, and the peaks."""
    hours = sum(one["seconds"] for one in some) / 3600
    lost = sum(one["seconds"] for one in some if not one["result"]) / 3600
    return {
        "attempts": len(some),
        **{outcome: sum(one["outcome"] == outcome for one in some) for outcome in OUTCOMES},
        "unended": sum(not one["outcome"] for one in some),
        "hours": hours,
        "gpu_hours": sum(one["gpus"] * one["seconds"] for one in some) / 3600,
        "cpu_hours": sum(one["cpu_seconds"] for one in some) / 3600,
        "peak_memory_mb": max((one["peak_memory_mb"] for one in some), default=0.0),
        "peak_gpu_memory_mb": max((one["peak_gpu_memory_mb"] for one in some), default=0.0),
        "kwh": sum(map(kwh, some)),
        "hours_without_result": lost,
        "share_without_result": lost / (hours or 1),
    }


def compute(campaign: dict, artifacts: list[dict], results: Path) -> dict:
    """What a campaign cost, by stage and in all, and what else was spent in the folder of results.

    campaign: as of `stages.report`. artifacts: those of it that can be read, with their provenance.
    """
    every = attempts(results)
    recorded = {one["artifact"] for one in every}
    absent = [one for one in artifacts if name_of(one["name"]) not in recorded and one["provenance"]]
    own = set(map(name_of, folders_of(campaign)))
    spent = [one for one in every if one["artifact"] in own] + [by_provenance(one) for one in absent]
    by_stage = {stage: [one for one in spent if one["stage"] == stage] for stage in STAGES}
    lost = sorted((one for one in spent if not one["result"]), key=lambda one: -one["seconds"])
    unnamed = {one["gpu"] or "a GPU without a name" for one in spent if one["gpus"] and one["gpu"] not in GPU_WATTS}
    return {
        "stages": {stage: total(some) for stage, some in by_stage.items() if some},
        "total": total(spent),
        "other": total([one for one in every if one["artifact"] not in own]),
        "by_provenance": len(absent),
        "unknown_gpus": sorted(unnamed),
        "without_result": [
            {key: one[key] for key in ("artifact", "outcome", "reason", "seconds")} for one in lost[:SHOWN]
        ],
        "assumed": ASSUMED,
    }


def folders_of(campaign: dict) -> list[str]:
    """The folders of all artifacts that a campaign or its claims use, whether they exist or not."""
    folders = [folder for experiment in campaign["experiments"] for folder in experiment["stages"].values()]
    for claim in campaign.get("claims", []):
        for part in ("measured", "control"):
            folders += [folder for measured, above in claim[part]["above"].items() for folder in (measured, *above)]
    return folders


def name_of(folder: str) -> str:
    """The name of an artifact, as `tiny/sft`, by its folder."""
    return visible(folder).removeprefix("results/")


def in_words(some: list[dict]) -> str:
    """Attempts in a line: how many, how they ended where that was not well, and what they took in all."""
    sums = total(some)
    parts = [f"{len(some)} attempt{'s' if len(some) != 1 else ''}"]
    parts += [f"{sums[outcome]} {outcome}" for outcome in OUTCOMES[1:] if sums[outcome]]
    parts += [f"{sums['unended']} without a recorded end"] if sums["unended"] else []
    parts.append(f"{'at least ' if sums['unended'] else ''}{short(sums['hours'])} h in all")
    parts += [f"{short(sums['gpu_hours'])} GPU hours"] if sums["gpu_hours"] else []
    return ", ".join(parts)

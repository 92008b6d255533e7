"""Run a stage so that its artifact appears whole or not at all, with a manifest and a provenance record."""

import datetime
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from posttrain.config.sections import Ppo, Training, slice_of
from posttrain.config.sources import own_files
from posttrain.dag.artifacts import flat
from posttrain.ground import accepted
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, sha256, write_json
from posttrain.ground.identity import DAMAGED, canonical, identity, manifest_of, verify
from posttrain.ground.progress import say, spent
from posttrain.jobs import audit, failure, kept
from posttrain.reporting import card
from posttrain.training import interruption, tracking

# Hold times, hosts and what the artifact was made from: they lie beside its bytes, not among them.
BESIDE = ("config.yaml", "provenance.json", "lm_eval.json")
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "tokenizers", "lm_eval", "accelerate")


def make(
    stage: str,
    run: Callable,
    section,
    inputs: dict[str, Path | list[Path]],
    output: Path,
    planned: str | None = None,
    keep_gb: float = 0.0,
    lineage: str = "",
) -> None:
    """Call `run(section, **inputs, work, checkpoints)` and publish what it made beside `output`, the manifest.

    `run` writes `model/` or `data/` into the folder `work` and returns its metrics. Inputs are verified against
    their manifests first. Everything appears by rename, the manifest last; checkpoints go when it has appeared.
    What was made before from the same settings, inputs and code is taken from there, where `keep_gb` is not 0.
    planned: fingerprint of the code with which the run was planned. Raises UserError when it was edited since.
    lineage: digest of what the artifact descends from, by the plan.
    """
    for role, manifest in inputs.items():
        # What fetch brought lies in the shared cache; `hub` checks it where it is used.
        if role != "fetched" and isinstance(manifest, Path):
            verify_input(manifest)
    home = output.parent
    refuse_strangers(output)
    planned = planned or accepted.standing(stage)
    if planned.partition("+")[0] != accepted.standing(stage):
        raise UserError(f"{stage}: its code was edited after this run was planned; run snakemake again")
    slice = slice_of(section)
    read = digests(inputs | {"files": local_files(stage, section)})
    name = identity(stage, slice, planned, read)
    if os.environ.get("WANDB_MODE", "disabled") == "offline":
        tracking.describe(home.absolute().parts[-2], stage, name)
    work, checkpoints = home / f".making-{name}", home / "checkpoints" / name
    made_from = {"stage": stage, "params": [canonical(slice), planned, lineage], "inputs": read}
    if os.environ.get("RANK", "0") != "0":  # the first of several processes writes for all
        if needed():
            with tempfile.TemporaryDirectory() as unused:
                run(section, **inputs, work=Path(unused), checkpoints=checkpoints)
        return
    with interruption.alone(home / f".lock-{name}") as waited:
        if waited and is_made(name, output):
            needed(False)
            return say("made by the process that was waited for")
        shutil.rmtree(work, ignore_errors=True)
        if needed(not (keep_gb and taken(name, work, made_from))):
            make_anew(name, run, section, inputs, work, checkpoints, made_from)
        parts = publish(work, home)
        shutil.rmtree(checkpoints, ignore_errors=True)
        if keep_gb:
            kept.keep(name, home, parts, keep_gb)


def needed(found: bool = False) -> bool:
    """Whether there is something to run, as the first of several processes found. Each looking for itself, one could
    see what another is writing, and not come where it is waited for."""
    if "RANK" not in os.environ:
        return found
    from posttrain.training import parallel

    return parallel.largest(float(found), parallel.device()) > 0


def taken(name: str, work: Path, made_from: dict) -> bool:
    """Fill the folder `work` with an earlier artifact of the same identity, whose inputs lay elsewhere; whether there
    was one."""
    if (record := kept.take(name, _versions(), work)) is None:
        return False
    say(f"made before from the same settings, inputs and code ({name}): taken from there")
    write_json(work / "provenance.json", record | made_from)
    return True


def is_made(name: str, output: Path) -> bool:
    """Whether the whole artifact of an identity lies here."""
    try:
        verify(output)
        return read_json(output.parent / "provenance.json").get("identity") == name
    except UserError:
        return False


def make_anew(name: str, run: Callable, section, inputs: dict, work: Path, checkpoints: Path, made_from: dict) -> None:
    """Fill the folder `work`: what `run` makes, its metrics, its settings, its manifest and its record."""
    work.mkdir(parents=True)
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic() - spent(checkpoints)
    asked: set[str] = set()
    with failure.remembered(checkpoints):
        metrics = run(audit.Watched(section, asked), **inputs, work=work, checkpoints=checkpoints)
    write_json(work / "metrics.json", metrics)
    card.write_published(work / "model", made_from["stage"], slice_of(section), inputs, metrics)
    (work / "config.yaml").write_text(made_from["params"][0] + "\n", encoding="utf-8")
    parts = sorted(part.name for part in work.iterdir() if not part.name.startswith("."))
    write_json(work / "manifest.json", manifest_of(work, [part for part in parts if part not in BESIDE]))
    record, shape = provenance(name, started, time.monotonic() - clock), shape_of(section)
    record |= made_from | {"shape": shape, "disk_mb": disk_of(work, checkpoints)} | accepted.of_code(made_from["stage"])
    record["unread"] = audit.unread(slice_of(section), asked)
    if said := kept.differs(name, shape, sha256(work / "manifest.json")):
        say(f"warning: {said}")
        record["warning"] = said
    write_json(work / "provenance.json", record)


def disk_of(*folders: Path) -> float:
    """MB (10^6 bytes) of all files below some folders: an artifact, and the checkpoints that are still beside it."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)


def verify_input(manifest: Path) -> None:
    """Verify an artifact that is to be built on. A damaged one loses its manifest, so that it is made anew.

    Raises UserError that names every damaged file.
    """
    try:
        verify(manifest)
    except UserError as error:
        if not manifest.is_file():
            raise
        manifest.replace(manifest.with_name(DAMAGED))
        found = [problem for problem in error.problems if not problem.startswith("remake it")]
        raise UserError(*found, f"{manifest.parent}: run snakemake again, which makes it anew") from None


def digests(inputs: dict[str, Path | list[Path]]) -> dict[str, dict[str, str]]:
    """Role -> file -> sha256, of all that a stage reads."""
    read = {role: flat({role: files}) for role, files in inputs.items()}
    return {role: {str(file): sha256(file) for file in files} for role, files in read.items() if files}


def local_files(stage: str, section) -> list[Path]:
    """Files of the user's own that a stage reads: a part of what it is. It says itself which of them are gone."""
    named = [file for _, file in own_files(stage, section)] if stage in ("prepare", "base") else []
    return [file for file in named if file.is_file()]


def shape_of(section) -> dict:
    """What may change the last bits of a result without being part of its identity."""
    shape = {"machine": platform.machine(), "processes": int(os.environ.get("WORLD_SIZE", "1"))} | parts_of(section)
    if torch := sys.modules.get("torch"):
        shape |= {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
        shape["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return shape | {"versions": _versions()}


def parts_of(section) -> dict[str, int]:
    """How the global batch of a stage that trains was gone through by its first process."""
    section = getattr(section, "scratch", section)
    if isinstance(section, Ppo):
        from posttrain.rl.batches import micro_batches, minibatches

        parts = micro_batches(section, minibatches(section, range(section.batch_size))[0])
        return {"micro_batch": len(parts[0]), "accumulation": len(parts)}
    if isinstance(section, Training):
        from posttrain.training import parallel

        fits = parallel.at_once(section, section.batch_size)
        micro, accumulation = parallel.split(section.batch_size, fits, parallel.world())
        return {"micro_batch": micro, "accumulation": accumulation} | ({"sharded": True} if parallel.sharded else {})
    return {}


def refuse_strangers(output: Path) -> None:
    """Raise UserError for another name than manifest.json, and for folders beside it that no stage left there:
    publishing would replace them."""
    if output.name != "manifest.json":
        raise UserError(f"--output {output}: must be called manifest.json, in the folder for the artifact")
    ours = any(any(output.parent.glob(sign)) for sign in ("manifest.json", "provenance.json", ".making-*"))
    for folder in (output.parent / part for part in ("data", "model", "snapshots")):
        if folder.exists() and not ours:
            raise UserError(f"--output {output}: {folder} is no artifact's and would be replaced; name another folder")


def publish(work: Path, home: Path) -> list[str]:
    """Move what was made into place, the manifest last, with permissions that a group can read; returns its names."""
    for file in work.rglob("*"):
        if file.stat().st_mode & 0o044 != 0o044:  # safetensors writes files that only their owner can read
            file.chmod(0o755 if file.is_dir() else 0o644)
    parts = sorted(part.name for part in work.iterdir() if not part.name.startswith("."))
    for part in sorted(parts, key="manifest.json".__eq__):
        target = home / part
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(work / part, target)
    shutil.rmtree(work)
    (home / DAMAGED).unlink(missing_ok=True)
    return parts


def provenance(name: str, started: datetime.datetime, seconds: float) -> dict:
    """What is true of this run only: when, where, with which versions and at what cost."""
    return {
        "identity": name,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(os.times()[:2]), 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_gpu_memory_mb": peak_gpu_memory(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "command": ["posttrain", *sys.argv[1:]],
    }


def peak_gpu_memory() -> int | None:
    """MB (2^20 bytes) that PyTorch had in use at most on its GPU; None without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**20)


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _git_commit() -> str:
    """The commit of the code that ran, with `+changes` when the tree differs from it."""
    here = Path(__file__).parent
    run = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes"], cwd=here, capture_output=True, text=True
    )
    return run.stdout.strip() if run.returncode == 0 else "unknown"

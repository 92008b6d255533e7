"""Run a stage and publish its artifact, complete or not at all, with a manifest and a provenance record."""

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
from posttrain.ground.files import manifest_of, read_json, sha256, verify, write_json
from posttrain.ground.identity import DAMAGED, canonical, identity
from posttrain.ground.progress import say, spent
from posttrain.jobs import audit, failure, kept
from posttrain.reporting import card
from posttrain.training import interruption, tracking

# Files that the manifest does not list: they have times, hosts and settings, which may differ between equal artifacts.
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
    """Run a stage and publish its artifact in the folder of `output`, the manifest.

    run(section, **inputs, work, checkpoints) writes `model/` or `data/` into the folder `work` and returns metrics.
    The inputs are verified first. Files are published by rename, the manifest last; then the checkpoints are deleted.
    Where `keep_gb` is not 0, a kept artifact of the same identity is used instead of running the stage.
    planned: fingerprint of the code at planning. lineage: digest of everything upstream, by the plan.
    Raises UserError for a damaged input, and for code that was edited after planning.
    """
    verify_inputs(inputs)
    home = output.parent
    refuse_foreign_folders(output)
    planned = planned_with(stage, planned)
    slice, read = slice_of(section), digests(inputs | {"files": local_files(stage, section)})
    name = identity(stage, slice, planned, read)
    if os.environ.get("WANDB_MODE", "disabled") == "offline":
        tracking.describe(home.absolute().parts[-2], stage, name)
    work, checkpoints = home / f".making-{name}", home / "checkpoints" / name
    made_from = {"stage": stage, "params": [canonical(slice), planned, lineage], "inputs": read}
    if os.environ.get("RANK", "0") != "0":  # the first of several processes writes for all
        return run_beside(run, section, inputs, checkpoints)
    with interruption.alone(home / f".lock-{name}") as waited:
        if waited and is_made(name, output):
            rank_0_decides(False)
            return say("another process has made it meanwhile")
        shutil.rmtree(work, ignore_errors=True)
        if rank_0_decides(not (keep_gb and take_kept(name, work, made_from))):
            make_anew(name, run, section, inputs, work, checkpoints, made_from)
        parts = publish(work, home)
        shutil.rmtree(checkpoints, ignore_errors=True)
        if keep_gb:
            kept.keep(name, home, parts, keep_gb)


def verify_inputs(inputs: dict[str, Path | list[Path]]) -> None:
    """Compare the inputs with their manifests; fetched ones are in the shared cache and checked by `hub` when used."""
    for role, manifest in inputs.items():
        if role != "fetched" and isinstance(manifest, Path):
            verify_input(manifest)


def planned_with(stage: str, planned: str | None) -> str:
    """The fingerprint of the code that a run was planned with; without one, that of the present code.

    Raises UserError where the code was edited after planning.
    """
    standing = accepted.standing(stage)
    if planned and planned.partition("+")[0] != standing:
        raise UserError(f"{stage}: its code was edited after this run was planned; run snakemake again")
    return planned or standing


def run_beside(run: Callable, section, inputs: dict, checkpoints: Path) -> None:
    """Run a stage in a process other than rank 0, which writes no artifact, if rank 0 runs it too."""
    if rank_0_decides():
        with tempfile.TemporaryDirectory() as unused:
            run(section, **inputs, work=Path(unused), checkpoints=checkpoints)


def rank_0_decides(decision: bool = False) -> bool:
    """The decision of rank 0 in every process, so that no process skips a collective call for which the others wait."""
    if "RANK" not in os.environ:
        return decision
    from posttrain.training import parallel

    return parallel.largest(float(decision), parallel.device()) > 0


def take_kept(name: str, work: Path, made_from: dict) -> bool:
    """Fill the folder `work` with a kept artifact of this identity, and record the present paths of its inputs.

    Returns whether there was one.
    """
    if (record := kept.take(name, _versions(), work)) is None:
        return False
    say(f"reusing an earlier artifact of the same settings, inputs and code ({name})")
    write_json(work / "provenance.json", record | made_from)
    return True


def is_made(name: str, output: Path) -> bool:
    """Whether the artifact of an identity is complete at `output`, its manifest."""
    try:
        verify(output)
        return read_json(output.parent / "provenance.json").get("identity") == name
    except UserError:
        return False


def make_anew(name: str, run: Callable, section, inputs: dict, work: Path, checkpoints: Path, made_from: dict) -> None:
    """Run the stage, and write its output, metrics, settings, manifest and provenance into the folder `work`."""
    work.mkdir(parents=True)
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic() - spent(checkpoints)
    keys_read: set[str] = set()
    with failure.remembered(checkpoints):
        metrics = run(audit.Watched(section, keys_read), **inputs, work=work, checkpoints=checkpoints)
    write_json(work / "metrics.json", metrics)
    card.write_published(work / "model", made_from["stage"], slice_of(section), inputs, metrics)
    (work / "config.yaml").write_text(made_from["params"][0] + "\n", encoding="utf-8")
    parts = sorted(part.name for part in work.iterdir() if not part.name.startswith("."))
    write_json(work / "manifest.json", manifest_of(work, [part for part in parts if part not in BESIDE]))
    record, shape = provenance(name, started, time.monotonic() - clock), shape_of(section)
    record |= made_from | {"shape": shape, "disk_mb": disk_of(work, checkpoints)} | accepted.of_code(made_from["stage"])
    record["unread"] = audit.unread(slice_of(section), keys_read)
    if warning := kept.differs(name, shape, sha256(work / "manifest.json")):
        say(f"warning: {warning}")
        record["warning"] = warning
    write_json(work / "provenance.json", record)


def disk_of(*folders: Path) -> float:
    """MB (10^6 bytes) of all files below some folders."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)


def verify_input(manifest: Path) -> None:
    """Compare an artifact with its manifest. The manifest of a damaged one is renamed, so that Snakemake remakes it.

    Raises UserError naming every damaged file.
    """
    try:
        verify(manifest)
    except UserError as error:
        if not manifest.is_file():
            raise
        manifest.replace(manifest.with_name(DAMAGED))
        damages = [problem for problem in error.problems if not problem.startswith("remake it")]
        raise UserError(*damages, f"{manifest.parent}: run snakemake again, which remakes it") from None


def digests(inputs: dict[str, Path | list[Path]]) -> dict[str, dict[str, str]]:
    """Role -> file -> sha256, of all files that a stage reads."""
    by_role = {role: flat({role: files}) for role, files in inputs.items()}
    return {role: {str(file): sha256(file) for file in files} for role, files in by_role.items() if files}


def local_files(stage: str, section) -> list[Path]:
    """The user's own existing files that a stage reads. The stage itself reports missing ones."""
    files = [file for _, file in own_files(stage, section)] if stage in ("prepare", "base") else []
    return [file for file in files if file.is_file()]


def shape_of(section) -> dict:
    """Hardware, parallelism and versions, which may change the last bits of a result and are not in its identity."""
    shape = {"machine": platform.machine(), "processes": int(os.environ.get("WORLD_SIZE", "1"))} | parts_of(section)
    if torch := sys.modules.get("torch"):
        shape |= {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
        shape["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return shape | {"versions": _versions()}


def parts_of(section) -> dict[str, int]:
    """Micro-batch and accumulation of rank 0, for a stage that trains; {} for others."""
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


def refuse_foreign_folders(output: Path) -> None:
    """Raise UserError unless `output` is a manifest.json and publishing replaces no folder of the user's."""
    if output.name != "manifest.json":
        raise UserError(f"--output {output}: must be called manifest.json, in the folder for the artifact")
    ours = any(any(output.parent.glob(sign)) for sign in ("manifest.json", "provenance.json", ".making-*"))
    for folder in (output.parent / part for part in ("data", "model", "snapshots")):
        if folder.exists() and not ours:
            raise UserError(f"--output {output}: {folder} is no artifact and would be replaced; name another folder")


def publish(work: Path, home: Path) -> list[str]:
    """Move the contents of `work` to `home`, the manifest last, readable by the group. Returns the names."""
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
    """Time, place and cost of a run."""
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
    """Peak of PyTorch's GPU memory, in MB (2^20 bytes); None without a GPU."""
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
    """The commit of the code, with `+changes` where the working tree differs from it."""
    here = Path(__file__).parent
    run = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes"], cwd=here, capture_output=True, text=True
    )
    return run.stdout.strip() if run.returncode == 0 else "unknown"

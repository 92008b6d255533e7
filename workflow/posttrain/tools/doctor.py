"""What is missing on this cluster before anything is submitted, each with what to do.

posttrain doctor [CAMPAIGN]
"""

import json
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from posttrain.cluster import sites
from posttrain.cluster.sites import FILE, Site
from posttrain.dag.plan import LOCK, Plan
from posttrain.ground.errors import UserError
from posttrain.jobs import attempt, slurm
from posttrain.tools import why

PROBE = """
import importlib.metadata, json, sys
import torch, transformers, trl, peft, bitsandbytes, datasets, lm_eval, posttrain
names = ["torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "lm_eval"]
print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in names},
                  "gpus": torch.cuda.device_count(), "python": sys.executable}))
"""


def doctor(plan: Plan) -> tuple[list[str], bool]:
    """A line for each check, and whether all of them hold. A check that needs another waits for it."""
    lines: list[str] = []
    try:
        site = sites.limited(sites.site())
    except UserError as error:
        return [f"MISSING  site: {problem}" for problem in error.problems], False
    sites.expect_device(site)
    lines.append(f"ok       site: {FILE if FILE.is_file() else f'no {FILE}: the default partition and account'}")
    for check in (reachable, interruptions, partition, room, environment):
        lines += (said := check(site, plan))
        if check in (reachable, partition) and said[0].startswith("MISSING"):
            lines.append("         what depends on it was not looked at")
            break
    lines += scratch(site, plan) + fetched(site, plan)
    return lines, not any(line.startswith("MISSING") for line in lines)


def ok(what: str, said: str) -> list[str]:
    """A check that holds."""
    return [f"ok       {what}: {said}"]


def missing(what: str, said: str, todo: str) -> list[str]:
    """A check that does not hold, and what to do."""
    return [f"MISSING  {what}: {said}", f"         -> {todo}"]


def reachable(site: Site, plan: Plan) -> list[str]:
    """SLURM's commands are here and its controller answers."""
    absent = [name for name in ("sbatch", "squeue", "scontrol", "sinfo", "srun") if not shutil.which(name)]
    if absent:
        return missing("SLURM", f"no {', '.join(absent)} on PATH", "log in to the cluster, or load its module of SLURM")
    version = slurm.ask("sinfo", "--version", seconds=10)
    if version is None or slurm.ask("sinfo", "-h", seconds=10) is None:
        return missing("SLURM", "its controller does not answer", "try `sinfo`; ask the site's administrators")
    return ok("SLURM", version.strip())


def interruptions(site: Site, plan: Plan) -> list[str]:
    """What a job has to save, and for how long the controller remembers one that has ended."""
    fields = slurm.configured()
    age, accounts = slurm.remembered(fields)
    memory = "jobs that ended are never forgotten" if age > 10**6 else f"ended jobs are remembered for {age} s"
    after = "" if accounts or age > 10**6 else ", and by their files after that"
    return ok("interruptions", f"a stage has {fields.get('KillWait', '30 sec')} to save after SIGTERM; {memory}{after}")


def partition(site: Site, plan: Plan) -> list[str]:
    """The partition is there and up, and has the type of GPU."""
    said = (slurm.ask("sinfo", "-h", "-o", "%P|%a|%G") or "").split()
    there = {line.split("|")[0].rstrip("*"): line.split("|")[1] for line in said}
    default = [line.split("|")[0].rstrip("*") for line in said if "*" in line.split("|")[0]]
    name = site.partition or next(iter(default), None)
    names = (name or "").split(",")
    known = ", ".join(sorted(there)) or "none"
    if name is None:
        return missing("partition", "none is the default", f"set partition in {FILE}: {known}")
    for one in names:
        if one not in there:
            return missing("partition", f"there is no {one}", f"set partition in {FILE} to one of: {known}")
        if there[one] != "up":
            return missing("partition", f"{one} is {there[one]}", f"wait, or choose another of: {known}")
    types = {line.split("|")[2] for line in said if line.split("|")[0].rstrip("*") in names}
    found = sorted({part.split(":")[1] for text in types for part in text.split(",") if part.count(":") >= 2})
    if site.cpu_only:
        return ok("partition", f"{name}, without GPUs")
    if site.gpu_type and site.gpu_type not in found:
        todo = f"set gpu_type in {FILE} to one of: {', '.join(found) or 'none is there'}"
        return missing("GPU type", f"{name} has no {site.gpu_type}", todo)
    if not any("gpu" in text for text in types):
        return missing(
            "GPUs", f"{name} has none", f"choose another partition in {FILE} ({known}), or set cpu_only: true"
        )
    return ok("partition", f"{name}, GPUs: {', '.join(found) or 'of no named type'}")


def room(site: Site, plan: Plan) -> list[str]:
    """SLURM itself says whether it could run the largest of the jobs."""
    asked = {folder: wanted(site, plan, folder) for folder in to_submit(plan)}
    if not asked:
        return ok("jobs", "nothing is to be made")
    lines, limit = [], slurm.longest(site.partition)
    for stage in dict.fromkeys(folder.split("/")[2] for folder in asked):
        most = {key: max(need[key] for at, need in asked.items() if at.split("/")[2] == stage)
                for key in ("gpu", "mem_mb", "runtime")}  # fmt: skip
        several = sites.spread(site).get(stage, {})
        nodes, cores = several.get("nodes", 1), several.get("cpus_per_task", 1)
        call = ["sbatch", "--test-only", *options(site), f"--nodes={nodes}", f"--cpus-per-task={cores}"]
        call += [f"--mem={most['mem_mb']}", f"--time={most['runtime']}"]
        call += [f"--gpus={site.gpu_type + ':' if site.gpu_type else ''}{most['gpu']}"] if most["gpu"] else []
        run = subprocess.run([*call, "--wrap", "true"], capture_output=True, text=True)
        where = f" on {nodes} nodes" if nodes > 1 else ""
        what = f"{stage} ({most['mem_mb']} MB, {most['runtime']} min, {most['gpu']} GPU{where})"
        if 0 < limit < most["runtime"]:  # which would wait for ever
            lines += missing(
                what, f"the partition lets a job run {limit} min", f"lower stages.{stage}.runtime in {FILE}"
            )
        elif run.returncode:
            reason = run.stderr.strip().splitlines()[-1].removeprefix("allocation failure: ")
            keys = [*given(site, "account", "qos", "constraint"), f"stages.{stage}"]
            todo = f"set {', '.join(keys)} in {FILE}; `sinfo -o '%P %l %m %G %f'` shows what there is"
            lines += missing(what, reason, todo)
        else:
            lines += ok(what, "would be accepted")
    return lines


def given(site: Site, *keys: str) -> list[str]:
    """Those of the keys that the site's file sets."""
    return [key for key in keys if getattr(site, key)]


def options(site: Site) -> list[str]:
    """The site's own options of sbatch and srun."""
    named = {"partition": site.partition, "account": site.account, "qos": site.qos, "constraint": site.constraint}
    return [f"--{name}={value}" for name, value in named.items() if value]


def to_submit(plan: Plan) -> list[str]:
    """The folders of all that would be made by jobs."""
    return [folder for folder in why.to_run(why.survey(plan)) if folder != "results/report"]


def wanted(site: Site, plan: Plan, folder: str) -> dict[str, int]:
    """What an artifact's job asks for."""
    _, experiment, stage, policy = [*folder.split("/"), ""][:4]
    return sites.request(site, plan, experiment, stage, policy)


def scratch(site: Site, plan: Plan) -> list[str]:
    """Where results and checkpoints lie can be written, and is large enough."""
    lines = []
    need = sum(wanted(site, plan, folder)["disk_mb"] for folder in to_submit(plan))
    for what, folder in {
        "results": Path("results"),
        **({"scratch": attempt.scratch(site.scratch)} if site.scratch else {}),
    }.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder):
                pass
        except OSError as error:
            todo = f"set scratch in {FILE}" if what == "scratch" else "work in a folder of your own"
            lines += missing(what, f"{folder}: {error.strerror}", todo)
            continue
        free = shutil.disk_usage(folder).free / 1e6
        said = f"{folder}: {free:.0f} MB are free, {need} are needed"
        lines += ok(what, said) if free >= need else missing(what, said, "make room: posttrain clean")
    return lines


def fetched(site: Site, plan: Plan) -> list[str]:
    """Models and data from the hub are here, and files of the user's own."""
    items, files = set(), set()
    for name in plan.names:
        for stage, _ in plan.made(name):
            items.update(plan.fetched(name, stage))
            files.update(plan.local_files(name, stage))
    absent = sorted(file for file in items if not Path(file).is_file())
    gone = sorted(file for file in files if not Path(file).exists())
    lines = []
    if gone:
        lines += missing("files", ", ".join(gone), "put them there, or change the config")
    if absent:
        lines += missing(
            "models and data", f"not fetched: {', '.join(absent)}", f"snakemake {absent[0]} --cores 1, here"
        )
    return lines or ok("models and data", f"{len(items)} from the hub and {len(files)} files are here")


def environment(site: Site, plan: Plan) -> list[str]:
    """On a compute node: this folder, the pinned packages, a GPU."""
    gpus = 0 if site.cpu_only else 1
    call = ["srun", *options(site), "--time=5", "--mem=2000", "--ntasks=1", *([f"--gpus={gpus}"] if gpus else [])]
    inside = attempt.python(site.container, site.scratch)
    with tempfile.NamedTemporaryFile("w", suffix=".py", dir=".", prefix=".doctor-") as probe:
        probe.write(PROBE)
        probe.flush()
        script = f"{sites.prefix(site)}exec {shlex.join([*inside, probe.name])}"
        try:
            run = subprocess.run([*call, "bash", "-c", script], capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return missing("compute node", "no job of 5 minutes began in 300 s", "the queue is full: try again later")
    if run.returncode:
        said = " | ".join(run.stderr.strip().splitlines()[-3:]) or "nothing was said"
        keys = " and ".join(given(site, "modules", "container"))
        todo = "this folder and its .venv must be seen by every node (make setup here)"
        todo += f"; {keys} in {FILE} must be what they have" if keys else ", or set container"
        return missing("compute node", said, todo)
    found = json.loads(run.stdout.strip().splitlines()[-1])
    other = other_versions(found["versions"])
    if other:
        return missing("compute node", f"other versions than the pins: {', '.join(other)}", "make setup")
    if gpus and not found["gpus"]:
        return missing("compute node", "torch sees no GPU", "a torch with CUDA for this driver, or cpu_only: true")
    return ok("compute node", f"{found['python']}, all pins, {found['gpus']} GPU seen")


def other_versions(found: dict[str, str]) -> list[str]:
    """Packages of another version than `envs/requirements.txt` says."""
    pins = dict(line.strip().split("==") for line in LOCK.read_text().splitlines() if line.count("==") == 1)
    named = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    return [
        f"{name} {version} for {pin}"
        for name, version in found.items()
        if (pin := named.get(name.replace("_", "-"))) and version.partition("+")[0] != pin.partition("+")[0]
    ]

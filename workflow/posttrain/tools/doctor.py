"""Check a cluster before jobs are submitted, with what to do about each failed check.

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
from posttrain.dag.parameters import LOCK
from posttrain.dag.plan import Plan
from posttrain.ground import credentials
from posttrain.ground.errors import UserError
from posttrain.jobs import launch, slurm
from posttrain.tools import why

PROBE = """
import importlib.metadata, json, sys
from pathlib import Path
import torch, transformers, trl, peft, bitsandbytes, datasets, lm_eval, posttrain.ground.code
names = ["torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "lm_eval"]
print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in names},
                  "gpus": torch.cuda.device_count(), "python": sys.executable,
                  "other_package": posttrain.ground.code.other_package(Path("workflow"))}))
"""
FAILED = "MISSING"


def doctor(plan: Plan) -> int:
    """Print the lines of all checks; returns exit code 1 where one fails."""
    credentials.taken()  # the probe on a compute node needs no tokens
    lines = checks(plan)
    print("\n".join(lines))
    return int(any(line.startswith(FAILED) for line in lines))


def checks(plan: Plan) -> list[str]:
    """The lines of all checks. Checks that depend on a failed one are skipped."""
    try:
        site = sites.limited(sites.read())
    except UserError as error:
        return [f"{FAILED}  site: {problem}" for problem in error.problems]
    sites.expect_device(site)
    lines = ok("site", str(FILE) if FILE.is_file() else f"no {FILE}: the default partition and account")
    for check in (controller, interruptions, partition, jobs, environment):
        lines += (result := check(site, plan))
        if check in (controller, partition) and result[0].startswith(FAILED):
            lines.append("         checks that depend on it were skipped")
            break
    return lines + disk(site, plan) + fetched(site, plan)


def ok(what: str, finding: str) -> list[str]:
    """The line of a passed check."""
    return [f"ok       {what}: {finding}"]


def missing(what: str, finding: str, todo: str) -> list[str]:
    """The lines of a failed check: what was found, and what to do."""
    return [f"{FAILED}  {what}: {finding}", f"         -> {todo}"]


def controller(site: Site, plan: Plan) -> list[str]:
    """Check that SLURM's commands exist and its controller answers."""
    if absent := slurm.absent():
        return missing("SLURM", f"no {', '.join(absent)} on PATH", slurm.TODO)
    version = slurm.ask("sinfo", "--version", seconds=10)
    if version is None or slurm.ask("sinfo", "-h", seconds=10) is None:
        return missing("SLURM", "its controller does not answer", "try `sinfo`; ask the site's administrators")
    return ok("SLURM", version.strip())


def interruptions(site: Site, plan: Plan) -> list[str]:
    """Report how long a stopped job may save, and how long the controller remembers an ended job."""
    fields = slurm.configuration()
    age, accounts = slurm.retention(fields)
    memory = "jobs that ended are never forgotten" if age > 10**6 else f"ended jobs are remembered for {age} s"
    after = "" if accounts or age > 10**6 else ", and by their files after that"
    return ok("interruptions", f"a stage has {fields.get('KillWait', '30 sec')} to save after SIGTERM; {memory}{after}")


def partition(site: Site, plan: Plan) -> list[str]:
    """Check that the partition exists, is up, and has the type of GPU."""
    lines = [line.split("|") for line in (slurm.ask("sinfo", "-h", "-o", "%P|%a|%G") or "").split()]
    states = {name.rstrip("*"): state for name, state, _ in lines}
    listed = ", ".join(sorted(states)) or "none"
    name = site.partition or next((name.rstrip("*") for name, _, _ in lines if "*" in name), None)
    if name is None:
        return missing("partition", "none is the default", f"set partition in {FILE}: {listed}")
    names = name.split(",")
    for one in names:
        if one not in states:
            return missing("partition", f"there is no {one}", f"set partition in {FILE} to one of: {listed}")
        if states[one] != "up":
            return missing("partition", f"{one} is {states[one]}", f"wait, or choose another of: {listed}")
    if site.cpu_only:
        return ok("partition", f"{name}, without GPUs")
    resources = {gres for of, _, gres in lines if of.rstrip("*") in names}
    types = sorted({part.split(":")[1] for gres in resources for part in gres.split(",") if part.count(":") >= 2})
    if site.gpu_type and site.gpu_type not in types:
        todo = f"set gpu_type in {FILE} to one of: {', '.join(types) or 'none is there'}"
        return missing("GPU type", f"{name} has no {site.gpu_type}", todo)
    if not any("gpu" in gres for gres in resources):
        todo = f"choose another partition in {FILE} ({listed}), or set cpu_only: true"
        return missing("GPUs", f"{name} has none", todo)
    return ok("partition", f"{name}, GPUs: {', '.join(types) or 'of no named type'}")


def jobs(site: Site, plan: Plan) -> list[str]:
    """Check that SLURM accepts the largest job of each stage."""
    needs = [(artifact.stage, sites.request(site, plan, artifact)) for artifact in why.to_make(plan)]
    if not needs:
        return ok("jobs", "nothing is to be made")
    lines = []
    for stage in dict.fromkeys(stage for stage, _ in needs):
        of_stage = [need for name, need in needs if name == stage]
        lines += job(site, stage, {key: max(need[key] for need in of_stage) for key in ("gpu", "mem_mb", "runtime")})
    return lines


def job(site: Site, stage: str, need: dict[str, int]) -> list[str]:
    """Check that SLURM accepts a job. need: `gpu`, `mem_mb`, `runtime` in minutes."""
    spread, limit = sites.stage_resources(site).get(stage, {}), slurm.time_limit(site.partition)
    nodes, cores = int(spread.get("nodes", 1)), spread.get("cpus_per_task", 1)
    what = f"{stage} ({need['mem_mb']} MB, {need['runtime']} min, {need['gpu']} GPU"
    what += f" on {nodes} nodes)" if nodes > 1 else ")"
    if 0 < limit < need["runtime"]:  # SLURM would accept such a job and never start it
        todo = f"lower stages.{stage}.runtime in {FILE}"
        return missing(what, f"the partition lets a job run {limit} min", todo)
    call = ["sbatch", "--test-only", *options(site), f"--nodes={nodes}", f"--cpus-per-task={cores}"]
    call += [f"--mem={need['mem_mb']}", f"--time={need['runtime']}"]
    call += [f"--gpus={site.gpus(need['gpu'])}"] if need["gpu"] else []
    run = subprocess.run([*call, "--wrap", "true"], capture_output=True, text=True)
    if run.returncode:
        reason = run.stderr.strip().splitlines()[-1].removeprefix("allocation failure: ")
        keys = [*keys_set(site, "account", "qos", "constraint"), f"stages.{stage}"]
        todo = f"set {', '.join(keys)} in {FILE}; `sinfo -o '%P %l %m %G %f'` shows what there is"
        return missing(what, reason, todo)
    return ok(what, "would be accepted")


def keys_set(site: Site, *keys: str) -> list[str]:
    """Those of the keys that the site's file sets."""
    return [key for key in keys if getattr(site, key)]


def options(site: Site) -> list[str]:
    """The site's own options of sbatch and srun."""
    return [f"--{key}={getattr(site, key)}" for key in keys_set(site, "partition", "account", "qos", "constraint")]


def disk(site: Site, plan: Plan) -> list[str]:
    """Check that the folders of results and checkpoints can be written and have space."""
    lines, folders = [], {"results": Path("results")}
    if scratch := launch.scratch(site.scratch):
        folders["scratch"] = scratch
    need = sum(sites.request(site, plan, artifact)["disk_mb"] for artifact in why.to_make(plan))
    for what, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder):
                pass
        except OSError as error:
            todo = f"set scratch in {FILE}" if what == "scratch" else "work in a folder of your own"
            lines += missing(what, f"{folder}: {error.strerror}", todo)
            continue
        free = shutil.disk_usage(folder).free / 1e6
        finding = f"{folder}: {free:.0f} MB are free, {need} are needed"
        lines += ok(what, finding) if free >= need else missing(what, finding, "make room: posttrain clean")
    return lines


def fetched(site: Site, plan: Plan) -> list[str]:
    """Check that models and data from the hub were fetched, and that the user's own files exist."""
    manifests, files = set(), set()
    for name in plan.names:
        for stage, _ in plan.made(name):
            manifests.update(plan.fetched(name, stage))
            files.update(plan.local_files(name, stage))
    absent = sorted(file for file in manifests if not Path(file).is_file())
    gone = sorted(file for file in files if not Path(file).exists())
    lines = missing("files", ", ".join(gone), "put them there, or change the config") if gone else []
    if absent:
        todo = f"snakemake {absent[0]} --cores 1, here"
        lines += missing("models and data", f"not fetched: {', '.join(absent)}", todo)
    return lines or ok("models and data", f"{len(manifests)} from the hub and {len(files)} files are here")


def environment(site: Site, plan: Plan) -> list[str]:
    """Check that a compute node sees this folder, the pinned packages and a GPU."""
    gpus = [] if site.cpu_only else ["--gpus=1"]
    call = ["srun", *options(site), "--time=5", "--mem=2000", "--ntasks=1", *gpus]
    with tempfile.TemporaryDirectory(dir=".", prefix=".doctor-") as folder:
        probe, answer = Path(folder, "probe.py"), Path(folder, "answer.json")
        probe.write_text(PROBE)
        python = shlex.join([*launch.python(site.container, site.scratch), str(probe)])
        # The answer comes in a file: srun on a busy machine may exit with 0 and lose what its job printed.
        script = f"{sites.shell_prefix(site)}exec {python} >{shlex.quote(str(answer))}"
        try:
            run = subprocess.run([*call, "bash", "-c", script], capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return missing("compute node", "no job of 5 minutes began in 300 s", "the queue is full: try again later")
        lines = answer.read_text().strip().splitlines() if answer.is_file() else []
    if run.returncode or not lines:
        finding = " | ".join(run.stderr.strip().splitlines()[-3:]) or "no output"
        keys = " and ".join(keys_set(site, "modules", "container"))
        todo = "this folder and its .venv must be seen by every node (make setup here)"
        todo += f"; {keys} in {FILE} must be what they have" if keys else ", or set container"
        return missing("compute node", finding, todo)
    probed = json.loads(lines[-1])
    if other_package := probed["other_package"]:
        return missing("compute node", *other_package)
    if other := other_versions(probed["versions"]):
        return missing("compute node", f"other versions than the pins: {', '.join(other)}", "make setup")
    if gpus and not probed["gpus"]:
        return missing("compute node", "torch sees no GPU", "a torch with CUDA for this driver, or cpu_only: true")
    return ok("compute node", f"{probed['python']}, all pins, {probed['gpus']} GPU seen")


def other_versions(installed: dict[str, str]) -> list[str]:
    """Packages in another version than `envs/requirements.txt` pins. installed: package -> version."""
    pins = dict(line.strip().split("==") for line in LOCK.read_text().splitlines() if line.count("==") == 1)
    pinned = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    return [
        f"{name} {version} for {pin}"
        for name, version in installed.items()
        if (pin := pinned.get(name.replace("_", "-"))) and version.partition("+")[0] != pin.partition("+")[0]
    ]

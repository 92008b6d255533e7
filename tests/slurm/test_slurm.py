"""`snakemake --profile slurm` on a real cluster: a local run's bytes, through everything that goes wrong on one."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster
import pytest
from project import copy_of, environment

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
NODES = 6  # of one pretend GPU each: a job has its node for itself
AWAY = 15  # seconds without SLURM's controller, in which Snakemake asks for its jobs
SECRET = "hf_a_secret_of_this_test"
POLICIES = ("calm", "hungry", "preempted", "died", "cancelled")
TARGETS = [
    *(f"results/{name}/sft/manifest.json" for name in POLICIES),
    "results/calm/dpo/manifest.json",
    "results/limited/ppo/manifest.json",
]
SITE = "jobs: 20\nstages: {sft: {mem_mb: 1100, runtime: 9}, ppo: {mem_mb: 1100, runtime: 2}}\n"
# Planned, and nothing submitted, until a file is gone: a submission is a fraction of a second later.
HELD = 'onstart:\n    shell("touch planned; while [ -e held ]; do sleep 0.1; done")\n'
WATCH = """
import os, sys
def seen(event, values):
    if event == "socket.connect" and isinstance(values[1], tuple):
        with open(os.environ["TEST_CONNECTIONS"], "a") as file:
            file.write(f"{sys.argv} {values[1]}\\n")
sys.addaudithook(seen)
"""


def mini(root: Path, folder: Path) -> Path:
    """A copy of the project with this folder's campaign."""
    copy_of(root, folder)
    shutil.rmtree(folder / "config")
    shutil.copytree(HERE / "mini", folder / "config")
    return folder


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A cluster, with memory limits where this machine lets one set them."""
    if gone := cluster.missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"SLURM is not installed ({', '.join(gone)}): tests/slurm/install.sh as root")
        pytest.skip(f"SLURM is not installed ({', '.join(gone)}): as root, apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    cluster.up(folder, nodes=NODES, gpus=1, cgroup=os.access("/sys/fs/cgroup/memory/cgroup.procs", os.W_OK))
    yield folder
    cluster.down(folder)


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> dict[str, str]:
    """An environment in which every connection that Python opens is written down."""
    folder = tmp_path_factory.mktemp("watch")
    (folder / "sitecustomize.py").write_text(WATCH)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "TEST_CONNECTIONS": str(folder / "connections")}


def here(project: Path, *targets: str, **more: str) -> subprocess.Popen:
    """Snakemake on this machine, in the background; what it says is in `said`."""
    command = ["snakemake", *targets, "--cores", "3", "--prioritize", targets[-1]]  # it sleeps most of its time
    with open(project / "said", "w") as said:
        return subprocess.Popen(command, cwd=project, env=environment(**more), stdout=said, stderr=said)


class Controller:
    """A `snakemake --profile slurm` in the background, and what it says."""

    def __init__(self, project: Path, folder: Path, *targets: str, **more: str):
        self.log = project / f"controller-{time.monotonic_ns()}.log"
        path = f"{Path(sys.executable).parent}:{cluster.environment(folder)['PATH']}"
        variables = cluster.environment(folder) | more | {"PATH": path, "HF_TOKEN": SECRET}
        command = ["snakemake", *targets, "--profile", "slurm", "--slurm-init-seconds-before-status-checks", "3"]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, cwd=project, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, seconds: float = 420) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"not over after {seconds} s: {self.said()[-3000:]}")


def until(true, what: str, seconds: float = 240, said=lambda: ""):
    """The first true value of a function that is asked again and again. said: what to tell where there is none."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"no {what} after {seconds} s {said()[-3000:]}"
        time.sleep(0.1)
    return found


def jobs(folder: Path) -> dict[str, dict[str, str]]:
    """Number -> what SLURM knows of every job: its fields by name."""
    found = {}
    for text in cluster.run(folder, "scontrol", "-o", "show", "job").splitlines():
        fields = dict(part.partition("=")[::2] for part in text.split() if "=" in part)
        if "JobId" in fields:
            found[fields["JobId"]] = fields
    return found


def of(folder: Path, stage: str, name: str) -> list[dict[str, str]]:
    """The jobs of a stage of an experiment, oldest first."""
    wanted = [fields for fields in jobs(folder).values() if f"rule_{stage}/{name}" in fields.get("StdOut", "")]
    return sorted(wanted, key=lambda fields: int(fields["JobId"]))


def saved(project: Path, name: str, stage: str = "sft") -> bool:
    return any(project.glob(f"results/{name}/{stage}/checkpoints/*/checkpoint-*/manifest.json"))


def log_of(project: Path, folder: Path, stage: str, name: str) -> str:
    """What a stage's jobs said."""
    return "".join(Path(fields["StdOut"]).read_text(errors="replace") for fields in of(folder, stage, name))


def cancel(folder: Path, job: dict[str, str]) -> None:
    """The user cancels a job."""
    cluster.run(folder, "scancel", job["JobId"])


def preempt(folder: Path, job: dict[str, str]) -> None:
    """An urgent job takes a job's node."""
    urgent = ["-p", "urgent", "-w", job["NodeList"], "--exclusive", "-o", "/dev/null"]
    cluster.run(folder, "sbatch", *urgent, "--wrap", "sleep 2")


def kill_node(folder: Path, job: dict[str, str]) -> None:
    """A job's node dies: its daemon, and everything that runs on it without a word."""
    node = job["NodeList"]
    there = [
        pid for pid in filter(str.isdecimal, os.listdir("/proc")) if f"SLURMD_NODENAME={node}" in read(pid, "environ")
    ]
    parents = {read(pid, "stat").rpartition(")")[2].split()[1] for pid in there if read(pid, "stat")}
    steps = [pid for pid in parents if read(pid, "cmdline").startswith("slurmstepd")]
    cluster.stop(folder, node, signal.SIGKILL)
    for pid in [*steps, *there]:
        with contextlib.suppress(OSError):
            os.kill(int(pid), signal.SIGKILL)


def read(pid: str, what: str) -> str:
    """A file of a process in /proc; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/{what}").read_text(errors="replace")
    except OSError:
        return ""


def environments(project: Path) -> list[str]:
    """The environments of all stages that run in jobs of a project."""
    pids = [pid for pid in os.listdir("/proc") if pid.isdecimal() and "-m\0posttrain\0" in read(pid, "cmdline")]
    return [found for pid in pids if f"PWD={project}\0" in (found := read(pid, "environ"))]


@pytest.fixture(scope="module")
def story(root, nodes, watched, tmp_path_factory) -> dict:
    """A campaign of a bad week, told once: what was done to it, and what was seen."""
    project = mini(root, tmp_path_factory.mktemp("project"))
    (project / "slurm/site.yaml").write_text(SITE)
    seen = {"project": project}

    first = Controller(project, nodes, *TARGETS, **watched)
    until(
        lambda: of(nodes, "base", "calm") and of(nodes, "base", "calm")[0]["JobState"] == "RUNNING",
        "base",
        said=first.said,
    )
    base = of(nodes, "base", "calm")[0]["JobId"]
    cluster.run(nodes, "scontrol", "suspend", base)  # else it may be over before the third Snakemake looks for it
    second = Controller(project, nodes, *TARGETS)
    seen["second"] = (second.end(), second.said())
    seen["dry"] = subprocess.run(
        ["snakemake", "-n", *TARGETS], cwd=project, env=environment(), capture_output=True, text=True
    )
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()

    third = Controller(project, nodes, *TARGETS, **watched)
    until(lambda: "waiting for them: " in third.said(), "wait for the base", said=third.said)
    cluster.run(nodes, "scontrol", "resume", base)
    left = {"preempted": preempt, "died": kill_node, "cancelled": cancel}
    while left:  # each as soon as it has a checkpoint
        name = until(lambda: next((name for name in left if saved(project, name)), None), f"checkpoint of {[*left]}")
        seen.setdefault("environments", environments(project))
        left.pop(name)(nodes, of(nodes, "sft", name)[0])
    until(lambda: of(nodes, "sft", "preempted")[0]["Restarts"] == "1", "preemption")
    until(lambda: any("results/limited/ppo/" in found for found in environments(project)), "PPO")
    cluster.stop(nodes, "slurmctld")  # SLURM's controller is restarted too, after PPO has asked it for its limit
    until(lambda: not (nodes / "slurmctld.pid").exists(), "end of slurmctld")
    time.sleep(AWAY)
    cluster.controller(nodes)
    until(lambda: any(job["Restarts"] != "0" for job in of(nodes, "ppo", "limited")), "time limit", 400)
    local = mini(root, tmp_path_factory.mktemp("local"))  # while little else is done: it is slow to start
    seen["local"] = local, here(local, *TARGETS)
    seen["code"], seen["said"] = third.end(900), third.said()
    seen["jobs"] = {name: of(nodes, "sft", name) for name in POLICIES}
    seen["limited"], seen["logs"] = of(nodes, "ppo", "limited"), {"limited": log_of(project, nodes, "ppo", "limited")}
    seen["stopped"] = (project / "results/logs/cancelled/sft.log").read_text()
    seen["bases"] = of(nodes, "base", "calm")

    snakefile = project / "workflow/Snakefile"
    snakefile.write_text(snakefile.read_text().replace("onstart:\n", HELD))
    (project / "held").touch()
    fourth = Controller(project, nodes, *TARGETS, **watched)
    until(lambda: (project / "planned").exists(), "plan", said=fourth.said)
    cluster.stop(nodes, "slurmctld", signal.SIGKILL)  # away just when a job is to be submitted
    (project / "held").unlink()
    waits = "SLURM does not answer: a job waits to be submitted"
    until(lambda: waits in fourth.said(), "wait", said=fourth.said)
    cluster.controller(nodes)
    seen["last"] = (fourth.end(), fourth.said())
    seen["cancelled"] = of(nodes, "sft", "cancelled")
    seen["logs"] |= {name: log_of(project, nodes, "sft", name) for name in POLICIES}
    return seen


@pytest.fixture(scope="module")
def local(story) -> Path:
    """The campaign, on this machine."""
    project, run = story["local"]
    assert run.wait() == 0, (project / "said").read_text()[-3000:]
    return project


def digests(project: Path) -> dict[str, dict]:
    """Every artifact's manifest."""
    found = [project / target for target in TARGETS]
    return {str(file.relative_to(project)): json.loads(file.read_text()) for file in found}


def test_the_bytes_are_those_of_a_local_run(story, local):
    assert story["last"][0] == 0, story["last"][1][-3000:]
    made = digests(local)
    assert made == digests(story["project"])
    kinds = {json.dumps(made[f"results/{name}/sft/manifest.json"]) for name in POLICIES}
    assert len(kinds) == len(POLICIES), "control: every experiment makes bytes of its own"


def test_a_second_controller_is_refused(story):
    code, said = story["second"]
    assert code != 0 and re.search(r"another Snakemake works here: process \d+ on \S+, started ", said)
    assert "Traceback" not in said
    assert story["dry"].returncode == 0, "control: looking is allowed"


def test_a_dead_controllers_lock_is_cleared_and_its_jobs_are_waited_for(story):
    assert "cleared the lock of a Snakemake that died: process" in story["said"]
    assert re.search(r"an earlier Snakemake left \d+ jobs; waiting for them: ", story["said"])
    assert len(story["bases"]) == 1, "the base that was running was not started again"


def test_a_preempted_job_goes_on(story):
    (job,) = story["jobs"]["preempted"]
    assert job["Restarts"] == "1" and "continuing from a checkpoint" in story["logs"]["preempted"]


def test_the_job_of_a_dead_node_goes_on_elsewhere(story):
    (job,) = story["jobs"]["died"]
    assert int(job["Restarts"]) >= 1 and "continuing from a checkpoint" in story["logs"]["died"]


def test_a_job_at_its_time_limit_goes_on(story):
    (job,) = story["limited"]
    assert int(job["Restarts"]) >= 1 and job["TimeLimit"] == "00:02:00"
    assert re.search(r"the time limit of [\d.]+ min is near: saved at step \d+ of 40", story["logs"]["limited"])


def test_a_job_out_of_memory_gets_more(story):
    (job,) = story["jobs"]["hungry"]
    assert "out of memory with 1100 MB: it is run again with 2200 MB" in story["logs"]["hungry"]
    assert job["MinMemoryNode"] == "2200M"


def test_a_cancelled_job_is_not_submitted_again_but_by_the_next_call(story):
    (job,) = story["jobs"]["cancelled"]
    assert job["JobState"] == "CANCELLED" and story["code"] != 0
    assert "told to stop (SIGTERM): saved at step" in story["stopped"]
    assert len(story["cancelled"]) == 2 and "continuing from a checkpoint" in story["logs"]["cancelled"]
    failed = re.findall(r"^Error in rule .*?^    output: (\S+),", story["said"], re.M | re.S)
    assert failed == ["results/cancelled/sft/manifest.json"]
    assert "  cancelled/sft: told to stop (SIGTERM): saved at step" in story["said"].rpartition("failed or were")[2]


def test_the_next_call_runs_what_was_cancelled_also_where_slurms_controller_is_away_just_then(story):
    code, said = story["last"]
    assert code == 0 and re.findall(r"^rule (\w+):", said, re.M) == ["sft"], said[-3000:]
    waits, submitted, done = map(said.index, ("a job waits to be submitted", "has been submitted with", "1 of 1 steps"))
    assert waits < submitted < done


def test_every_attempt_of_it_is_on_record_with_its_job(story):
    """Also the one whose node died, which could not report its end."""
    folder = story["project"] / "results/compute"
    ended = {}
    for name, stage in {**dict.fromkeys(POLICIES, "sft"), "limited": "ppo"}.items():
        accounts = [json.loads(file.read_text()) for file in sorted((folder / name / stage).glob("*.json"))]
        assert all(account["job"] for account in accounts) and accounts[-1]["outcome"] == "done", name
        ended[name] = [account["outcome"] for account in accounts[:-1]], accounts[0]
    assert ended["calm"][0] == [], "control"
    assert ended["preempted"][0] == ["interrupted"] and ended["cancelled"][0] == ["interrupted"]
    assert None in ended["died"][0] and ended["died"][1]["seconds"] > 0 and ended["died"][1]["identity"]
    assert "the time limit of" in ended["limited"][1]["reason"]
    assert (ended["hungry"][1]["outcome"], ended["hungry"][1]["reason"]) == ("killed", "out of memory")


def test_jobs_know_no_secret(story):
    assert story["environments"] and all("POSTTRAIN_KEEP_GB" in found for found in story["environments"])
    assert not any(SECRET in found for found in story["environments"])
    texts = [file.read_text(errors="replace") for file in story["project"].rglob("*.log")]
    assert texts and not any(SECRET in text for text in texts)


def test_compute_stages_open_no_connection(story, watched):
    connections = Path(watched["TEST_CONNECTIONS"])
    before = connections.read_text() if connections.exists() else ""
    assert "posttrain" not in before, before
    tried = "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"
    subprocess.run([sys.executable, "-c", tried, "posttrain"], env=os.environ | watched)
    assert "posttrain" in connections.read_text(), "control: a connection is seen"


def test_stages_ask_for_what_they_need(story):
    (job,) = story["jobs"]["calm"]
    assert job["TresPerJob"] == "gres:gpu:1"
    assert job["NumCPUs"] == "1" and job["MinMemoryNode"] == "1100M"
    assert not any("report" in fields.get("StdOut", "") for fields in story["bases"])


@pytest.fixture(scope="module")
def small(root, nodes, story, tmp_path_factory) -> Path:
    """The campaign after a base was made, for what follows on it; it waits for the story, which fills the cluster."""
    project = mini(root, tmp_path_factory.mktemp("small"))
    (project / "config/config.yaml").write_text("experiments: [calm]\n")
    shutil.copytree(story["project"] / "results/calm", project / "results/calm")
    shutil.rmtree(project / "results/calm/sft")
    shutil.rmtree(project / "results/calm/dpo")
    return project


def doctor(project: Path, folder: Path, site: str) -> subprocess.CompletedProcess:
    """`posttrain doctor` with a site file."""
    (project / "slurm/site.yaml").write_text(site)
    path = f"{Path(sys.executable).parent}:{cluster.environment(folder)['PATH']}"
    variables = environment() | cluster.environment(folder) | {"PATH": path}
    return subprocess.run(["posttrain", "doctor"], cwd=project, env=variables, capture_output=True, text=True)


def test_the_doctor_finds_a_cluster_well(small, nodes):
    run = doctor(small, nodes, "cpu_only: true\nstages: {sft: {mem_mb: 1100}}\n")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "MISSING" not in run.stdout
    for what in ("site", "SLURM", "interruptions", "partition", "sft (1100 MB", "results", "models", "compute node"):
        assert re.search(rf"^ok +{re.escape(what)}", run.stdout, re.M), what


def test_the_doctor_says_what_is_missing_and_what_to_do(small, nodes, tmp_path):
    (tmp_path / "gone").write_text("a file, where a folder should be")
    run = doctor(small, nodes, f"scratch: {tmp_path}/gone\nstages: {{sft: {{mem_mb: 99000000}}}}\n")
    assert run.returncode == 1 and "Traceback" not in run.stderr
    found = re.findall(r"^MISSING +(.*?): .*\n +-> \S+", run.stdout, re.M)
    assert found == ["sft (99000000 MB, 720 min, 1 GPU)", "compute node", "scratch"], run.stdout + run.stderr
    assert "torch sees no GPU" in run.stdout, "the cluster pretends to have some"
    run = doctor(small, nodes, "gpu_type: h100\n")
    assert (
        "MISSING  GPU type: normal has no h100\n         -> set gpu_type in slurm/site.yaml to one of: fake"
        in run.stdout
    )
    run = doctor(small, nodes, "partition: nowhere\n")
    assert (
        "MISSING  partition: there is no nowhere\n         -> set partition in slurm/site.yaml to one of: normal"
        in run.stdout
    )
    run = doctor(small, nodes, "partitoin: normal\nstages: {sftt: {gpu: 1}}\n")
    assert run.returncode == 1
    assert (
        "slurm/site.yaml:1: partitoin" in run.stdout and "slurm/site.yaml:2: stages.sftt: no such stage" in run.stdout
    )


SPREAD = """stages:
  ppo: {gpu: 2, nodes: 2, mem_mb: 1100, runtime: 9}
  dpo: {gpu: 2, mem_mb: 1100, runtime: 9}
"""


@pytest.fixture(scope="module")
def spread(local, tmp_path_factory) -> Path:
    """A campaign with a run for two nodes, after its base was made on this machine."""
    project = shutil.copytree(local, tmp_path_factory.mktemp("spread") / "project", symlinks=True)
    (project / "config/config.yaml").write_text("experiments: [spread, grace]\n")
    long = "sft: {steps: 1000, seed: 4, checkpoint_steps: 20}\n"
    (project / "config/experiments/grace.yaml").write_text(f"extends: calm\nquestion: A grace time?\n{long}")
    settings = "ppo: {steps: 8, seed: 3, checkpoint_steps: 2}\n"  # of seconds each, which a killed process does not end
    (project / "config/experiments/spread.yaml").write_text(f"extends: limited\nquestion: Two nodes?\n{settings}")
    (project / "slurm/site.yaml").write_text(SPREAD)
    return project


def test_a_stage_on_two_nodes_is_stopped_continues_and_makes_the_bytes_of_two_processes(spread, nodes, tmp_path):
    target = "results/spread/ppo/manifest.json"
    alone = shutil.copytree(spread, tmp_path / "alone", symlinks=True)
    run = here(alone, target, CUDA_VISIBLE_DEVICES="0,1")  # two processes, as two GPUs are said to be visible
    first = Controller(spread, nodes, target)
    until(lambda: saved(spread, "spread", "ppo"), "checkpoint")
    (job,) = of(nodes, "ppo", "spread")
    cancel(nodes, job)
    assert first.end() != 0
    assert (job["NumNodes"], job["NumCPUs"]) == ("2", "4") and job["TresPerNode"] == "gres:gpu:1"
    stopped = (spread / "results/logs/spread/ppo.log").read_text()
    assert "what ended it: told to stop (SIGTERM): saved at step" in stopped, stopped[-3000:]
    again = Controller(spread, nodes, target)
    assert again.end() == 0, again.said()[-3000:]
    assert log_of(spread, nodes, "ppo", "spread").count("continuing after iteration") == 2, "by two processes"

    assert run.wait() == 0, (alone / "said").read_text()[-3000:]
    shapes = [
        json.loads((project / target).with_name("provenance.json").read_text())["shape"] for project in (alone, spread)
    ]
    assert shapes[0] == shapes[1] and shapes[0]["processes"] == 2
    assert (alone / target).read_bytes() == (spread / target).read_bytes()


def test_a_job_that_is_preempted_with_a_grace_time_is_run_again(spread, nodes):
    """It ends by itself in that time, as its stage has saved: SLURM takes that for its end."""
    (spread / "slurm/site.yaml").write_text("partition: slack\nstages: {sft: {mem_mb: 1100, runtime: 9}}\n")
    run = Controller(spread, nodes, "results/grace/sft/manifest.json")
    until(lambda: saved(spread, "grace"), "checkpoint")
    (job,) = of(nodes, "sft", "grace")
    preempt(nodes, job)
    until(lambda: of(nodes, "sft", "grace")[0]["Restarts"] == "1", "second start")
    assert "told to stop (SIGTERM): saved at step" in (spread / "results/logs/grace/sft.log").read_text()
    cancel(nodes, job)  # it would wait for two minutes
    run.process.kill()
    run.process.wait()
    (spread / "slurm/site.yaml").write_text(SPREAD)


def test_gpus_are_not_taken_from_several_nodes_unasked(spread, nodes):
    """A job whose processes see the half of what it holds would wait for the rest, or leave it idle."""
    (spread / "results/spread/ppo/manifest.json").unlink(missing_ok=True)
    said = doctor(spread, nodes, SPREAD).stdout
    assert re.search(r"^MISSING +dpo \(1100 MB, 9 min, 2 GPU\): .*not available", said, re.M), said
    assert re.search(r"^ok +ppo \(1100 MB, 9 min, 2 GPU on 2 nodes\)", said, re.M), said


def test_a_failed_submission_is_told_and_leaves_nothing(small, nodes):
    (small / "slurm/site.yaml").write_text("partition: nowhere\n")
    run = Controller(small, nodes, "results/calm/sft/manifest.json")
    assert run.end() != 0
    assert "nowhere" in run.said() and "Traceback" not in run.said(), run.said()[-3000:]
    assert "calm/sft: SLURM refused the job (sbatch: error: invalid partition specified: nowhere)" in run.said()
    assert not (small / "results/calm/sft/manifest.json").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="a small disk is mounted, which takes root")
def test_a_full_disk_is_told_and_what_follows_continues(small, nodes, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        (small / "slurm/site.yaml").write_text(f"scratch: {disk}\nstages: {{sft: {{mem_mb: 1100}}}}\n")
        first = Controller(small, nodes, "results/calm/sft/manifest.json")
        assert first.end() != 0
        log = log_of(small, nodes, "sft", "calm")
        assert re.search(r"error: .*: the disk is full \([\d.]+ MB are left\): make room", log), log[-3000:]
        assert log.count("error: results") == 1, "what is not written for want of room is no second error"
        assert "Traceback" not in log and not (small / "results/calm/sft/manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        again = Controller(small, nodes, "results/calm/sft/manifest.json")
        assert again.end() == 0, again.said()[-3000:]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_it_makes_the_bytes_of_the_story(small, story):
    made = [json.loads((project / TARGETS[0]).read_text()) for project in (small, story["project"])]
    assert made[0] == made[1]

"""What stands around a stage: attempts, GPUs of one's own, hidden credentials, one controller, reasons of failures."""

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain import attempt, cards, cluster, controller, credentials, failure, interruption, launch, slurm
from posttrain.errors import Interrupted, UserError


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, outside of any job."""
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "POSTTRAIN_DEVICE", cluster.TOLD, credentials.PLACE):
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def stage(here, monkeypatch):
    """Lets a script stand for the stage, and runs an attempt at it."""

    def run(script: str, section: dict | None = None, name: str = "sft", **patches) -> int:
        monkeypatch.setattr(launch, "command", lambda arguments, *_: [sys.executable, "-c", script, *arguments])
        for key, value in patches.items():
            monkeypatch.setattr(slurm, key, value)
        kept = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        try:
            section = json.dumps(section or {"batch_size": 8})
            return attempt.attempt([name, "--config", section, "--output", f"results/x/{name}/manifest.json"], 0)
        finally:
            signal.signal(signal.SIGTERM, kept[0])
            signal.signal(signal.SIGINT, kept[1])

    return run


def test_the_exit_code_is_the_stages(stage, here):
    assert stage("") == 0 and not (here / "results/x/sft/checkpoints/attempt").exists()
    assert stage("import sys; sys.exit(2)") == 2
    assert stage("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 137


def test_without_gpu_memory_the_micro_batch_is_halved(stage, here, capsys):
    script = (
        "import sys; at = sys.argv.index('--micro-batch-size') if '--micro-batch-size' in sys.argv else 0; "
        "size = int(sys.argv[at + 1]) if at else 8; "
        "print(size, file=open('sizes', 'a')); sys.exit(77 if size > 2 else 0)"
    )
    assert stage(script) == 0
    assert (here / "sizes").read_text().split() == ["8", "4", "2"]
    assert "at the same global batch: another shape" in capsys.readouterr().err
    with pytest.raises(UserError, match="out of GPU memory with one sequence at a time"):
        stage("import sys; sys.exit(77)", {"batch_size": 1})
    (here / "sizes").unlink()
    assert stage(script, name="evaluate") == 77
    assert (here / "sizes").read_text().split() == ["8"], "a stage without micro-batches is not tried again"


def test_a_stage_that_saved_is_run_again_by_its_job(stage, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(cluster.TOLD, "{}")
    asked = []

    def again(job, **changes):
        asked.append((job, changes))

    known = {"again": again, "shown": lambda job, key: {"MinMemoryNode": "9000000M"}.get(key, ""), "kills": lambda: 0}
    known["refusal"] = lambda job, **changes: "" if changes == {"mem": "18000000"} else "no such node"
    assert stage("import sys; sys.exit(75)", **known) == 75
    assert asked == [("7", {})]
    assert stage("import sys; sys.exit(2)", **known) == 2 and len(asked) == 1, "control: a failure is not"
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert stage(kill, **known) == 137 and len(asked) == 1, "control: nor what was killed with memory left"
    assert stage(kill, **known | {"kills": lambda: 1}) == 137
    assert asked[1:] == [("7", {"MinMemoryNode": "18000000"})]
    of_torchrun = stage("import sys; sys.exit(1)", name="dpo", **known | {"kills": lambda: 1})
    assert of_torchrun == 1, "which has one code, also where the kernel killed one of its processes"
    assert asked[2:] == asked[1:2]
    assert stage("import sys; sys.exit(75)", **known | {"kills": lambda: 1}) == 75
    assert asked[3:] == [("7", {})], "what was saved goes on as it was"


def test_slurm_can_be_asked_about_a_job_that_could_write_nothing(stage, here, monkeypatch):
    """What is on disk while the stage runs, should all processes be killed."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(cluster.TOLD, "{}")
    script = "import shutil, sys; shutil.copy('results/x/sft/checkpoints/attempt/attempt.json', 'seen'); sys.exit(2)"
    stage(script, shown=lambda job, key: {"MinMemoryNode": "1100M"}.get(key, ""))
    seen = json.loads((here / "seen").read_text())
    assert (seen["job"], seen["mem_mb"]) == ("7", 1100)


def test_memory_that_no_node_has_is_not_waited_for(stage, here, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(cluster.TOLD, "{}")
    asked = []
    known = {"again": lambda *job, **changes: asked.append(job), "kills": lambda: 1, "refusal": lambda *_, mem: mem}
    known["shown"] = lambda job, key: {"MinMemoryNode": "1100M"}.get(key, "")
    assert stage("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", **known) == 137
    assert not asked and "out of memory with 1100 MB, and no more is to be had (2200)" in capsys.readouterr().err
    assert not list(here.glob("results/**/failed.json")), "the next call, with smaller batches, asks for no more"


def test_memory_that_slurm_does_not_give_is_not_asked_for_again(stage, here, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(cluster.TOLD, "{}")
    asked = []
    known = {"again": lambda *job, **changes: asked.append(job), "kills": lambda: 1, "refusal": lambda *_, mem: ""}
    known["shown"] = lambda job, key: {"MinMemoryNode": "1100M"}.get(key, "")
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert stage(kill, **known) == 137 and asked == [("7",)]
    assert stage(kill, **known) == 137 and asked == [("7",)], "it ran again with what it had"
    assert "SLURM did not give this job the twice" in capsys.readouterr().err


SBATCH = """#!/bin/sh
echo "$@" > asked
case "$*" in *--mem=2200*) echo "sbatch: error: lines" >&2; echo "allocation failure: no such node" >&2; exit 1;; esac
"""


@pytest.mark.parametrize("gpus", ["gres:gpu:a100:1", "gres/gpu:a100:1"])
def test_whether_it_would_run_is_asked_of_the_same_job(here, monkeypatch, gpus):
    """Else another node of the partition has the memory, and the job waits without an end."""
    fields = {"Partition": "a", "Account": "lab", "QOS": "(null)", "TimeLimit": "01:00:00", "NumNodes": "1"}
    monkeypatch.setattr(slurm, "shown", lambda job, key: (fields | {"TresPerJob": gpus}).get(key, ""))
    monkeypatch.setenv("PATH", str(here))
    assert slurm.refusal("7", mem="2200") == "there is no sbatch to ask"
    (here / "sbatch").write_text(SBATCH)
    (here / "sbatch").chmod(0o755)
    assert slurm.refusal("7", mem="2200") == "no such node"
    expected = (
        "--test-only --partition=a --account=lab --time=01:00:00 --nodes=1 --gpus=a100:1 --mem=2200 --wrap true\n"
    )
    assert (here / "asked").read_text() == expected
    assert slurm.refusal("7", time="120") == "" and "--time=120 " in (here / "asked").read_text()


def test_a_job_of_the_users_own_is_left_alone(stage, monkeypatch):
    """Plain Snakemake in an interactive job: to run that job again would end all else in it."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    asked = []
    known = {"again": lambda *job: asked.append(job), "shown": lambda *_: ""}
    assert stage("import sys; sys.exit(75)", **known) == 75 and asked == []
    monkeypatch.setenv(cluster.TOLD, "{}")
    assert stage("import sys; sys.exit(75)", **known) == 75 and asked == [("7",)], "control: one of the profile's"


@pytest.mark.parametrize(("when", "count"), [("2026-11-26T21:40:19", 1), ("None", 0), ("", 0)])
def test_a_preempted_job_that_ends_in_its_grace_time_is_run_again(stage, monkeypatch, when, count):
    """None: cancelled by a person; "": SLURM runs it again by itself, and has forgotten why it did."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(cluster.TOLD, "{}")
    asked = []
    known = {"again": lambda *job: asked.append(job), "shown": lambda job, key: {"PreemptTime": when}.get(key, "")}
    script = "import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); os.kill(os.getppid(), 15); "
    script += "time.sleep(9)"
    assert stage(script, **known) == 75 and asked == [("7",)] * count


def limited(record: Path, *settings: str, stage: str = "sft") -> None:
    """An attempt that ends at its time limit."""
    before = attempt.begin(record, [stage, *settings])
    (record / "attempt.json").write_text(json.dumps(before | {"limited": True}))


def test_limits_that_let_no_step_be_saved_end_it(here):
    record = Path("results/x/sft/checkpoints/attempt")
    for _ in range(attempt.FRUITLESS):
        limited(record)
    with pytest.raises(UserError, match=r"3 jobs ended at their time limit.*raise stages.sft.runtime.*, or lower"):
        limited(record)
    judged = Path("results/x/evaluate/dpo/checkpoints/attempt")
    for _ in range(attempt.FRUITLESS):
        limited(judged, stage="evaluate")
    with pytest.raises(UserError, match=r"raise stages.evaluate.runtime in slurm/site.yaml$"):
        limited(judged, stage="evaluate")
    for step in range(5):  # control: steps are saved
        limited(record)
        whole = record.parent / "id" / f"checkpoint-{step + 1}/manifest.json"
        whole.parent.mkdir(parents=True)
        whole.write_text("{}")
        os.utime(whole, (step, step))


def test_other_settings_are_another_attempt(here):
    """Checkpoints of earlier settings are no step that was saved, and their limits do not count."""
    record = Path("results/x/sft/checkpoints/attempt")
    older = record.parent / "older/checkpoint-900/manifest.json"
    older.parent.mkdir(parents=True)
    older.write_text("{}")
    os.utime(older, (1, 1))
    for _ in range(attempt.FRUITLESS):
        limited(record, "older")
    limited(record, "newer")
    own = record.parent / "newer/checkpoint-5/manifest.json"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    for _ in range(attempt.FRUITLESS - 1):
        limited(record, "newer")
    assert attempt.begin(record, ["sft", "newer"])["fruitless"] == attempt.FRUITLESS - 1, "control: its own limits do"


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("1:30", 1.5), ("59:00", 59), ("2:00:30", 120.5), ("1-01:00:00", 1500), ("UNLIMITED", 0), ("", 0), ("INVALID", 0)],
)
def test_slurms_times(text, minutes):
    assert slurm.minutes_of(text) == minutes


def test_checkpoints_lie_in_scratch(stage, here, monkeypatch):
    monkeypatch.setenv(cluster.TOLD, json.dumps({"scratch": str(here / "scratch")}))
    stage("import sys; sys.exit(2)")
    link = here / "results/x/sft/checkpoints"
    assert link.is_symlink() and link.resolve().is_relative_to(here / "scratch")


def holder(folder: str, pipe) -> None:
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    os.environ["TMPDIR"] = folder
    cards.present.cache_clear()
    pipe.send(cards.take(1)[0])
    time.sleep(60)


def test_two_stages_never_share_a_gpu(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    context = multiprocessing.get_context("spawn")
    started, found = [], []
    for _ in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=holder, args=(str(tmp_path), theirs))
        process.start()
        started.append(process)
        found += ours.recv() if ours.poll(20) else ["none"]
    third_ours, theirs = context.Pipe()
    third = context.Process(target=holder, args=(str(tmp_path), theirs))
    third.start()
    try:
        assert sorted(found) == ["0", "1"]
        assert not third_ours.poll(3), "the third waits"
        started[0].kill()
        assert third_ours.poll(15) and third_ours.recv() == found[:1], "control: a killed stage holds no GPU"
    finally:
        for process in [*started, third]:
            process.kill()


def test_credentials_are_hidden_from_jobs_and_shown_to_fetch(here, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    credentials.hide()
    shown = subprocess.run([sys.executable, "-c", "import os; print(dict(os.environ))"], capture_output=True, text=True)
    assert "'secret'" not in shown.stdout and "TOKENIZERS_PARALLELISM" in shown.stdout
    fetch = "from posttrain import credentials; import os; credentials.reveal(); print(os.environ['HF_TOKEN'])"
    shown = subprocess.run([sys.executable, "-c", fetch], capture_output=True, text=True)
    assert shown.stdout == "secret\n"


def locked(here: Path, **who) -> None:
    """A directory as a Snakemake leaves it that has died."""
    (here / ".snakemake/locks").mkdir(parents=True)
    (here / ".snakemake/locks/0.input.lock").write_text("")
    (here / ".snakemake/controller.json").write_text(json.dumps(who))


def test_a_dead_controllers_lock_is_cleared(here, capsys):
    locked(here, host=socket.gethostname(), process=123, started="2026-01-01T00:00:00+00:00")
    controller.clear()
    assert not list((here / ".snakemake/locks").iterdir())
    assert "process 123 on" in capsys.readouterr().err


def test_a_living_controller_and_one_elsewhere_are_left_alone(here):
    locked(here, host="elsewhere", process=123, started="2026-01-01T00:00:00+00:00")
    with pytest.raises(UserError, match=r"on elsewhere.*snakemake --unlock"):
        controller.clear()
    script = "from posttrain import controller; controller.hold(); print('held', flush=True); input()"
    living = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert living.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another Snakemake works here: process {living.pid} on"):
        controller.clear()
    living.kill()
    living.wait()
    controller.clear()
    assert not list((here / ".snakemake/locks").iterdir()), "control: once it is dead"


def test_a_mistake_that_training_found_is_final(here):
    checkpoints = here / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "progress.json").write_text("{}")
    with pytest.raises(UserError), failure.remembered(checkpoints):
        raise UserError("the loss is nan at step 7")
    with (
        pytest.raises(UserError, match=r"the loss is nan at step 7\n.*rm .*failed.json"),
        failure.remembered(checkpoints),
    ):
        pytest.fail("it was tried again")
    (checkpoints / "failed.json").unlink()
    with failure.remembered(checkpoints):
        pass


@pytest.mark.parametrize("error", [Interrupted("saved"), OSError(5, "Input/output error"), RuntimeError("CUDA error")])
def test_what_may_go_well_another_time_is_tried_again(here, error):
    checkpoints = here / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "progress.json").write_text("{}")
    with pytest.raises(type(error)), failure.remembered(checkpoints):
        raise error
    with failure.remembered(checkpoints):
        pass


def test_a_mistake_before_training_is_tried_again(here):
    with pytest.raises(UserError), failure.remembered(here / "checkpoints"):
        raise UserError("there are no rows")
    with failure.remembered(here / "checkpoints"):
        pass


def test_a_full_disk_is_told_in_words(here):
    with pytest.raises(UserError, match="the disk is full"), failure.remembered(here / "checkpoints"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


class Workflow:
    """As much of Snakemake's as `cluster.begin` looks at."""

    def __init__(self, nodes: int | None, main: bool = True, given: dict | None = None):
        self.is_main_process, self.global_resources = main, given or {}
        self.resource_settings = type("Settings", (), {"nodes": nodes})

    def register_resource(self, name: str, value: int) -> None:
        self.global_resources[name] = value


def test_on_this_machine_gpus_are_counted(here, monkeypatch):
    monkeypatch.setattr(cards, "present", lambda: ["0", "1"])
    workflow = Workflow(None)
    assert cluster.begin(workflow) is None and workflow.global_resources == {"gpu": 2}
    given = Workflow(None, given={"gpu": 1})
    cluster.begin(given)
    assert given.global_resources == {"gpu": 1}, "what the user says comes first"
    queue = Workflow(32)
    assert cluster.begin(queue) == cluster.Site() and queue.global_resources == {}, "a queue counts for itself"
    assert os.environ["POSTTRAIN_DEVICE"] == "gpu", "whatever the login node has"


LEFT = "{:<20}{:<8}{:<200}{}\n".format


def test_what_a_dead_snakemake_left_is_told_from_other_jobs(here, monkeypatch):
    """The job in which this Snakemake itself may run and a notebook would be waited for without an end."""
    ours = LEFT("7", "R", "rule_sft_wildcards_one", here)
    said = (
        ours + LEFT("8", "R", "", here) + LEFT("9", "R", "notebook", here) + LEFT("10", "R", "rule_dpo", "/elsewhere")
    )
    monkeypatch.setattr(slurm, "ask", lambda *_: said)
    assert controller.left_jobs() == [("7", "R", "rule_sft_wildcards_one")]


def test_slurm_that_does_not_answer_is_asked_again(here, monkeypatch):
    """Else the jobs that still run would be started once more."""
    answers = [None, None, "", None]
    monkeypatch.setattr(slurm, "ask", lambda *_: answers.pop(0))
    monkeypatch.setattr(controller, "PAUSES", (0, 0, 0))
    assert controller.left_jobs() == [] and answers == [None]
    answers[:] = [None] * 3
    with pytest.raises(UserError, match=r"does not say which jobs still run here .* try again"):
        controller.left_jobs()


@pytest.mark.parametrize(
    ("age", "kind", "command"),
    [
        ("300 sec", "accounting_storage/slurmdbd", "squeue"),
        ("60 sec", "accounting_storage/slurmdbd", "sacct"),
        ("60 sec", "accounting_storage/none", "squeue"),
        ("60 sec", "(null)", "squeue"),
    ],
)
def test_states_are_asked_of_what_remembers_them(monkeypatch, age, kind, command):
    said = f"Configuration data\nAccountingStorageType   = {kind}\nMinJobAge               = {age}\nKillWait = 30 sec\n"
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: said)
    assert cluster.status_command() == command


def test_no_job_is_lost_where_its_state_could_not_be_asked(monkeypatch):
    """What the executor plugin neither reports nor names as running is still waited for."""
    import asyncio

    from snakemake_executor_plugin_slurm import Executor

    class Lost:
        def report_job_success(self, job):
            reported.append(job.external_jobid)

        report_job_error = report_job_success

        async def check_active_jobs(self, active):
            if answers:
                self.report_job_success(active[0])
                self.report_job_error(active[1])
                yield active[2]

    monkeypatch.setattr(Executor, "check_active_jobs", Lost.check_active_jobs)
    cluster.keep_asking()
    Lost.check_active_jobs = Executor.check_active_jobs
    jobs = [type("Job", (), {"external_jobid": name})() for name in "abc"]

    async def left():
        return [job.external_jobid async for job in Lost().check_active_jobs(jobs)]

    answers, reported = False, []
    assert asyncio.run(left()) == ["a", "b", "c"] and reported == []
    answers = True
    assert asyncio.run(left()) == ["c"] and reported == ["a", "b"], "control: what ended is not waited for"


def test_jobs_are_told_of_the_site_as_it_was_when_their_run_began(here):
    (here / "slurm").mkdir()
    (here / "slurm/site.yaml").write_text("partition: a\nmodules: [cuda/12.6]\nstages: {sft: {gpu: 2}}\n")
    found = cluster.begin(Workflow(32))
    (here / "slurm/site.yaml").write_text("partition: b\n")
    assert cluster.begin(Workflow(None, main=False)) == found and found.partition == "a"
    assert cluster.prefix(found).endswith("module load cuda/12.6; ")
    assert cluster.prefix(found).startswith("set -euo pipefail; trap '' TERM; ")
    assert cluster.begin(Workflow(None)) is None and cluster.current() is None, (
        "control: a run on this machine has none"
    )


def test_what_snakemake_would_read_as_python_is_a_text(here):
    """`all` and `open` are functions of Python's, 12_34 and 1e5 numbers."""
    odd = {"partition": "all", "account": "12_34", "qos": "1e5", "constraint": "a&b|c", "gpu_type": "3090"}
    asked = cluster.resources(cluster.Site(**odd))
    assert [eval(asked[key]) for key in ("slurm_partition", "slurm_account", "qos", "constraint", "gpu_model")] == [
        *odd.values()
    ]


def test_a_gpu_type_that_cannot_be_asked_for_is_refused(here):
    (here / "slurm").mkdir()
    (here / "slurm/site.yaml").write_text("gpu_type: nvidia_a100-sxm4-80gb\n")
    with pytest.raises(UserError, match=r"^slurm/site.yaml:1: gpu_type: .* choose by partition or constraint$"):
        cluster.site()
    (here / "slurm/site.yaml").write_text("gpu_type: a100_80.gb\n")
    assert cluster.site().gpu_type == "a100_80.gb", "control"


def test_every_mistake_in_the_sites_file_is_told_with_its_line(here):
    (here / "slurm").mkdir()
    (here / "workflow/rules").mkdir(parents=True)
    (here / "workflow/rules/sft.smk").write_text("")
    (here / "slurm/site.yaml").write_text("partitoin: a\njobs: none\nstages: {sft: {gpu: -1}, sftt: {gpu: 1}}\n")
    with pytest.raises(UserError) as error:
        cluster.site()
    assert [problem.split(": ")[:2] for problem in sorted(error.value.problems)] == [
        ["slurm/site.yaml:1", "partitoin"], ["slurm/site.yaml:2", "jobs"], ["slurm/site.yaml:3", "stages.sft.gpu"],
        ["slurm/site.yaml:3", "stages.sftt"]
    ]  # fmt: skip


def test_weights_are_shared_out_where_the_site_says_so(here, stage, monkeypatch):
    (here / "slurm").mkdir()
    (here / "slurm/site.yaml").write_text("stages: {sft: {gpu: 2, shard: true}, ppo: {shard: true}}\n")
    with pytest.raises(UserError, match=r"^slurm/site.yaml:1: stages.ppo.shard: only sft and dpo can$"):
        cluster.site()
    (here / "slurm/site.yaml").write_text("stages: {sft: {gpu: 2, shard: true}}\n")
    monkeypatch.setenv(cluster.TOLD, cluster.site().model_dump_json(exclude_none=True))
    given = "import sys; print(*sys.argv, file=open('given', 'w'))"
    stage(given)
    assert (here / "given").read_text().split()[-1] == "--shard"
    stage(given, name="dpo")
    assert "--shard" not in (here / "given").read_text(), "control: a stage of which it says nothing"


SPREAD = "gpu_type: a100\nstages: {sft: {gpu: 4, nodes: 2}, dpo: {gpu: 4}, reward: {gpu: 1}}\n"


def test_a_stage_is_spread_over_the_nodes_that_the_site_gives_it(here, monkeypatch):
    (here / "slurm").mkdir()
    (here / "slurm/site.yaml").write_text(SPREAD)
    found = cluster.site()
    assert cluster.resources(found)["nodes"] == 1 and cluster.resources(found)["gpu_model"] == "'a100'"
    assert cluster.spread(found) == {
        "sft": {"cpus_per_task": 4, "nodes": 2, "gpus": 2,
                "slurm_extra": "'--open-mode=append --gpus-per-node=a100:2'"},
        "dpo": {"cpus_per_task": 8},
    }  # fmt: skip
    monkeypatch.setenv(cluster.TOLD, found.model_dump_json(exclude_none=True))
    started = []
    monkeypatch.setattr(launch, "command", lambda *given: started.append(given) or ["true"])
    for name in ("sft", "dpo"):
        stop = type("Stop", (), {"told": False})
        attempt.run([name], {"CUDA_VISIBLE_DEVICES": "0,1", "PATH": os.environ["PATH"]}, stop, None, {}, here)
    assert [given[1:3] for given in started] == [(2, 2), (2, 1)]


def test_nodes_without_as_many_gpus_each_are_refused(here):
    (here / "slurm").mkdir()
    (here / "slurm/site.yaml").write_text(
        "stages:\n  sft: {gpu: 3, nodes: 2}\n  ppo: {nodes: 2}\n  dpo: {gpu: 2, nodes: 4}\n"
        "  evaluate: {gpu: 2, nodes: 2}\n  reward: {gpu: 4, nodes: 4}\n  base: {gpu: 0}\n  longctx: {nodes: 1}\n"
    )
    with pytest.raises(UserError) as error:
        cluster.site()
    whole = "set stages.{0}.gpu to a multiple of {1}"
    assert [problem.removeprefix("slurm/site.yaml:") for problem in error.value.problems] == [
        f"2: stages.sft.nodes: 2 nodes cannot have as many of 3 GPUs each; {whole.format('sft', 2)}",
        f"3: stages.ppo.nodes: 2 nodes cannot have as many of 0 GPUs each; {whole.format('ppo', 2)}",
        f"4: stages.dpo.nodes: 4 nodes cannot have as many of 2 GPUs each; {whole.format('dpo', 4)}",
        "5: stages.evaluate.nodes: only base, sft, reward, ppo, dpo, longctx can share work out among nodes",
    ]


def test_a_container_is_entered_by_each_process_that_starts_others(here, monkeypatch):
    monkeypatch.setenv(cluster.TOLD, cluster.Site(container="a.sif").model_dump_json(exclude_none=True))
    started, stop = [], type("Stop", (), {"told": False})
    monkeypatch.setattr(
        attempt.subprocess,
        "Popen",
        lambda command, **_: started.append(command) or type("Child", (), {"poll": lambda _: 0, "returncode": 0})(),
    )
    attempt.run(["sft"], {}, stop, None, {}, here)
    attempt.run(["sft"], {"CUDA_VISIBLE_DEVICES": "0,1"}, stop, None, {}, here)
    inside = ["apptainer", "exec", "--nv", "a.sif", "python", "-m"]
    assert started[0] == [*inside, "posttrain", "sft"]
    assert started[1][: len(inside) + 1] == [*inside, "torch.distributed.run"]


def test_accelerate_shares_nothing_out_on_cpus(monkeypatch):
    from posttrain import parallel, training

    monkeypatch.setattr(parallel, "sharded", True)
    assert training.sharding() == {}, "one process has nothing to share"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--shard needs GPUs"):
        training.sharding()


def test_who_only_looks_is_let_in(here):
    locked(here, host="elsewhere", process=123, started="2026-01-01T00:00:00+00:00")
    for looks in ("-n", "-np", "--dry-run", "--dryrun", "--report", "--rulegraph", "--unlock", "--list-rules"):
        controller.begin(None, ["snakemake", looks])
    for works in ("--cores=2", "-j2", "-k", "--profile", "--keep-going", "results/main/sft/manifest.json"):
        with pytest.raises(UserError):
            controller.begin(None, ["snakemake", works])


def test_a_file_system_without_locks_is_lived_with(here, monkeypatch):
    """Lustre mounted without them: who holds a directory is told by its process."""

    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    with interruption.alone(here / "lock") as waited:
        assert not waited
    locked(here, host=socket.gethostname(), process=os.getpid(), started="2026-01-01T00:00:00+00:00")
    with pytest.raises(UserError, match="another Snakemake works here"):
        controller.clear()
    (here / ".snakemake/controller.json").write_text(json.dumps({"host": socket.gethostname(), "process": 2**22 + 1}))
    controller.clear()
    assert not list((here / ".snakemake/locks").iterdir())

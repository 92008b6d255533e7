"""What stands around a stage: attempts at it, memory and time that run out, GPUs of one's own, hidden credentials."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.cluster import sites
from posttrain.ground import credentials
from posttrain.ground.errors import UserError
from posttrain.jobs import attempt, cards, launch, slurm

SFT = ["sft", "--config", "{}", "--output", "results/x/sft/manifest.json"]


def test_the_exit_code_is_the_stages(stage, here):
    assert stage("") == 0 and not (here / "results/x/sft/checkpoints/attempt").exists()
    assert stage("import sys; sys.exit(2)") == 2
    assert stage("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 137
    unwritten = "import os, sys; open(os.environ['POSTTRAIN_OUTCOME'], 'w').close(); sys.exit(3)"
    assert stage(unwritten) == 3, "on a full disk"


def test_without_gpu_memory_the_micro_batch_is_halved(stage, here, monkeypatch, capsys):
    script = (
        "import sys; at = sys.argv.index('--micro-batch-size') if '--micro-batch-size' in sys.argv else 0; "
        "size = int(sys.argv[at + 1]) if at else 8; "
        "print(size, file=open('sizes', 'a')); sys.exit(77 if size > 2 else 0)"
    )
    assert stage(script) == 0
    assert (here / "sizes").read_text().split() == ["8", "4", "2"]
    assert "at the same global batch" in capsys.readouterr().err
    (here / "sizes").unlink()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert stage(script.replace("size > 2", "size > 1")) == 0
    assert (here / "sizes").read_text().split() == ["8", "1"], "of several processes each has a part of the batch"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="out of GPU memory with one sequence at a time"):
        stage("import sys; sys.exit(77)", {"batch_size": 1})
    (here / "sizes").unlink()
    assert stage(script, {"batch_size": "auto"}, "evaluate", batch_size=4) == 0
    assert (here / "sizes").read_text().split() == ["4", "2"], "as planned, then half of it"
    (here / "sizes").unlink()
    assert stage(script, name="compare") == 77
    assert (here / "sizes").read_text().split() == ["8"], "a stage whose result the batch can change is not tried again"


def test_a_stage_that_has_no_model_sees_no_gpu(stage, here, monkeypatch):
    """None is reserved for it, and another stage may have them all."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    script = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], file=open('seen', 'a'))"
    for name in ("algebra", "prepare", "evaluate"):
        assert stage(script, name=name) == 0
    assert (here / "seen").read_text().split("\n") == ["", "", "0,1", ""], "the last is the control"


def test_an_attempt_by_hand_takes_a_file_of_settings(here):
    """As a stage does; and says which of its arguments is missing."""
    (here / "sft.yaml").write_text("batch_size: 8\n")
    trial = attempt.Attempt(["sft", "--config", "sft.yaml", "--output", "results/x/sft/manifest.json"])
    trial.halve_micro_batch(1)
    assert trial.record["micro_batch_size"] == 4
    for arguments in ([], ["sft"], ["sft", "--output", "m"], [*SFT[:3], "--output"]):
        with pytest.raises(UserError, match="attempt: give a stage with --config SECTION and --output MANIFEST"):
            attempt.home(arguments)
    assert attempt.home(SFT) == Path("results/x/sft")  # control


def test_a_stage_that_saved_is_run_again_by_its_job(stage, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(slurm.SITE, "{}")
    asked = []

    def requeue(job, **changes):
        asked.append((job, changes))

    known = {
        "requeue": requeue,
        "field": lambda job, key: {"MinMemoryNode": "9000000M"}.get(key, ""),
        "oom_kills": lambda: 0,
    }
    known["refusal"] = lambda job, **changes: "" if changes == {"mem": "18000000"} else "no such node"
    assert stage("import sys; sys.exit(75)", **known) == 75
    assert asked == [("7", {})]
    assert stage("import sys; sys.exit(2)", **known) == 2 and len(asked) == 1, "control: a failure is not"
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert stage(kill, **known) == 137 and len(asked) == 1, "control: nor what was killed with memory left"
    assert stage(kill, **known | {"oom_kills": lambda: 1}) == 137
    assert asked[1:] == [("7", {"MinMemoryNode": "18000000"})]
    of_torchrun = stage("import sys; sys.exit(1)", name="dpo", **known | {"oom_kills": lambda: 1})
    assert of_torchrun == 1, "which has one code, also where the kernel killed one of its processes"
    assert asked[2:] == asked[1:2]
    assert stage("import sys; sys.exit(75)", **known | {"oom_kills": lambda: 1}) == 75
    assert asked[3:] == [("7", {})], "what was saved goes on as it was"


def test_slurm_can_be_asked_about_a_job_that_could_write_nothing(stage, here, monkeypatch):
    """What is on disk while the stage runs, should all processes be killed."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(slurm.SITE, "{}")
    script = "import shutil, sys; shutil.copy('results/x/sft/checkpoints/attempt/attempt.json', 'seen'); sys.exit(2)"
    stage(script, field=lambda job, key: {"MinMemoryNode": "1100M"}.get(key, ""))
    seen = json.loads((here / "seen").read_text())
    assert (seen["job"], seen["mem_mb"]) == ("7", 1100)


def test_memory_that_no_node_has_is_not_waited_for(stage, here, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(slurm.SITE, "{}")
    asked = []
    known = {
        "requeue": lambda *job, **changes: asked.append(job),
        "oom_kills": lambda: 1,
        "refusal": lambda *_, mem: mem,
    }
    known["field"] = lambda job, key: {"MinMemoryNode": "1100M"}.get(key, "")
    assert stage("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", **known) == 137
    assert not asked and "out of memory with 1100 MB, and more is not available (2200)" in capsys.readouterr().err
    assert not list(here.glob("results/**/failed.json")), "the next call asks for no more"
    (known_then,) = here.glob("results/x/sft/checkpoints/attempt/attempt.json")
    assert "job" not in json.loads(known_then.read_text()), "nor is SLURM asked about this one"


def test_memory_that_slurm_does_not_give_is_not_asked_for_again(stage, here, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(slurm.SITE, "{}")
    asked = []
    known = {
        "requeue": lambda *job, **changes: asked.append(job),
        "oom_kills": lambda: 1,
        "refusal": lambda *_, mem: "",
    }
    known["field"] = lambda job, key: {"MinMemoryNode": "1100M"}.get(key, "")
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert stage(kill, **known) == 137 and asked == [("7",)]
    assert stage(kill, **known) == 137 and asked == [("7",)], "it ran again with what it had"
    assert "SLURM did not double the memory of this job" in capsys.readouterr().err
    assert stage(kill, **known) == 137 and len(asked) == 2
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert stage(kill, **known) == 137 and asked[2:] == [("8",)], "control: another job with as little is to get more"
    (failed,) = here.glob("results/x/sft/checkpoints/attempt/failed.json")
    stage("import sys; sys.exit(2)", {"batch_size": 4}, **known | {"oom_kills": lambda: 0})
    assert not failed.exists(), "other settings may need no more"


def test_what_ended_a_stage_is_judged_when_slurm_answers(stage, here, monkeypatch):
    """Else its job has no memory, and was not preempted."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(slurm.SITE, "{}")
    asked, there = [], []
    known = {
        "requeue": lambda *job, **changes: asked.append(changes),
        "oom_kills": lambda: 1,
        "refusal": lambda *_, mem: "",
    }
    known["field"] = lambda job, key: {"MinMemoryNode": "1100M"}.get(key, "") if there else ""
    known["wait_until_reachable"] = lambda *_, longest: there.append(longest)
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert stage(kill, **known) == 137 and asked == [{"MinMemoryNode": "2200"}] and there == [5]
    assert stage("", **known) == 0 and there == [5], "control: nothing is to be judged"
    memory = iter([1300, 0])
    shutil.rmtree(here / "results")
    assert stage(kill, **known | {"memory_mb": lambda _: next(memory)}) == 137
    assert asked[-1] == {"MinMemoryNode": "2600"}, "what it said at first"


SBATCH = """#!/bin/sh
echo "$@" > asked
case "$*" in *--mem=2200*) echo "sbatch: error: lines" >&2; echo "allocation failure: no such node" >&2; exit 1;; esac
"""


@pytest.mark.parametrize("gpus", ["gres:gpu:a100:1", "gres/gpu:a100:1"])
def test_whether_it_would_run_is_asked_of_the_same_job(here, monkeypatch, gpus):
    """Else another node of the partition has the memory, and the job waits without an end."""
    fields = {"Partition": "a", "Account": "lab", "QOS": "(null)", "TimeLimit": "01:00:00", "NumNodes": "1"}
    monkeypatch.setattr(slurm, "field", lambda job, key: (fields | {"TresPerJob": gpus}).get(key, ""))
    monkeypatch.setenv("PATH", str(here))
    assert slurm.refusal("7", mem="2200") == "there is no sbatch"
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
    known = {"requeue": lambda *job: asked.append(job), "field": lambda *_: ""}
    assert stage("import sys; sys.exit(75)", **known) == 75 and asked == []
    monkeypatch.setenv(slurm.SITE, "{}")
    assert stage("import sys; sys.exit(75)", **known) == 75 and asked == [("7",)], "control: one of the profile's"


@pytest.mark.parametrize("ends", [75, 1, -15])
@pytest.mark.parametrize(("when", "count"), [("2026-11-26T21:40:19", 1), ("None", 0), ("", 0)])
def test_a_preempted_job_that_ends_in_its_grace_time_is_run_again(stage, monkeypatch, when, count, ends):
    """None: cancelled by a person; "": SLURM runs it again by itself, and has forgotten why it did. It ends otherwise
    than in words where it was still loading: torchrun with 1, one process of the signal."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(slurm.SITE, "{}")
    asked = []
    known = {"requeue": lambda *job: asked.append(job), "field": lambda job, key: {"PreemptTime": when}.get(key, "")}
    heard = f"lambda *_: sys.exit({ends})" if ends > 0 else "signal.SIG_DFL"
    script = f"import os, signal, sys, time; signal.signal(15, {heard}); os.kill(os.getppid(), 15); time.sleep(99)"
    assert stage(script, **known) == (ends if ends > 0 else 143) and asked == [("7",)] * count


@pytest.mark.parametrize(("state", "over"), [("COMPLETING", False), ("RUNNING", True)])
def test_a_job_that_is_preempted_for_good_is_run_again_before_it_is_killed(stage, monkeypatch, state, over):
    """The site's KillWait may be shorter than a step. RUNNING: in a grace time, which being run again would end."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(slurm.SITE, "{}")
    asked, fields = [], {"PreemptTime": "2026-11-26T21:40:19", "JobState": state}
    known = {"requeue": lambda *job: asked.append((*job, Path("over").exists()))}
    known["field"] = lambda job, key: fields.get(key, "")
    script = "import os, signal, time; signal.signal(15, lambda *_: time.sleep(3) or open('over', 'w') and "
    script += "os.kill(os.getpid(), 9)); os.kill(os.getppid(), 15); time.sleep(99)"
    assert stage(script, **known) == 137 and asked == [("7", over)]
    known["requeue"] = lambda *job: asked.append(job)
    asked.clear()
    saved = "import os, signal, sys, time; signal.signal(15, lambda *_: time.sleep(3) or sys.exit(75)); "
    assert stage(saved + "os.kill(os.getppid(), 15); time.sleep(99)", **known) == 75
    assert asked == [("7",)], "once: while its stage saved, or, in a grace time, when it had"


def test_a_limit_that_comes_before_the_stage_can_hear_of_it_is_a_limit(stage, here, monkeypatch):
    """Python that is still loading dies of the signal at once."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(slurm.SITE, "{}")
    asked, fields = [], {"Reason": "TimeLimit", "TimeLimit": "00:01:00"}
    known = {"requeue": lambda *job, **changes: asked.append(changes), "refusal": lambda *_, **__: ""}
    known["field"] = lambda job, key: fields.get(key, "")
    script = "import os, signal; signal.signal(15, 0); os.kill(os.getppid(), 15); os.kill(os.getpid(), 15)"
    assert stage(script, **known) == 143 and asked == [{"TimeLimit": "2"}]
    del fields["TimeLimit"]
    assert stage(script, **known) == 143 and asked.pop() == {}, "SLURM did not say what it was"
    shutil.rmtree(here / "results")
    fields["TimeLimit"] = "00:01:00"
    known["refusal"] = lambda *_, **__: "its partition allows 1 min"
    assert stage(script, **known) == 143 and asked.pop() == {}
    for _ in range(attempt.FRUITLESS - 1):
        assert stage(script, **known) == 143 and asked.pop() == {}
    with pytest.raises(UserError, match=r"raise stages\.sft\.runtime"):
        stage(script, **known)


def test_what_was_killed_is_told(stage, capsys):
    for number, name in ((9, "SIGKILL"), (11, "SIGSEGV")):
        assert stage(f"import os; os.kill(os.getpid(), {number})") == 128 + number
        assert f"error: {name} ended the stage (peak memory" in capsys.readouterr().err
    assert stage("import sys; sys.exit(2)") == 2
    assert "ended the stage" not in capsys.readouterr().err, "control"


@pytest.mark.parametrize(("job", "several", "heard"), [("7", True, 0), ("7", False, 1), ("", True, 1)])
def test_torchrun_in_a_job_hears_of_it_from_slurm(here, stage, monkeypatch, job, several, heard):
    """Else it hears three times, which ends it before its processes have saved; and an srun kills its step."""
    monkeypatch.setenv("SLURM_JOB_ID", job)
    if job:
        monkeypatch.setenv(slurm.SITE, "{}")
    script = "import os, signal, time; signal.signal(15, lambda *_: print('heard', file=open('heard', 'a'))); "
    script += "os.kill(os.getppid(), 15); time.sleep(1.5)"
    name = [sys.executable, "-c", script] + ["torch.distributed.run"] * several
    monkeypatch.setattr(launch, "command", lambda *_: name)
    kept = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        stop = attempt.Stop()
        attempt.Attempt(SFT).run(dict(os.environ), stop)
    finally:
        signal.signal(signal.SIGTERM, kept[0])
        signal.signal(signal.SIGINT, kept[1])
    assert stop.requested and (here / "heard").is_file() == bool(heard)


def limited(record: Path, settings: str = "{}", stage: str = "sft") -> None:
    """An attempt that ends at its time limit."""
    before = attempt.register(record, [stage, "--config", settings])
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
    assert attempt.register(record, ["sft", "--config", "newer"])["fruitless"] == attempt.FRUITLESS - 1, (
        "control: its own limits do"
    )


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("1:30", 1.5), ("59:00", 59), ("2:00:30", 120.5), ("1-01:00:00", 1500), ("UNLIMITED", 0), ("", 0), ("INVALID", 0)],
)
def test_slurms_times(text, minutes):
    assert slurm.minutes(text) == minutes


def test_checkpoints_lie_in_scratch(stage, here, monkeypatch):
    monkeypatch.setenv(slurm.SITE, json.dumps({"scratch": str(here / "scratch")}))
    stage("import sys; sys.exit(2)")
    link = here / "results/x/sft/checkpoints"
    there = link.resolve()
    assert link.is_symlink() and there.is_relative_to(here / "scratch")
    monkeypatch.setenv(slurm.SITE, json.dumps({"scratch": str(here / "other")}))
    stage("import sys; sys.exit(2)")
    assert link.resolve() == there, "checkpoints are not left behind where another scratch is set"
    shutil.rmtree(there)
    stage("import sys; sys.exit(2)")
    assert link.resolve().is_relative_to(here / "other"), "control: where they are gone"


def holder(folder: str, pipe) -> None:
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    os.environ["TMPDIR"] = folder
    cards.present.cache_clear()
    pipe.send(cards.take(1)[0])
    time.sleep(60)


def test_the_memory_is_that_of_the_smallest_gpu_that_may_be_used(tmp_path, monkeypatch):
    """In GB, of those in CUDA_VISIBLE_DEVICES; none is told where nvidia-smi does not say it."""
    sizes = 'case "$2" in 1) echo 81559;; 0,1) printf "24576\\n81559\\n";; *) echo "[N/A]";; esac'
    (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\n[ "$1" = -i ] || {{ echo 0; exit; }}\n{sizes}\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for visible, memory in (("0,1", 24576 * 2**20 / 1e9), ("1", 81559 * 2**20 / 1e9), ("7", None), ("", None)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        cards.present.cache_clear()
        cards.memory_gb.cache_clear()
        assert cards.memory_gb() == memory
    cards.present.cache_clear()
    cards.memory_gb.cache_clear()


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
    fetch = "from posttrain.ground import credentials; import os; credentials.reveal(); print(os.environ['HF_TOKEN'])"
    shown = subprocess.run([sys.executable, "-c", fetch], capture_output=True, text=True)
    assert shown.stdout == "secret\n"


def test_a_container_is_entered_by_each_process_that_starts_others(here, monkeypatch):
    monkeypatch.setenv(slurm.SITE, sites.Site(container="a.sif").model_dump_json(exclude_none=True))
    monkeypatch.setattr(cards, "given", lambda environment: {"gpus": 0, "gpu": None})  # it starts a process too
    started, stop = [], type("Stop", (), {"requested": False, "requeued": False})
    monkeypatch.setattr(
        attempt.subprocess,
        "Popen",
        lambda command, **_: started.append(command) or type("Child", (), {"poll": lambda _: 0, "returncode": 0})(),
    )
    attempt.Attempt(SFT).run({}, stop)
    attempt.Attempt(SFT).run({"CUDA_VISIBLE_DEVICES": "0,1"}, stop)
    with_scratch = sites.Site(container="a.sif", scratch="/$SCRATCH_OF/me")
    monkeypatch.setenv("SCRATCH_OF", "fast")
    monkeypatch.setenv(slurm.SITE, with_scratch.model_dump_json(exclude_none=True))
    attempt.Attempt(SFT).run({}, stop)
    assert started[2][:6] == ["apptainer", "exec", "--nv", "--bind", "/fast/me", "a.sif"], "else its link leads nowhere"
    inside = ["apptainer", "exec", "--nv", "a.sif", "python", "-m"]
    assert started[0] == [*inside, "posttrain", *SFT]
    assert started[1][: len(inside) + 1] == [*inside, "torch.distributed.run"]


def test_accelerate_shares_nothing_out_on_cpus(monkeypatch):
    from posttrain.training import parallel

    monkeypatch.setattr(parallel, "sharded", True)
    assert parallel.sharding() == {}, "one process has nothing to share"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--shard needs GPUs"):
        parallel.sharding()

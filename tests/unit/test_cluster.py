"""A site's settings: what they ask of SLURM, how jobs are told of them, and what is refused in them."""

import os
import re
import shutil
from pathlib import Path

import pytest
import yte

from posttrain.cluster import sites
from posttrain.dag.artifacts import Artifact
from posttrain.engine import executor, versions
from posttrain.ground.errors import UserError
from posttrain.jobs import attempt, cards, launch, slurm
from posttrain.resources import estimates

SFT, DPO = Artifact("one", "sft"), Artifact("one", "dpo")


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
    assert sites.enter(workflow) is None and workflow.global_resources == {"gpu": 2}
    given = Workflow(None, given={"gpu": 1})
    sites.enter(given)
    assert given.global_resources == {"gpu": 1}, "what the user says comes first"
    queue = Workflow(32)
    assert sites.enter(queue) == sites.Site() and queue.global_resources == {}, "a queue counts for itself"
    assert os.environ["POSTTRAIN_DEVICE"] == "gpu", "whatever the login node has"


def test_another_slurm_executor_is_refused_before_it_is_patched(here, monkeypatch):
    """Its methods may have other names, and a patch would end with Python's words."""
    patched = []
    for name in ("report_states", "submit_when_slurm_answers"):
        monkeypatch.setattr(executor, name, lambda *_: patched.append("patched"))
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"slurm: found version .*, needed is 1\.2\.3"):
        patch.setattr(versions, "SLURM_EXECUTOR", "1.2.3")
        sites.enter(Workflow(32))
    assert patched == []
    sites.enter(Workflow(32))
    assert patched == ["patched"] * 2, "control: the pinned version"


def test_jobs_are_told_of_the_site_as_it_was_when_their_run_began(here):
    (here / "slurm").mkdir()
    (here / "slurm/site.yaml").write_text("partition: a\nmodules: [cuda/12.6]\nstages: {sft: {gpu: 2}}\n")
    found = sites.enter(Workflow(32))
    (here / "slurm/site.yaml").write_text("partition: b\n")
    assert sites.enter(Workflow(None, main=False)) == found and found.partition == "a"
    assert sites.shell_prefix(found).endswith("module load cuda/12.6; ")
    assert sites.shell_prefix(found).startswith("set -euo pipefail; trap '' TERM; ")
    assert sites.enter(Workflow(None)) is None and sites.of_job() is None, "control: a run on this machine has none"


def test_what_snakemake_would_read_as_python_is_a_text(here):
    """`all` and `open` are functions of Python's, 12_34 and 1e5 numbers."""
    odd = {"partition": "all", "account": "12_34", "qos": "1e5", "constraint": "a&b|c", "gpu_type": "3090"}
    asked = sites.default_resources(sites.Site(**odd))
    assert [eval(asked[key]) for key in ("slurm_partition", "slurm_account", "qos", "constraint", "gpu_model")] == [
        *odd.values()
    ]


def test_a_gpu_type_that_cannot_be_asked_for_is_refused(here):
    (here / "slurm").mkdir()
    (here / "slurm/site.yaml").write_text("gpu_type: nvidia_a100-sxm4-80gb\n")
    with pytest.raises(UserError, match=r"^slurm/site.yaml:1: gpu_type: .* choose by partition or constraint$"):
        sites.read()
    (here / "slurm/site.yaml").write_text("gpu_type: a100_80.gb\n")
    assert sites.read().gpu_type == "a100_80.gb", "control"


def test_no_estimate_is_over_the_partitions_limit(here, monkeypatch):
    """SLURM would let such a job wait for ever; where the site's file says more, the doctor says so."""
    said = "debug*|30:00\nlong|7-00:00:00\nopen|infinite\n"
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: said)
    known = {None: 30, "debug": 30, "long": 10080, "debug,long": 10080, "open": 0, "debug,open": 0, "none": 0}
    assert {partition: slurm.time_limit(partition) for partition in known} == known
    monkeypatch.setattr(estimates, "request", lambda *_: {"gpu": 1, "mem_mb": 1000, "runtime": 720, "disk_mb": 1})
    site = sites.Site(stages={"sft": sites.Request(runtime=50)})
    assert sites.request(sites.limited(site), None, DPO)["runtime"] == 30
    assert sites.request(sites.limited(site), None, SFT)["runtime"] == 50, "control: what the site says"
    mine = sites.limited(sites.Site(partition="open", max_runtime=60))
    assert sites.request(mine, None, DPO)["runtime"] == 60
    assert sites.request(sites.limited(sites.Site(partition="open")), None, DPO)["runtime"] == 720
    monkeypatch.setattr(slurm, "field", lambda job, key: {"Partition": "debug"}.get(key, ""))
    assert slurm.refusal("7", time="60") == "its partition allows 30 min"


@pytest.mark.parametrize(("scratch", "is_"), [("scr", "scr"), ("/$GONE/a", "/$GONE/a"), ("~/a", ""), ("/a/$USER", "")])
def test_scratch_is_a_place_that_every_node_finds(here, monkeypatch, scratch, is_):
    monkeypatch.setenv("USER", "me")
    monkeypatch.delenv("GONE", raising=False)
    (here / "slurm").mkdir()
    (here / "slurm/site.yaml").write_text(f"scratch: {scratch}\n")
    if is_:
        with pytest.raises(
            UserError, match=f"^slurm/site.yaml:1: scratch: '{re.escape(scratch)}' is .*: give a folder"
        ):
            sites.read()
    else:
        assert launch.scratch(sites.read().scratch) == Path(
            scratch.replace("~", os.environ["HOME"]).replace("$USER", "me")
        )


def test_the_users_own_filters_of_slurm_are_not_for_this_run(here, monkeypatch):
    """SQUEUE_STATES=RUNNING hides jobs that wait, which would be started again; SBATCH_SIGNAL ends them."""
    own = {"SQUEUE_STATES": "RUNNING", "SBATCH_SIGNAL": "USR1@60", "SBATCH_WAIT": "1", "SBATCH_ACCOUNT": "lab"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    watched = []
    monkeypatch.setattr(sites.executor, "report_states", lambda settle: watched.append(True))
    sites.enter(Workflow(32))
    assert watched, "and the plugin takes states from us"
    assert own.keys() & os.environ.keys() == {"SBATCH_ACCOUNT"}, "control: what a site needs is kept"


def test_a_run_on_a_machine_without_slurm_ends_at_once(here, monkeypatch, capsys):
    """Control: who only looks needs none."""
    monkeypatch.setattr(shutil, "which", lambda name, **_: None if name in ("sbatch", "srun") else name)
    monkeypatch.setattr(slurm, "wait_until_reachable", lambda why: pytest.fail("it waits for a controller"))
    assert sites.read_for_profile(works=False) == sites.Site()
    with pytest.raises(SystemExit, match="2"):
        sites.read_for_profile(works=True)
    told = "SLURM: no sbatch, srun on PATH: log in to the cluster, or load its module of SLURM, or run on this machine"
    assert told in capsys.readouterr().err


def test_a_run_is_planned_when_slurm_answers(here, installed, monkeypatch, capsys):
    """A job that asks for more time than its partition allows is taken, and waits for ever."""
    waited = []
    monkeypatch.setattr(slurm, "wait_until_reachable", waited.append)
    assert sites.read_for_profile(works=False) == sites.Site() and not waited, "who only looks does not wait"
    assert sites.read_for_profile(works=True) == sites.Site() and len(waited) == 1

    def interrupted(why):
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "wait_until_reachable", interrupted)
    with pytest.raises(SystemExit, match="2"):
        sites.read_for_profile(works=True)
    assert "nothing was started" in capsys.readouterr().err


def test_the_profile_tells_who_works_from_who_looks(here, monkeypatch):
    profile, given = Path(__file__).parents[2] / "slurm/profile.yaml", []
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: "")
    monkeypatch.setattr(sites, "read_for_profile", lambda works: given.append(works) or sites.Site())
    for call in (["snakemake", "--profile", "slurm", "-n"], ["snakemake", "--profile", "slurm"]):
        monkeypatch.setattr("sys.argv", call)
        assert yte.process_yaml(profile.read_text(), require_use_yte=True)["executor"] == "slurm"
    assert given == [False, True]


def test_every_mistake_in_the_sites_file_is_told_with_its_line(here):
    (here / "slurm").mkdir()
    (here / "slurm/site.yaml").write_text("partitoin: a\njobs: none\nstages: {sft: {gpu: -1}, sftt: {gpu: 1}}\n")
    with pytest.raises(UserError) as error:
        sites.read()
    assert [problem.split(": ")[:2] for problem in sorted(error.value.problems)] == [
        ["slurm/site.yaml:1", "partitoin"], ["slurm/site.yaml:2", "jobs"], ["slurm/site.yaml:3", "stages.sft.gpu"],
        ["slurm/site.yaml:3", "stages.sftt"]
    ]  # fmt: skip


def test_weights_are_shared_out_where_the_site_says_so(here, stage, monkeypatch):
    (here / "slurm").mkdir()
    (here / "slurm/site.yaml").write_text("stages: {sft: {gpu: 2, shard: true}, ppo: {shard: true}}\n")
    with pytest.raises(
        UserError, match=r"^slurm/site.yaml:1: stages.ppo.shard: only sft, reward, dpo, kto, longctx can$"
    ):
        sites.read()
    (here / "slurm/site.yaml").write_text("stages: {sft: {gpu: 2, shard: true}}\n")
    monkeypatch.setenv(slurm.SITE, sites.read().model_dump_json(exclude_none=True))
    given = "import sys; print(*sys.argv, file=open('given', 'w'))"
    stage(given)
    assert (here / "given").read_text().split()[-1] == "--shard"
    stage(given, name="dpo")
    assert "--shard" not in (here / "given").read_text(), "control: a stage of which it says nothing"


SPREAD = "gpu_type: a100\nstages: {sft: {gpu: 4, nodes: 2}, dpo: {gpu: 4}, reward: {gpu: 1}}\n"


def test_a_stage_is_spread_over_the_nodes_that_the_site_gives_it(here, monkeypatch):
    (here / "slurm").mkdir()
    (here / "slurm/site.yaml").write_text(SPREAD)
    found = sites.read()
    assert sites.default_resources(found)["nodes"] == 1 and sites.default_resources(found)["gpu_model"] == "'a100'"
    assert sites.stage_resources(found) == {
        "sft": {"cpus_per_task": 4, "nodes": 2, "gpus": 2,
                "slurm_extra": "'--open-mode=append --gpus-per-node=a100:2'"},
        "dpo": {"cpus_per_task": 8},
    }  # fmt: skip
    monkeypatch.setenv(slurm.SITE, found.model_dump_json(exclude_none=True))
    started = []
    monkeypatch.setattr(launch, "command", lambda *given: started.append(given) or ["true"])
    for name in ("sft", "dpo"):
        stop = type("Stop", (), {"requested": False, "requeued": False})
        trial = attempt.Attempt([name, "--config", "{}", "--output", f"results/x/{name}/manifest.json"])
        trial.run({"CUDA_VISIBLE_DEVICES": "0,1", "PATH": os.environ["PATH"]}, stop)
    assert [given[1:3] for given in started] == [(2, 2), (2, 1)]


def test_nodes_without_as_many_gpus_each_are_refused(here):
    (here / "slurm").mkdir()
    (here / "slurm/site.yaml").write_text(
        "stages:\n  sft: {gpu: 3, nodes: 2}\n  ppo: {nodes: 2}\n  dpo: {gpu: 2, nodes: 4}\n"
        "  evaluate: {gpu: 2, nodes: 2}\n  reward: {gpu: 4, nodes: 4}\n  base: {gpu: 0}\n  longctx: {nodes: 1}\n"
    )
    with pytest.raises(UserError) as error:
        sites.read()
    whole = "set stages.{0}.gpu to a multiple of {1}"
    assert [problem.removeprefix("slurm/site.yaml:") for problem in error.value.problems] == [
        f"2: stages.sft.nodes: 3 GPUs cannot be divided evenly over 2 nodes; {whole.format('sft', 2)}",
        f"3: stages.ppo.nodes: 0 GPUs cannot be divided evenly over 2 nodes; {whole.format('ppo', 2)}",
        f"4: stages.dpo.nodes: 2 GPUs cannot be divided evenly over 4 nodes; {whole.format('dpo', 4)}",
        "5: stages.evaluate.nodes: only base, sft, reward, ppo, grpo, dpo, kto, longctx can run on several nodes",
    ]

"""What the doctor says of a cluster, by what SLURM would answer there."""

import os
import subprocess
import sys

import pytest

from posttrain import __main__ as command
from posttrain.cluster import sites
from posttrain.cluster.sites import Request, Site
from posttrain.dag import campaign
from posttrain.dag.artifacts import Artifact
from posttrain.jobs import slurm
from posttrain.tools import doctor, why

SINFO = "normal*|up|gpu:a100:4(S:0-1)\nlow|up|gpu:v100:2,gpu:a40:1\nold|down|gpu:k80:8\ncores|up|(null)\n"


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ({}, "ok       partition: normal, GPUs: a100"),
        ({"partition": "normal,low", "gpu_type": "a40"}, "ok       partition: normal,low, GPUs: a100, a40, v100"),
        ({"partition": "normal", "gpu_type": "a40"}, "MISSING  GPU type: normal has no a40"),
        ({"partition": "normal,gone"}, "MISSING  partition: there is no gone"),
        ({"partition": "normal,old"}, "MISSING  partition: old is down"),
        ({"partition": "cores"}, "MISSING  GPUs: cores has none"),
        ({"partition": "cores", "cpu_only": True}, "ok       partition: cores, without GPUs"),
    ],
)
def test_each_of_a_list_of_partitions_is_looked_at(monkeypatch, site, said):
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: SINFO)
    assert doctor.partition(Site(**site), None)[0] == said


def test_what_is_over_a_partitions_limit_is_missing_though_sbatch_takes_it(monkeypatch):
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: "debug*|30:00\n")
    monkeypatch.setattr(why, "to_make", lambda plan: [Artifact("one", "sft"), Artifact("one", "dpo")])
    needs = {"sft": 50, "dpo": 30}
    asked = {"gpu": 1, "mem_mb": 1000}
    monkeypatch.setattr(sites, "request", lambda site, plan, artifact: asked | {"runtime": needs[artifact.stage]})
    accepted = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: accepted)
    lines = doctor.jobs(Site(stages={"sft": Request(runtime=50)}), None)
    assert lines == [
        "MISSING  sft (1000 MB, 50 min, 1 GPU): the partition lets a job run 30 min",
        "         -> lower stages.sft.runtime in slurm/site.yaml",
        "ok       dpo (1000 MB, 30 min, 1 GPU): would be accepted",
    ]


@pytest.mark.parametrize(
    ("site", "todo"),
    [({}, "set stages.sft in"), ({"constraint": "ib", "qos": "q"}, "set qos, constraint, stages.sft in")],
)
def test_what_is_to_be_set_is_what_sbatch_was_given(monkeypatch, site, todo):
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: "")
    monkeypatch.setattr(why, "to_make", lambda plan: [Artifact("one", "sft")])
    monkeypatch.setattr(sites, "request", lambda *_: {"gpu": 1, "mem_mb": 1000, "runtime": 9})
    refused = subprocess.CompletedProcess([], 1, "", "allocation failure: Invalid feature specification\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: refused)
    said, what = doctor.jobs(Site(**site), None)
    assert said.endswith(": Invalid feature specification") and f"-> {todo} slurm/site.yaml" in what


@pytest.mark.parametrize(
    ("site", "todo"),
    [({}, ", or set container"), ({"container": "a.sif"}, "; container in slurm/site.yaml must be what they have")],
)
def test_a_container_that_does_not_start_is_named(here, monkeypatch, site, todo):
    refused = subprocess.CompletedProcess([], 1, "", "apptainer: not found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: refused)
    assert doctor.environment(Site(**site), None)[1].endswith(f"(make setup here){todo}")


PROBE = """
import json
print(json.dumps({"versions": {"lm_eval": "0.4.9", "torch": "2.1+cpu"}, "gpus": 0, "python": "here",
                  "other_package": None}))
"""


@pytest.mark.parametrize("name", ["a folder's place", "plain"])
def test_the_probe_is_found_whatever_the_folder_is_called(here, monkeypatch, name):
    """What `srun` would start on a node is run here, by the same shell."""
    (here / name / "envs").mkdir(parents=True)
    monkeypatch.chdir(here / name)
    (here / name / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(here / name / "python"))
    monkeypatch.setattr(doctor, "PROBE", PROBE)
    pins = here / name / "envs/requirements.txt"
    pins.write_text("# pins\ntorch==2.1\nlm-eval==0.4.9\n")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda call, **given: run(call[call.index("bash") :], **given))
    assert doctor.environment(Site(cpu_only=True), None) == ["ok       compute node: here, all pins, 0 GPU seen"]
    assert doctor.environment(Site(), None)[0] == "MISSING  compute node: torch sees no GPU", "control"
    pins.write_text("torch==2.2\nlm-eval==0.4.8\n")
    found = doctor.environment(Site(cpu_only=True), None)[0]
    assert found.endswith("other versions than the pins: lm_eval 0.4.9 for 0.4.8, torch 2.1+cpu for 2.2"), "control"
    monkeypatch.setattr(doctor, "PROBE", PROBE.replace("None", '("a.sif holds other code", "apptainer build a.sif")'))
    assert doctor.environment(Site(cpu_only=True), None)[1].endswith("-> apptainer build a.sif")
    assert not list((here / name).glob(".doctor-*")), "nothing is left"


def test_an_answer_that_srun_loses_is_read_and_none_is_told(here, monkeypatch):
    """An srun that exits with 0 and prints nothing: the first job answers, the second one never began."""
    run = subprocess.run

    def silent(call, **options):
        run(call[call.index("bash") :], **options)
        return subprocess.CompletedProcess(call, 0, "", "")

    monkeypatch.setattr(doctor, "PROBE", PROBE)
    (here / "envs").mkdir()
    (here / "envs/requirements.txt").write_text("torch==2.1\n")
    monkeypatch.setattr(subprocess, "run", silent)
    assert doctor.environment(Site(cpu_only=True), None) == ["ok       compute node: here, all pins, 0 GPU seen"]
    monkeypatch.setattr(subprocess, "run", lambda call, **_: subprocess.CompletedProcess(call, 0, "", ""))
    assert doctor.environment(Site(cpu_only=True), None)[0] == "MISSING  compute node: no output", "control"


def test_what_the_doctor_starts_on_a_node_knows_no_token(here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(command, "quiet_libraries", lambda _: None)
    monkeypatch.setattr(campaign, "load", lambda _: None)
    known = {}
    monkeypatch.setattr(doctor, "checks", lambda plan: known.update(os.environ) or ["ok"])
    assert command.main(["doctor"]) == 0
    assert "PATH" in known and "hf_secret" not in known.values()

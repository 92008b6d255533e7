"""The command line of a stage on its devices, and the split of a batch over them."""

import os
import subprocess
import sys

import pytest

from posttrain.ground.errors import UserError
from posttrain.jobs import launch
from posttrain.training import parallel, trainers

SFT = ["sft", "--config", "it's {a: 1}", "--output", "results/a/sft/manifest.json"]
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_JOB_ID=70001 SLURM_STEP_ID=3 SLURM_LAUNCH_NODE_IPADDR=10.0.0.7 exec "$@"
"""


def test_one_process_is_the_stage_alone():
    assert launch.command("sft", 1) == [sys.executable, "-m", "posttrain"]


def test_several_processes_meet_at_a_free_port():
    assert launch.command("sft", 4) == [
        sys.executable, "-m", "torch.distributed.run", "--shutdown-timeout=300", "--nproc-per-node=4", "--standalone",
        "-m", "posttrain",
    ]  # fmt: skip


def test_a_stage_without_work_to_share_is_started_once():
    assert launch.command("evaluate", 8, 2) == [sys.executable, "-m", "posttrain"]


@pytest.mark.parametrize(("processes", "nodes"), [(1, 2), (8, 4)])
def test_nodes_meet_at_a_port_of_the_step(tmp_path, monkeypatch, processes, nodes):
    """What a node's shell makes of the line, inside a step of SLURM; arguments keep their quotes and spaces."""
    made = [*launch.command("sft", processes, nodes), *SFT]
    assert made[:4] == ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    assert made[4:6] == ["--overlap", "--kill-on-bad-exit=1"]
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    show = [part if part != sys.executable else "printf" for part in made]
    show[show.index("printf") + 1] = "%s\n"  # in the place of -m
    said = subprocess.run(show, capture_output=True, text=True, check=True).stdout.splitlines()
    port = 15000 + (70001 * 31 + 3) % 15000
    assert said == [
        "torch.distributed.run", "--shutdown-timeout=300", f"--nproc-per-node={processes}", f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        "--rdzv-id=70001.3", f"--rdzv-endpoint=10.0.0.7:{port}", "-m", "posttrain", *SFT,
    ]  # fmt: skip


def test_a_step_over_all_nodes_is_told_nothing_of_the_one_that_starts_it():
    step = {"SLURM_NNODES": "1", "SLURM_STEP_ID": "0", "SRUN_DEBUG": "3", "SLURM_CPUS_PER_TASK": "4"}
    job = {"PATH": "/bin", "SLURM_JOB_ID": "7", "SLURM_CONF": "a", "CUDA_VISIBLE_DEVICES": "0"}
    assert launch.outside_step(step | job) == job | {"SRUN_CPUS_PER_TASK": "4"}
    assert launch.outside_step(job) == job


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_GPUS_ON_NODE": "4"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a,GPU-2b,GPU-3c", "SLURM_GPUS_ON_NODE": "8"}, 3),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_GPUS_ON_NODE": ""}, 1),
        ({"SLURM_CPUS_PER_TASK": "16", "OMP_NUM_THREADS": "4"}, 1),  # cores are no reason for processes
    ],
)
def test_a_process_for_each_gpu_that_the_job_sees(environ, count):
    assert launch.processes(environ) == count


@pytest.mark.parametrize(
    ("batch", "most", "processes", "expected"),
    [
        (32, None, 1, (32, 1)),
        (32, None, 4, (8, 1)),
        (32, 4, 1, (4, 8)),
        (32, 4, 2, (4, 4)),
        (32, 64, 2, (16, 1)),  # more would fit than there is
        (12, 4, 2, (3, 2)),  # 4 does not divide the 6 of a process: 3 is the most that does
        (14, 4, 2, (1, 7)),
    ],
)
def test_the_largest_micro_batch_that_shares_the_batch_evenly(batch, most, processes, expected):
    assert parallel.split(batch, most, processes) == expected


def test_every_split_makes_the_global_batch_and_stays_under_the_most():
    for batch in range(1, 40):
        for processes in (count for count in range(1, 9) if batch % count == 0):
            for most in (None, *range(1, 12)):
                micro, accumulation = parallel.split(batch, most, processes)
                assert micro * accumulation * processes == batch and micro <= (most or batch)
                larger = range(micro + 1, min(most or batch, batch // processes) + 1)
                assert not any(batch // processes % size == 0 for size in larger), (batch, most, processes)


def test_a_batch_that_processes_cannot_share_says_what_fits():
    with pytest.raises(UserError, match=r"batch_size 6 .* by 4 processes: start 1 or 2 or 3, .* multiple of 4, 8 for"):
        parallel.split(6, None, 4)


def test_more_gpus_than_processes_are_refused(monkeypatch, tmp_path):
    """transformers would give each GPU a whole micro-batch, and the global batch would be another."""
    from tiny import sft

    assert trainers.arguments(sft(), tmp_path)["gradient_accumulation_steps"] == 1
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="2 GPUs are visible to 1 processes"):
        trainers.arguments(sft(), tmp_path)


def test_a_runs_rows_are_passes_through_all_of_them(capsys):
    from tiny import sft

    rows = list(range(7))
    dealt = list(trainers.in_batches(rows, sft(steps=5, batch_size=4)))
    assert "20 rows are read in all: each of 7 2.86 times" in capsys.readouterr().err
    assert len(dealt) == 20 and sorted(dealt[:7]) == sorted(dealt[7:14]) == rows
    assert dealt[:7] != dealt[7:14] and dealt != list(trainers.in_batches(rows, sft(steps=5, batch_size=4, seed=1)))
    assert dealt[:12] == list(trainers.in_batches(rows, sft(steps=3, batch_size=4))), "a longer run begins as a shorter"
    filed = list(trainers.in_batches(rows, sft(steps=5, batch_size=4, order="file")))
    assert filed == (rows * 3)[:20]

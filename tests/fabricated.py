"""A campaign that looks done: artifacts as its stages would leave them, without any training; what would run again,
and for the campaign of every stage (`workflow/whole`) what should."""

import os
import sys
from pathlib import Path
from unittest import mock

import yaml

from posttrain.dag.frozen import summary
from posttrain.ground import code
from posttrain.ground.files import manifest_of, write_json
from posttrain.ground.identity import canonical, named
from posttrain.jobs.artifact import digests

MADE = {
    "prepare": ["data"],
    "ppo": ["model", "snapshots"],
    "grpo": ["model", "snapshots"],
    "reference": ["data"],
    "report": ["figures"],
}
MADE |= {stage: ["data"] for stage in ("evaluate", "compare", "lengths")} | {"algebra": []}


def fabricate(plan, folders=None, text: str = "") -> None:
    """Artifacts as the stages of a campaign would leave them, without any training."""
    for folder in map(Path, folders or plan.folders()):
        _, experiment, stage, policy = [*folder.parts, "", ""][:4] if len(folder.parts) > 2 else ("", "", "report", "")
        parts = MADE.get(stage, ["model"])
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts:
            (folder / part).mkdir(exist_ok=True)
            (folder / part / "bytes").write_text(f"{folder} {part}{text}")
        for name in (
            "metrics.json",
            "lm_eval.json",
            "table.csv",
            "table.md",
            "summary.txt",
            "curves.csv",
            "verdict.json",
            "compute.json",
            "index.html",
        ):
            (folder / name).write_text("{}")
        section = named(canonical(summary(plan))) if stage == "report" else plan.section(experiment, stage)
        inputs = plan.inputs(experiment, stage, policy)
        params = [section, plan.code[stage], plan.lineage(experiment, stage, policy)]
        for file in map(Path, inputs.get("fetched", [])):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        record = {"stage": stage, "params": params, "inputs": digests(inputs)}
        record |= {"seconds": 60.0, "started": "2026-11-30T10:00:00+00:00", "host": "node17", "identity": "c0ffee"}
        record |= {"shape": {"device": "cpu", "versions": {"torch": "2.13.0"}}, "git_commit": "unknown"}
        write_json(folder / "provenance.json", record | {"code": code.definitions(stage)})
        write_json(folder / "manifest.json", manifest_of(folder, [*parts, "metrics.json"]))


def rerun(looking: bool = False, **config) -> dict[str, str]:
    """Artifact -> reasons, of every job that Snakemake would run. What planning sets in the environment, and the
    secrets that it takes out of it, do not outlive it. looking: plan as `snakemake -n` does, not as a run."""
    from snakemake.api import ConfigSettings, DAGSettings, OutputSettings, ResourceSettings, SnakemakeApi
    from snakemake.settings.types import Quietness

    quiet = OutputSettings(quiet={Quietness.ALL}, dryrun=True)
    line = mock.patch.object(sys, "argv", ["snakemake", *(["-n"] if looking else [])])
    with line, mock.patch.dict(os.environ), SnakemakeApi(quiet) as api:
        flow = api.workflow(
            resource_settings=ResourceSettings(cores=1),
            config_settings=ConfigSettings(config=config),
            snakefile=Path("workflow/Snakefile"),
        )
        flow.dag(DAGSettings()).execute_workflow(executor="dryrun")
        dag = flow._workflow.dag
        return {
            str(Path(job.output[0]).parent).removeprefix("results/"): str(dag.reason(job))
            for job in dag.jobs
            if dag.needrun(job) and job.output
        }


POLICIES = ("base", "sft", "ppo", "grpo", "dpo", "kto", "longctx")


def judged(judges: str, policies=POLICIES) -> set[str]:
    return {f"{judge}/{policy}" for judge in judges.split() for policy in policies}


ALL = {"base", "sft", "reward", "reference", "ppo", "grpo", "dpo", "kto", "longctx", "report"}
ALL |= judged("evaluate compare lengths")
ALIGNED = judged("evaluate lengths", ("sft", "ppo", "grpo", "dpo", "kto")) | judged("compare") | {"report"}
RERUN = {  # by the section that a key stands in, of the experiment `whole`
    "prepare": ALL | {"prepare"},
    "base": ALL,
    "sft": {"sft", "reward", "reference", "ppo", "grpo", "dpo", "kto"} | ALIGNED,
    "reward": {"reward", "ppo", "grpo", "report"} | judged("evaluate lengths", ["ppo", "grpo"]) | judged("compare"),
    "ppo": {"ppo", "report"} | judged("evaluate compare lengths", ["ppo"]),
    "grpo": {"grpo", "report"} | judged("evaluate compare lengths", ["grpo"]),
    "reference": {"reference", "dpo", "kto", "report"} | judged("evaluate compare lengths", ["dpo", "kto"]),
    "dpo": {"dpo", "report"} | judged("evaluate compare lengths", ["dpo"]),
    "kto": {"kto", "report"} | judged("evaluate compare lengths", ["kto"]),
    "longctx": {"longctx", "report"} | judged("evaluate compare lengths", ["longctx"]),
    "evaluate": {"report"} | judged("evaluate"),
    "compare": {"report"} | judged("compare"),
    "lengths": {"report"} | judged("lengths"),
    "algebra": {"algebra", "report"},
    "seed": ALL,
    "question": {"report"},
    "paper": {"report"},
    "claims": {"report"},
}


def put(values: dict, key: str, value) -> None:
    """Set a dotted key of nested mappings; `tasks[].x` of the first item of a list."""
    *above, last = key.split(".")
    for part in above:
        values = values[part[:-2]][0] if part.endswith("[]") else values.setdefault(part, {})
    values[last] = value


def edit(key: str, value) -> None:
    """Set a key of `whole`."""
    file = Path("config/experiments/whole.yaml")
    values = yaml.safe_load(file.read_text())
    put(values, key, value)
    file.write_text(yaml.safe_dump(values))


def forget() -> None:
    for cached in (code.module_parts, code.definitions, code.fingerprint_of):
        cached.cache_clear()

"""A campaign that looks done: artifacts as its stages would leave them, without any training; what would run again."""

from pathlib import Path

from posttrain import code
from posttrain.artifact import digests
from posttrain.files import write_json
from posttrain.identity import canonical, manifest_of, named

MADE = {"prepare": ["data"], "ppo": ["model", "snapshots"], "reference": ["data"], "report": ["figures"]}
MADE |= {stage: ["data"] for stage in ("evaluate", "compare", "lengths")}


def fabricate(plan, folders=None, text: str = "") -> None:
    """Artifacts as the stages of a campaign would leave them, without any training."""
    for folder in map(Path, folders or plan.folders()):
        _, experiment, stage, policy = [*folder.parts, "", ""][:4] if len(folder.parts) > 2 else ("", "", "report", "")
        parts = MADE.get(stage, ["model"])
        for part in parts:
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / "bytes").write_text(f"{folder} {part}{text}")
        for name in ("metrics.json", "lm_eval.json", "table.csv", "table.md", "curves.csv", "index.html"):
            (folder / name).write_text("{}")
        section = named(canonical(plan.summary())) if stage == "report" else plan.section(experiment, stage)
        inputs = plan.inputs(experiment, stage, policy)
        params = [section, plan.code[stage], plan.lineage(experiment, stage, policy)]
        for file in map(Path, inputs.get("fetched", [])):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        record = {"stage": stage, "params": params, "inputs": digests(inputs)}
        write_json(folder / "provenance.json", record | {"seconds": 60.0, "code": code.code(stage)})
        write_json(folder / "manifest.json", manifest_of(folder, parts))


def rerun(**config) -> dict[str, str]:
    """Artifact -> reasons, of every job that Snakemake would run; what a dry run finds."""
    from snakemake.api import ConfigSettings, DAGSettings, OutputSettings, ResourceSettings, SnakemakeApi
    from snakemake.settings.types import Quietness

    with SnakemakeApi(OutputSettings(quiet={Quietness.ALL}, dryrun=True)) as api:
        flow = api.workflow(
            resource_settings=ResourceSettings(cores=1),
            config_settings=ConfigSettings(config=config),
            snakefile=Path("Snakefile"),
        )
        flow.dag(DAGSettings()).execute_workflow(executor="dryrun")
        dag = flow._workflow.dag
        return {
            str(Path(job.output[0]).parent).removeprefix("results/"): str(dag.reason(job))
            for job in dag.jobs
            if dag.needrun(job) and job.output
        }

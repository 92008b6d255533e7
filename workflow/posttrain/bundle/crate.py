"""The metadata of a bundle: a Provenance Run Crate (Workflow Run RO-Crate 0.5, on RO-Crate 1.1).

Each stage of the table is a step with its tool (`posttrain STAGE`); each artifact is the result of one run of a tool.
"""

import datetime
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from posttrain.bundle.contents import Absent
from posttrain.config.stages import STAGES
from posttrain.ground.identity import record_of

PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/ro/wfrun/provenance/0.5": "Provenance Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
TERMS = "https://w3id.org/ro/terms/workflow-run/context"
SNAKEFILE, TABLE = "workflow/Snakefile", "results/report/table.csv"
BIOSCHEMAS = "https://bioschemas.org/profiles"
DONE, FAILED = "http://schema.org/CompletedActionStatus", "http://schema.org/FailedActionStatus"
USED = {  # field of a provenance -> (what it is, unit)
    "seconds": ("time by the clock", "http://qudt.org/vocab/unit/SEC"),
    "cpu_seconds": ("CPU time", "http://qudt.org/vocab/unit/SEC"),
    "peak_memory_mb": ("peak memory", "http://qudt.org/vocab/unit/MebiBYTE"),
    "peak_gpu_memory_mb": ("peak GPU memory", "http://qudt.org/vocab/unit/MebiBYTE"),
}
PLAIN = "text/plain"
TYPES = {
    "": PLAIN, ".rst": PLAIN, ".smk": PLAIN, ".j2": PLAIN, ".jinja": PLAIN, ".toml": PLAIN, ".sh": PLAIN,
    ".json": "application/json", ".jsonl": "application/jsonl", ".md": "text/markdown", ".html": "text/html",
    ".svg": "image/svg+xml", ".csv": "text/csv", ".txt": PLAIN, ".log": PLAIN, ".py": "text/x-python",
    ".yaml": "application/yaml", ".cff": "application/yaml",
}  # fmt: skip


class Crate:
    """The crate of a folder with the files of a bundle.

    index: the content of bundle.json. configs: paths of the campaign's config. digests: path -> sha256, of all files.
    """

    def __init__(self, folder: Path, index: dict, configs: list[str], absent: list[Absent], digests: dict[str, str]):
        from rocrate.rocrate import ROCrate

        self.folder, self.index, self.digests = folder, index, digests
        self.configs = [name for name in configs if name in digests]
        self.crate = ROCrate(folder, init=True, version="1.1")
        self.crate.metadata.extra_contexts.append(TERMS)
        self.agent = self.add("#authors", "Organization", name="the authors")
        made = [*index["artifacts"], *index["missing"]]
        self.stages = [name for name in STAGES if any(one["stage"] == name for one in made)]
        self.absent = {one.name: self.add_absent(one) for one in absent}

    def write(self) -> None:
        """Write `ro-crate-metadata.json` into the folder."""
        self.describe_files()
        self.describe_root()
        self.describe_workflow()
        runs = [self.add_run(one) for one in self.index["artifacts"]]
        runs += [self.add_failure(one) for one in self.index["missing"] if one["error"]]
        whole = self.add_whole()
        organized = self.add_orchestration(runs, whole)
        self.crate.root_dataset["mentions"] = [organized, whole, *runs]
        self.crate.metadata.write(self.folder)

    def add(self, id: str, type: str, **properties) -> dict[str, str]:
        """Add an entity that is no file; returns a reference to it. Empty properties are left out."""
        from rocrate.model.contextentity import ContextEntity

        values = {key: value for key, value in properties.items() if value not in (None, [], "")}
        self.crate.add(ContextEntity(self.crate, id, properties={"@type": type} | values))
        return {"@id": id}

    def describe_files(self) -> None:
        """Give each file its digest, size and type."""
        for name, digest in self.digests.items():
            entity = self.crate.get(quote(name))
            entity["sha256"], entity["contentSize"] = digest, str((self.folder / name).stat().st_size)
            entity["name"] = name
            entity["encodingFormat"] = TYPES.get(Path(name).suffix, "application/octet-stream")

    def describe_root(self) -> None:
        """Say what the crate is: its title, date, licence and profiles."""
        if readme := self.crate.get("README.md"):
            readme["about"] = {"@id": "./"}
        count, missing = len(self.index["artifacts"]), len(self.index["missing"])
        lack = f", without {missing} that are missing" if missing else ""
        what = f"{count} artifacts of a posttrain campaign{lack}, with what they were made from: see README-bundle.md"
        self.crate.name, self.crate.datePublished = self.index["title"], self.index["published"]
        self.crate.description = what
        self.crate.license = {"@id": "LICENSE"} if "LICENSE" in self.digests else "unknown"
        self.crate.root_dataset["conformsTo"] = [
            self.add(url, "CreativeWork", name=name, version=url.rpartition("/")[2]) for url, name in PROFILES.items()
        ]

    def describe_workflow(self) -> None:
        """The workflow with a step and a tool for each stage, and its parameters: config in, the report's table out."""
        for stage in self.stages:
            self.add(tool(stage), "SoftwareApplication", name=f"posttrain {stage}", description=STAGES[stage].help)
        steps = [
            self.add(f"#step-{stage}", "HowToStep", name=stage, position=str(number), workExample={"@id": tool(stage)})
            for number, stage in enumerate(self.stages, 1)
        ]
        version, place = self.index["snakemake"], self.folder / SNAKEFILE
        properties = {
            "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow", "HowTo"],
            "name": "posttrain",
            "version": self.index["version"],
            "sha256": self.digests[SNAKEFILE],
            "encodingFormat": PLAIN,
            "conformsTo": {"@id": f"{BIOSCHEMAS}/ComputationalWorkflow/1.0-RELEASE"},
            "hasPart": [{"@id": tool(stage)} for stage in self.stages],
            "step": steps,
        }
        workflow = self.crate.add_workflow(
            place, SNAKEFILE, properties=properties, main=True, lang="snakemake", lang_version=version
        )
        for key, name in (("input", self.configs[0]), ("output", TABLE)):
            if name in self.digests:
                id, file = f"#{key}", {"@id": quote(name)}
                workflow[key] = [self.add(id, "FormalParameter", name=key, additionalType="File", workExample=file,
                                          conformsTo={"@id": f"{BIOSCHEMAS}/FormalParameter/1.0-RELEASE"})]  # fmt: skip
                self.crate.get(quote(name))["exampleOfWork"] = {"@id": id}

    def add_run(self, one: dict) -> dict:
        """The run that made an artifact."""
        record, stage, folder = record_of(Path(one["name"])), one["stage"], f"{one['name']}/"
        read = [file for files in record["inputs"].values() for file in files if file in self.digests]
        made = [{"@id": quote(name)} for name in self.digests if name.startswith(folder)]
        made += [entity for name, entity in self.absent.items() if name.startswith(folder)]
        return self.add(
            run(one),
            "CreateAction",
            name=f"posttrain {stage}: {one['name']}",
            description=STAGES[stage].help,
            instrument={"@id": tool(stage)},
            object=[{"@id": quote(name)} for name in read],
            result=made,
            startTime=record.get("started"),
            endTime=ended(record.get("started"), record.get("seconds", 0.0)),
            agent=self.agent,
            actionStatus=DONE,
            resourceUsage=list(self.used(run(one), record)),
        )

    def used(self, id: str, record: dict) -> Iterator[dict]:
        """What a run used of time and memory."""
        for key, (name, unit) in USED.items():
            if record.get(key) is not None:
                value, what = str(record[key]), f"https://w3id.org/ro/terms/posttrain#{key}"
                yield self.add(f"{id}-{key}", "PropertyValue", name=name, propertyID=what, value=value, unitCode=unit)

    def add_failure(self, one: dict) -> dict:
        """The run that failed to make an artifact."""
        return self.add(
            run(one),
            "CreateAction",
            name=f"posttrain {one['stage']}: {one['name']}",
            description=f"failed: {STAGES[one['stage']].help}",
            instrument={"@id": tool(one["stage"])},
            endTime=one["when"] or self.index["published"],
            agent=self.agent,
            actionStatus=FAILED,
            error=one["error"],
        )

    def add_absent(self, one: Absent) -> dict:
        """A file that is not in the bundle."""
        return self.add(
            f"#{quote(one.name)}", "CreativeWork", name=one.name, sha256=one.sha256, contentSize=str(one.size),
            identifier=one.place,
        )  # fmt: skip

    def add_whole(self) -> dict:
        """The run of the workflow."""
        missing = len(self.index["missing"])
        return self.add(
            "#run",
            "CreateAction",
            name=f"snakemake: {self.index['title']}",
            description="The run of the workflow",
            instrument={"@id": SNAKEFILE},
            object=[{"@id": quote(name)} for name in self.configs],
            result=[{"@id": quote(name)} for name in self.digests if name.startswith("results/report/")]
            or [{"@id": quote(f"{one['name']}/manifest.json")} for one in self.index["artifacts"]],
            startTime=self.index["started"],
            endTime=self.index["published"],
            agent=self.agent,
            actionStatus=FAILED if missing else DONE,
            error=f"{missing} artifacts are missing" if missing else None,
        )

    def add_orchestration(self, runs: list[dict], whole: dict) -> dict:
        """Snakemake's part: it ran each step's tool."""
        stage_of = {run(one): one["stage"] for one in [*self.index["artifacts"], *self.index["missing"]]}
        controls = [
            self.add(f"#control{ref['@id'][4:]}", "ControlAction", name=f"starts {ref['@id'][5:]}", object=ref,
                     instrument={"@id": f"#step-{stage_of[ref['@id']]}"})
            for ref in runs
        ]  # fmt: skip
        version, url = self.index["snakemake"], "https://snakemake.github.io"
        engine = self.add(url, "SoftwareApplication", name="Snakemake", url=url, softwareVersion=version)
        return self.add(
            "#orchestration",
            "OrganizeAction",
            name="Snakemake runs the stages",
            instrument=engine,
            object=controls,
            result=whole,
            startTime=self.index["started"],
            endTime=self.index["published"],
            agent=self.agent,
        )


def run(one: dict) -> str:
    """The id of the run that makes an artifact."""
    return f"#run-{quote(one['name'].partition('/')[2])}"


def tool(stage: str) -> str:
    """The id of a stage's tool."""
    return f"#posttrain-{stage}"


def ended(started: str | None, seconds: float) -> str | None:
    """When a run ended, from its start and its seconds; None where its start is unknown."""
    if started is None:
        return None
    return (datetime.datetime.fromisoformat(started) + datetime.timedelta(seconds=round(seconds))).isoformat()

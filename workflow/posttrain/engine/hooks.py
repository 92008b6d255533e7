"""What runs before the first job and after the last one, also where another Snakefile imports this one by `module:`."""

from posttrain.dag.artifacts import Artifact, at

HOOKS = ("onstart", "onsuccess", "onerror")


def run_in_modules(workflow) -> None:
    """Run the hooks of this Snakefile also where it is imported as a module, beside those of the main Snakefile.

    Snakemake runs those of the main Snakefile alone; the guard against a second Snakemake would then be left out.
    """
    for name in HOOKS:

        def register(function, name=name):
            earlier = getattr(workflow, f"_{name}")
            setattr(workflow, f"_{name}", lambda log: (earlier(log), function(log)))

        setattr(workflow, name, register)


def to_make(workflow) -> list[Artifact]:
    """The artifacts that the jobs of a run make, known once it starts; none under `--touch`."""
    jobs = [] if workflow.touch else workflow.dag.needrun_jobs(exclude_finished=False)
    made = (str(job.output[0]) for job in jobs if job.output)
    return [at(file) for file in made if file.startswith("results/") and file.endswith("/manifest.json")]

# posttrain: one campaign in, one report out. config/ says what, workflow/rules says when, workflow/posttrain says
# how, results/ says so. `snakemake -n` shows what would run; `--configfile` chooses another campaign.

from snakemake.utils import min_version

min_version("9.0")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/fetch.smk"
include: "workflow/rules/stages.smk"
include: "workflow/rules/report.smk"


localrules:
    all,


rule all:
    default_target: True
    input:
        "results/report/manifest.json",


# Jobs that wait in a queue must not read a later edit of the config: they are told of the plan by the name of its content.
onstart:
    gc.enable()
    try:
        controller.claim()
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        sys.exit(2)
    os.environ[FROZEN] = write_named(freeze(PLAN))
    write_named(SUMMARY)


onsuccess:
    made = Path(
        "results/report/manifest.json"
    ).exists()  # not after a single target
    if made and os.environ.get("POSTTRAIN_SUMMARY") != "later":
        shell("posttrain summary results/report")


# A failed experiment does not withhold the others: what exists is rendered, and marked as partial.
onerror:
    shell(
        "posttrain report --partial --campaign {CAMPAIGN} --output results/report/manifest.json; "
        "posttrain summary results/report"
    )
    if ended := status.failed_jobs(log, controller.HOLDER.stat().st_mtime):
        print(ended, file=sys.stderr)

# The table, the figures, the page and the verdict, from the records alone; the target that reads the verdict; and the
# bundle for a reviewer.


localrules:
    report,
    verify,
    bundle,


rule report:
    input:
        evaluations=PLAN.inputs("", "report")["evaluations"],
    output:
        manifest="results/report/manifest.json",
        table=report(
            "results/report/table.csv",
            caption="../report/table.rst",
            category="report",
        ),
        markdown="results/report/table.md",
        summary="results/report/summary.txt",
        metrics="results/report/metrics.json",
        curves="results/report/curves.csv",
        verdict="results/report/verdict.json",
        compute="results/report/compute.json",
        page=report(
            "results/report/index.html",
            caption="../report/report.rst",
            category="report",
        ),
    log:
        "results/logs/report.log",
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=1000,
        runtime=20,
    params:
        campaign=CAMPAIGN,
        code=PLAN.code["report"],
        lineage=LINEAGE,
    shell:
        POSTTRAIN
        + " report --campaign {params.campaign} --code {params.code} --lineage {params.lineage}"
        + (" --claimed" if PLAN.verifying else "")
        + " --output {output.manifest} 2>&1 | tee -i {log}"


# `snakemake bundle` packs a finished campaign; `posttrain bundle --partial` packs one that has failed in part.
rule bundle:
    input:
        "results/report/manifest.json",
    output:
        "results/bundle.zip",
    log:
        "results/logs/bundle.log",
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
    params:
        campaign=CAMPAIGN,
    shell:
        POSTTRAIN
        + " bundle {params.campaign}"
        + " --output {output} 2>&1 | tee -i {log}"


# `snakemake verify` makes what the claims need, and fails where one of them does not hold.
rule verify:
    input:
        verdict="results/report/verdict.json",
    log:
        "results/logs/verify.log",
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=1000,
        runtime=20,
    shell:
        POSTTRAIN + " verdict {input.verdict} 2> {log}"

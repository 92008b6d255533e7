# The table, the figures and the page, from the records alone.


localrules:
    report,


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
        + " report --campaign {params.campaign} --code {params.code} --lineage {params.lineage} --output {output.manifest} 2>&1 | tee -i {log}"

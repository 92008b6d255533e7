# Data: read, checked line by line, split, measured.


rule prepare:
    input:
        unpack(inputs("prepare")),
    output:
        manifest="results/{experiment}/prepare/manifest.json",
        data=directory("results/{experiment}/prepare/data"),
        metrics=report(
            "results/{experiment}/prepare/metrics.json",
            caption="../report/prepare.rst",
            category="prepare",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/prepare.log",
    benchmark:
        "results/benchmarks/{experiment}/prepare.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=120,
    params:
        section=section("prepare"),
        code=code("prepare"),
        lineage=lineage("prepare"),
        inputs=options,
    shell:
        "posttrain prepare --config {params.section:q} --code {params.code} --lineage {params.lineage} {params.inputs} --output {output.manifest} "
        "2>&1 | tee {log}"

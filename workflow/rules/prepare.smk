# Data: read, checked line by line, split, measured.


rule prepare:
    input:
        config="results/{experiment}/prepare/config.yaml",
        fetched=fetched("prepare"),
        files=local_files("prepare"),
    output:
        manifest="results/{experiment}/prepare/manifest.json",
        data=directory("results/{experiment}/prepare/data"),
        metrics=report(
            "results/{experiment}/prepare/metrics.json",
            caption="../report/prepare.rst",
            category="prepare",
            labels={"experiment": "{experiment}"},
        ),
        provenance="results/{experiment}/prepare/provenance.json",
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
    shell:
        "posttrain prepare --config {input.config} --fetched {input.fetched} --output {output.manifest} 2>&1 "
        "| tee {log}"

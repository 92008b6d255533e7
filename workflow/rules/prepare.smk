# Data: read, checked line by line, split, measured.


rule prepare:
    input:
        inputs("prepare"),
    output:
        manifest="results/{experiment}/prepare/manifest.json",
        metrics=report(
            "results/{experiment}/prepare/metrics.json",
            caption="../report/prepare.rst",
            category="prepare",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/prepare.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=120,
    params:
        arguments=arguments("prepare"),
    shell:
        "posttrain prepare {params.arguments} --output {output.manifest} 2>&1 | tee {log}"

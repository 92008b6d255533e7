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
        gpu=need("prepare", "gpu"),
        mem_mb=need("prepare", "mem_mb"),
        runtime=need("prepare", "runtime"),
        disk_mb=need("prepare", "disk_mb"),
    params:
        arguments=arguments("prepare"),
    shell:
        "posttrain attempt --gpus {resources.gpu} prepare {params.arguments} --output {output.manifest} 2>&1 | tee -i {log}"

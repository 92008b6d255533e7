# The untouched model: given, fetched, or trained from scratch on the prepared text.


rule base:
    input:
        inputs("base"),
    output:
        manifest="results/{experiment}/base/manifest.json",
        metrics=report(
            "results/{experiment}/base/metrics.json",
            caption="../report/base.rst",
            category="base",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/base.log",
    conda:
        "../../envs/environment.yaml"
    threads: 2
    resources:
        gpu=need("base", "gpu"),
        mem_mb=need("base", "mem_mb"),
        runtime=need("base", "runtime"),
        disk_mb=need("base", "disk_mb"),
    params:
        arguments=arguments("base"),
    shell:
        "posttrain attempt --gpus {resources.gpu} base --threads 2 {params.arguments} --output {output.manifest} 2>&1 | tee -i {log}"

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
        gpu=1,
        mem_mb=8000,
        runtime=720,
    params:
        arguments=arguments("base"),
    shell:
        "posttrain base --threads 2 {params.arguments} --output {output.manifest} 2>&1 | tee {log}"

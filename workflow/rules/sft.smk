# Supervised fine-tuning of the base.


rule sft:
    input:
        inputs("sft"),
    output:
        manifest="results/{experiment}/sft/manifest.json",
        metrics=report(
            "results/{experiment}/sft/metrics.json",
            caption="../report/sft.rst",
            category="sft",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/sft.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    params:
        arguments=arguments("sft"),
    shell:
        "posttrain sft {params.arguments} --output {output.manifest} 2>&1 | tee {log}"

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
        gpu=need("sft", "gpu"),
        mem_mb=need("sft", "mem_mb"),
        runtime=need("sft", "runtime"),
        disk_mb=need("sft", "disk_mb"),
    params:
        arguments=arguments("sft"),
    shell:
        "posttrain attempt --gpus {resources.gpu} sft {params.arguments} --output {output.manifest} 2>&1 | tee -i {log}"

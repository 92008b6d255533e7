# A policy's own answers to held-out prompts, beside those of the SFT policy.


rule compare:
    input:
        inputs("compare"),
    output:
        manifest="results/{experiment}/compare/{policy}/manifest.json",
        metrics=report(
            "results/{experiment}/compare/{policy}/metrics.json",
            caption="../report/compare.rst",
            category="compare",
            labels={"experiment": "{experiment}", "policy": "{policy}"},
        ),
    log:
        "results/logs/{experiment}/compare/{policy}.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=need("compare", "gpu"),
        mem_mb=need("compare", "mem_mb"),
        runtime=need("compare", "runtime"),
        disk_mb=need("compare", "disk_mb"),
    params:
        arguments=arguments("compare"),
    shell:
        "posttrain attempt --gpus {resources.gpu} compare {params.arguments} --output {output.manifest} 2>&1 | tee -i {log}"

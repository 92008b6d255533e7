# Log-probabilities of the preference pairs under the SFT policy, for every DPO run.


rule reference:
    input:
        inputs("reference"),
    output:
        manifest="results/{experiment}/reference/manifest.json",
        metrics=report(
            "results/{experiment}/reference/metrics.json",
            caption="../report/reference.rst",
            category="reference",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/reference.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=need("reference", "gpu"),
        mem_mb=need("reference", "mem_mb"),
        runtime=need("reference", "runtime"),
        disk_mb=need("reference", "disk_mb"),
    params:
        arguments=arguments("reference"),
    shell:
        "posttrain attempt --gpus {resources.gpu} reference {params.arguments} --output {output.manifest} 2>&1 | tee -i {log}"

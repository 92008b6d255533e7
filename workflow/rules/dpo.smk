# Direct preference optimisation from the SFT policy.


rule dpo:
    input:
        inputs("dpo"),
    output:
        manifest="results/{experiment}/dpo/manifest.json",
        metrics=report(
            "results/{experiment}/dpo/metrics.json",
            caption="../report/dpo.rst",
            category="dpo",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/dpo.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=need("dpo", "gpu"),
        mem_mb=need("dpo", "mem_mb"),
        runtime=need("dpo", "runtime"),
        disk_mb=need("dpo", "disk_mb"),
    params:
        arguments=arguments("dpo"),
    shell:
        "posttrain attempt --gpus {resources.gpu} dpo {params.arguments} --output {output.manifest} 2>&1 | tee -i {log}"

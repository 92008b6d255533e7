# A reward model from preference pairs.


rule reward:
    input:
        inputs("reward"),
    output:
        manifest="results/{experiment}/reward/manifest.json",
        metrics=report(
            "results/{experiment}/reward/metrics.json",
            caption="../report/reward.rst",
            category="reward",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/reward.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=need("reward", "gpu"),
        mem_mb=need("reward", "mem_mb"),
        runtime=need("reward", "runtime"),
        disk_mb=need("reward", "disk_mb"),
    params:
        arguments=arguments("reward"),
    shell:
        "posttrain attempt --gpus {resources.gpu} reward {params.arguments} --output {output.manifest} 2>&1 | tee -i {log}"

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
        gpu=1,
        mem_mb=8000,
        runtime=720,
    params:
        arguments=arguments("reward"),
    shell:
        "posttrain reward {params.arguments} --output {output.manifest} 2>&1 | tee {log}"

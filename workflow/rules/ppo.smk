# Proximal policy optimisation from the SFT policy, against a reward model or a hand-written reward.


rule ppo:
    input:
        inputs("ppo"),
    output:
        manifest="results/{experiment}/ppo/manifest.json",
        metrics=report(
            "results/{experiment}/ppo/metrics.json",
            caption="../report/ppo.rst",
            category="ppo",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/ppo.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    params:
        arguments=arguments("ppo"),
    shell:
        "posttrain ppo {params.arguments} --output {output.manifest} 2>&1 | tee {log}"

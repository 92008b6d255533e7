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
        gpu=need("ppo", "gpu"),
        mem_mb=need("ppo", "mem_mb"),
        runtime=need("ppo", "runtime"),
        disk_mb=need("ppo", "disk_mb"),
    params:
        arguments=arguments("ppo"),
    shell:
        "posttrain attempt --gpus {resources.gpu} ppo {params.arguments} --output {output.manifest} 2>&1 | tee -i {log}"

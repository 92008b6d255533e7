# Proximal policy optimisation from the SFT policy, against a reward model or a hand-written reward.


rule ppo:
    input:
        config="results/{experiment}/ppo/config.yaml",
        data=artifact("prepare"),
        base=foundation("ppo"),
        sft=artifact("sft"),
        reward=ppo_reward,
        files=local_files("ppo"),
    output:
        manifest="results/{experiment}/ppo/manifest.json",
        model=directory("results/{experiment}/ppo/model"),
        snapshots=directory("results/{experiment}/ppo/snapshots"),
        metrics=report(
            "results/{experiment}/ppo/metrics.json",
            caption="../report/ppo.rst",
            category="ppo",
            labels={"experiment": "{experiment}"},
        ),
        provenance="results/{experiment}/ppo/provenance.json",
    log:
        "results/logs/{experiment}/ppo.log",
    benchmark:
        "results/benchmarks/{experiment}/ppo.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    params:
        reward=lambda wildcards, input: (
            f"--reward {input.reward}" if input.reward else ""
        ),
    shell:
        "posttrain ppo --config {input.config} --data {input.data} --base {input.base} --sft {input.sft} {params.reward} "
        "--output {output.manifest} 2>&1 | tee {log}"

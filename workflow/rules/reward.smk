# A reward model from preference pairs.


rule reward:
    input:
        config="results/{experiment}/reward/config.yaml",
        data=artifact("prepare"),
        base=foundation("reward"),
        sft=artifact("sft"),
    output:
        manifest="results/{experiment}/reward/manifest.json",
        model=directory("results/{experiment}/reward/model"),
        metrics=report(
            "results/{experiment}/reward/metrics.json",
            caption="../report/reward.rst",
            category="reward",
            labels={"experiment": "{experiment}"},
        ),
        provenance="results/{experiment}/reward/provenance.json",
    log:
        "results/logs/{experiment}/reward.log",
    benchmark:
        "results/benchmarks/{experiment}/reward.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    shell:
        "posttrain reward --config {input.config} --data {input.data} --base {input.base} --sft {input.sft} "
        "--output {output.manifest} 2>&1 | tee {log}"

# A reward model from preference pairs.


rule reward:
    input:
        unpack(inputs("reward")),
    output:
        manifest="results/{experiment}/reward/manifest.json",
        model=directory("results/{experiment}/reward/model"),
        metrics=report(
            "results/{experiment}/reward/metrics.json",
            caption="../report/reward.rst",
            category="reward",
            labels={"experiment": "{experiment}"},
        ),
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
    params:
        section=section("reward"),
        code=code("reward"),
        lineage=lineage("reward"),
        inputs=options,
    shell:
        "posttrain reward --config {params.section:q} --code {params.code} --lineage {params.lineage} {params.inputs} --output {output.manifest} "
        "2>&1 | tee {log}"

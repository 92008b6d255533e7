# Proximal policy optimisation from the SFT policy, against a reward model or a hand-written reward.


rule ppo:
    input:
        unpack(inputs("ppo")),
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
        section=section("ppo"),
        code=code("ppo"),
        lineage=lineage("ppo"),
        inputs=options,
    shell:
        "posttrain ppo --config {params.section:q} --code {params.code} --lineage {params.lineage} {params.inputs} --output {output.manifest} "
        "2>&1 | tee {log}"

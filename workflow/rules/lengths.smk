# A policy's perplexity by length and by position.


rule lengths:
    input:
        config="results/{experiment}/lengths/config.yaml",
        data=artifact("prepare"),
        base=lambda wildcards: foundation(wildcards.policy)(wildcards),
        policy=lambda wildcards: f"{PLAN.folder(wildcards.experiment, wildcards.policy)}/manifest.json",
    output:
        manifest="results/{experiment}/lengths/{policy}/manifest.json",
        data=directory("results/{experiment}/lengths/{policy}/data"),
        metrics=report(
            "results/{experiment}/lengths/{policy}/metrics.json",
            caption="../report/lengths.rst",
            category="lengths",
            labels={"experiment": "{experiment}", "policy": "{policy}"},
        ),
        provenance="results/{experiment}/lengths/{policy}/provenance.json",
    log:
        "results/logs/{experiment}/lengths/{policy}.log",
    benchmark:
        "results/benchmarks/{experiment}/lengths/{policy}.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=240,
    shell:
        "posttrain lengths --config {input.config} --data {input.data} --base {input.base} --policy {input.policy} "
        "--output {output.manifest} 2>&1 | tee {log}"

# A longer context: positions rescaled, the model tuned on long documents.


rule longctx:
    input:
        config="results/{experiment}/longctx/config.yaml",
        data=artifact("prepare"),
        base=lambda wildcards: foundation(
            PLAN.experiments[wildcards.experiment].longctx.policy
        )(wildcards),
        policy=lambda wildcards: artifact(
            PLAN.experiments[wildcards.experiment].longctx.policy
        )(wildcards),
    output:
        manifest="results/{experiment}/longctx/manifest.json",
        model=directory("results/{experiment}/longctx/model"),
        metrics=report(
            "results/{experiment}/longctx/metrics.json",
            caption="../report/longctx.rst",
            category="longctx",
            labels={"experiment": "{experiment}"},
        ),
        provenance="results/{experiment}/longctx/provenance.json",
    log:
        "results/logs/{experiment}/longctx.log",
    benchmark:
        "results/benchmarks/{experiment}/longctx.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    shell:
        "posttrain longctx --config {input.config} --data {input.data} --base {input.base} --policy {input.policy} "
        "--output {output.manifest} 2>&1 | tee {log}"

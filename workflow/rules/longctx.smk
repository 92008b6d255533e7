# A longer context: positions rescaled, the model tuned on long documents.


rule longctx:
    input:
        unpack(inputs("longctx")),
    output:
        manifest="results/{experiment}/longctx/manifest.json",
        model=directory("results/{experiment}/longctx/model"),
        metrics=report(
            "results/{experiment}/longctx/metrics.json",
            caption="../report/longctx.rst",
            category="longctx",
            labels={"experiment": "{experiment}"},
        ),
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
    params:
        section=section("longctx"),
        code=code("longctx"),
        lineage=lineage("longctx"),
        inputs=options,
    shell:
        "posttrain longctx --config {params.section:q} --code {params.code} --lineage {params.lineage} {params.inputs} --output {output.manifest} "
        "2>&1 | tee {log}"

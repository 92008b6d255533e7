# The untouched model: given, fetched, or trained from scratch on the prepared text.


rule base:
    input:
        unpack(inputs("base")),
    output:
        manifest="results/{experiment}/base/manifest.json",
        model=directory("results/{experiment}/base/model"),
        metrics=report(
            "results/{experiment}/base/metrics.json",
            caption="../report/base.rst",
            category="base",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/base.log",
    benchmark:
        "results/benchmarks/{experiment}/base.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 2
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    params:
        section=section("base"),
        code=code("base"),
        lineage=lineage("base"),
        inputs=options,
    shell:
        "posttrain base --threads 2 --config {params.section:q} --code {params.code} --lineage {params.lineage} {params.inputs} --output {output.manifest} "
        "2>&1 | tee {log}"

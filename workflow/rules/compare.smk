# A policy's own answers to held-out prompts, beside those of the SFT policy.


rule compare:
    input:
        unpack(inputs("compare")),
    output:
        manifest="results/{experiment}/compare/{policy}/manifest.json",
        data=directory("results/{experiment}/compare/{policy}/data"),
        metrics=report(
            "results/{experiment}/compare/{policy}/metrics.json",
            caption="../report/compare.rst",
            category="compare",
            labels={"experiment": "{experiment}", "policy": "{policy}"},
        ),
    log:
        "results/logs/{experiment}/compare/{policy}.log",
    benchmark:
        "results/benchmarks/{experiment}/compare/{policy}.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=240,
    params:
        section=section("compare"),
        code=code("compare"),
        lineage=lineage("compare"),
        inputs=options,
    shell:
        "posttrain compare --config {params.section:q} --code {params.code} --lineage {params.lineage} {params.inputs} --output {output.manifest} "
        "2>&1 | tee {log}"

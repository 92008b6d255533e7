# A policy's perplexity by length and by position.


rule lengths:
    input:
        unpack(inputs("lengths")),
    output:
        manifest="results/{experiment}/lengths/{policy}/manifest.json",
        data=directory("results/{experiment}/lengths/{policy}/data"),
        metrics=report(
            "results/{experiment}/lengths/{policy}/metrics.json",
            caption="../report/lengths.rst",
            category="lengths",
            labels={"experiment": "{experiment}", "policy": "{policy}"},
        ),
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
    params:
        section=section("lengths"),
        code=code("lengths"),
        lineage=lineage("lengths"),
        inputs=options,
    shell:
        "posttrain lengths --config {params.section:q} --code {params.code} --lineage {params.lineage} {params.inputs} --output {output.manifest} "
        "2>&1 | tee {log}"

# Log-probabilities of the preference pairs under the SFT policy, for every DPO run.


rule reference:
    input:
        unpack(inputs("reference")),
    output:
        manifest="results/{experiment}/reference/manifest.json",
        data=directory("results/{experiment}/reference/data"),
        metrics=report(
            "results/{experiment}/reference/metrics.json",
            caption="../report/reference.rst",
            category="reference",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/reference.log",
    benchmark:
        "results/benchmarks/{experiment}/reference.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    params:
        section=section("reference"),
        code=code("reference"),
        lineage=lineage("reference"),
        inputs=options,
    shell:
        "posttrain reference --config {params.section:q} --code {params.code} --lineage {params.lineage} {params.inputs} --output {output.manifest} "
        "2>&1 | tee {log}"

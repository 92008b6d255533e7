# Supervised fine-tuning of the base.


rule sft:
    input:
        unpack(inputs("sft")),
    output:
        manifest="results/{experiment}/sft/manifest.json",
        model=directory("results/{experiment}/sft/model"),
        metrics=report(
            "results/{experiment}/sft/metrics.json",
            caption="../report/sft.rst",
            category="sft",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/sft.log",
    benchmark:
        "results/benchmarks/{experiment}/sft.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    params:
        section=section("sft"),
        code=code("sft"),
        lineage=lineage("sft"),
        inputs=options,
    shell:
        "posttrain sft --config {params.section:q} --code {params.code} --lineage {params.lineage} {params.inputs} --output {output.manifest} "
        "2>&1 | tee {log}"

# Direct preference optimisation from the SFT policy.


rule dpo:
    input:
        unpack(inputs("dpo")),
    output:
        manifest="results/{experiment}/dpo/manifest.json",
        model=directory("results/{experiment}/dpo/model"),
        metrics=report(
            "results/{experiment}/dpo/metrics.json",
            caption="../report/dpo.rst",
            category="dpo",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/dpo.log",
    benchmark:
        "results/benchmarks/{experiment}/dpo.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    params:
        section=section("dpo"),
        code=code("dpo"),
        lineage=lineage("dpo"),
        inputs=options,
    shell:
        "posttrain dpo --config {params.section:q} --code {params.code} --lineage {params.lineage} {params.inputs} --output {output.manifest} "
        "2>&1 | tee {log}"

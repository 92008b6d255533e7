# Benchmark a policy with lm-eval.


rule evaluate:
    input:
        unpack(inputs("evaluate")),
    output:
        manifest="results/{experiment}/evaluate/{policy}/manifest.json",
        data=directory("results/{experiment}/evaluate/{policy}/data"),
        metrics=report(
            "results/{experiment}/evaluate/{policy}/metrics.json",
            caption="../report/evaluate.rst",
            category="evaluate",
            labels={"experiment": "{experiment}", "policy": "{policy}"},
        ),
        lm_eval="results/{experiment}/evaluate/{policy}/lm_eval.json",
    log:
        "results/logs/{experiment}/evaluate/{policy}.log",
    benchmark:
        "results/benchmarks/{experiment}/evaluate/{policy}.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=240,
    params:
        section=section("evaluate"),
        code=code("evaluate"),
        lineage=lineage("evaluate"),
        inputs=options,
    shell:
        "posttrain evaluate --config {params.section:q} --code {params.code} --lineage {params.lineage} {params.inputs} --output {output.manifest} "
        "2>&1 | tee {log}"

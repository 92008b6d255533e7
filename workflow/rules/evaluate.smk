# Benchmark a policy with lm-eval.


rule evaluate:
    input:
        inputs("evaluate"),
    output:
        manifest="results/{experiment}/evaluate/{policy}/manifest.json",
        metrics=report(
            "results/{experiment}/evaluate/{policy}/metrics.json",
            caption="../report/evaluate.rst",
            category="evaluate",
            labels={"experiment": "{experiment}", "policy": "{policy}"},
        ),
    log:
        "results/logs/{experiment}/evaluate/{policy}.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=240,
    params:
        arguments=arguments("evaluate"),
    shell:
        "posttrain evaluate {params.arguments} --output {output.manifest} 2>&1 | tee {log}"

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
        gpu=need("evaluate", "gpu"),
        mem_mb=need("evaluate", "mem_mb"),
        runtime=need("evaluate", "runtime"),
        disk_mb=need("evaluate", "disk_mb"),
    params:
        arguments=arguments("evaluate"),
    shell:
        "posttrain attempt --gpus {resources.gpu} evaluate {params.arguments} --output {output.manifest} 2>&1 | tee -i {log}"

# A policy's perplexity by length and by position.


rule lengths:
    input:
        inputs("lengths"),
    output:
        manifest="results/{experiment}/lengths/{policy}/manifest.json",
        metrics=report(
            "results/{experiment}/lengths/{policy}/metrics.json",
            caption="../report/lengths.rst",
            category="lengths",
            labels={"experiment": "{experiment}", "policy": "{policy}"},
        ),
    log:
        "results/logs/{experiment}/lengths/{policy}.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=need("lengths", "gpu"),
        mem_mb=need("lengths", "mem_mb"),
        runtime=need("lengths", "runtime"),
        disk_mb=need("lengths", "disk_mb"),
    params:
        arguments=arguments("lengths"),
    shell:
        "posttrain attempt --gpus {resources.gpu} lengths {params.arguments} --output {output.manifest} 2>&1 | tee -i {log}"

# A longer context: positions rescaled, the model tuned on long documents.


rule longctx:
    input:
        inputs("longctx"),
    output:
        manifest="results/{experiment}/longctx/manifest.json",
        metrics=report(
            "results/{experiment}/longctx/metrics.json",
            caption="../report/longctx.rst",
            category="longctx",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/longctx.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=need("longctx", "gpu"),
        mem_mb=need("longctx", "mem_mb"),
        runtime=need("longctx", "runtime"),
        disk_mb=need("longctx", "disk_mb"),
    params:
        arguments=arguments("longctx"),
    shell:
        "posttrain attempt --gpus {resources.gpu} longctx {params.arguments} --output {output.manifest} 2>&1 | tee -i {log}"

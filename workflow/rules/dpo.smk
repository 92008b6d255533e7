# Direct preference optimisation from the SFT policy.


rule dpo:
    input:
        inputs("dpo"),
    output:
        manifest="results/{experiment}/dpo/manifest.json",
        metrics=report(
            "results/{experiment}/dpo/metrics.json",
            caption="../report/dpo.rst",
            category="dpo",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/dpo.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    params:
        arguments=arguments("dpo"),
    shell:
        "posttrain dpo {params.arguments} --output {output.manifest} 2>&1 | tee {log}"

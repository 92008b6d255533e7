# Log-probabilities of the preference pairs under the SFT policy, for every DPO run.


rule reference:
    input:
        inputs("reference"),
    output:
        manifest="results/{experiment}/reference/manifest.json",
        metrics=report(
            "results/{experiment}/reference/metrics.json",
            caption="../report/reference.rst",
            category="reference",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "results/logs/{experiment}/reference.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    params:
        arguments=arguments("reference"),
    shell:
        "posttrain reference {params.arguments} --output {output.manifest} 2>&1 | tee {log}"

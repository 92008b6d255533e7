# A policy's own answers to held-out prompts, beside those of the SFT policy.


rule compare:
    input:
        inputs("compare"),
    output:
        manifest="results/{experiment}/compare/{policy}/manifest.json",
        metrics=report(
            "results/{experiment}/compare/{policy}/metrics.json",
            caption="../report/compare.rst",
            category="compare",
            labels={"experiment": "{experiment}", "policy": "{policy}"},
        ),
    log:
        "results/logs/{experiment}/compare/{policy}.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=240,
    params:
        arguments=arguments("compare"),
    shell:
        "posttrain compare {params.arguments} --output {output.manifest} 2>&1 | tee {log}"

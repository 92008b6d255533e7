# Write the section that a stage reads; the stage reads nothing else of the config.


localrules:
    config,


rule config:
    output:
        "results/{experiment}/{stage}/config.yaml",
    log:
        "results/logs/{experiment}/{stage}.config.log",
    benchmark:
        "results/benchmarks/{experiment}/{stage}.config.tsv"
    wildcard_constraints:
        stage="[a-z]+",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        mem_mb=100,
        runtime=5,
    params:
        section=lambda wildcards: canonical(
            PLAN.section(wildcards.experiment, wildcards.stage)
        ),
    shell:
        "printf '%s\\n' {params.section:q} > {output} 2> {log}"

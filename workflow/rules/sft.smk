# Supervised fine-tuning of the base.


rule sft:
    input:
        config="results/{experiment}/sft/config.yaml",
        data=artifact("prepare"),
        base=artifact("base"),
    output:
        manifest="results/{experiment}/sft/manifest.json",
        model=directory("results/{experiment}/sft/model"),
        metrics=report(
            "results/{experiment}/sft/metrics.json",
            caption="../report/sft.rst",
            category="sft",
            labels={"experiment": "{experiment}"},
        ),
        provenance="results/{experiment}/sft/provenance.json",
    log:
        "results/logs/{experiment}/sft.log",
    benchmark:
        "results/benchmarks/{experiment}/sft.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    shell:
        "posttrain sft --config {input.config} --data {input.data} --base {input.base} "
        "--output {output.manifest} 2>&1 | tee {log}"

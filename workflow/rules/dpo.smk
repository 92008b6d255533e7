# Direct preference optimisation from the SFT policy.


rule dpo:
    input:
        config="results/{experiment}/dpo/config.yaml",
        data=artifact("prepare"),
        base=foundation("dpo"),
        sft=artifact("sft"),
        reference=artifact("reference"),
    output:
        manifest="results/{experiment}/dpo/manifest.json",
        model=directory("results/{experiment}/dpo/model"),
        metrics=report(
            "results/{experiment}/dpo/metrics.json",
            caption="../report/dpo.rst",
            category="dpo",
            labels={"experiment": "{experiment}"},
        ),
        provenance="results/{experiment}/dpo/provenance.json",
    log:
        "results/logs/{experiment}/dpo.log",
    benchmark:
        "results/benchmarks/{experiment}/dpo.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    shell:
        "posttrain dpo --config {input.config} --data {input.data} --base {input.base} --sft {input.sft} --reference {input.reference} "
        "--output {output.manifest} 2>&1 | tee {log}"

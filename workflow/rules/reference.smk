# Log-probabilities of the preference pairs under the SFT policy, for every DPO run.


rule reference:
    input:
        config="results/{experiment}/reference/config.yaml",
        data=artifact("prepare"),
        base=foundation("reference"),
        sft=artifact("sft"),
    output:
        manifest="results/{experiment}/reference/manifest.json",
        data=directory("results/{experiment}/reference/data"),
        metrics=report(
            "results/{experiment}/reference/metrics.json",
            caption="../report/reference.rst",
            category="reference",
            labels={"experiment": "{experiment}"},
        ),
        provenance="results/{experiment}/reference/provenance.json",
    log:
        "results/logs/{experiment}/reference.log",
    benchmark:
        "results/benchmarks/{experiment}/reference.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    shell:
        "posttrain reference --config {input.config} --data {input.data} --base {input.base} --sft {input.sft} "
        "--output {output.manifest} 2>&1 | tee {log}"

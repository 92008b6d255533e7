# The untouched model: given, fetched, or trained from scratch on the prepared text.


rule base:
    input:
        config="results/{experiment}/base/config.yaml",
        data=artifact("prepare"),
        fetched=fetched("base"),
        files=local_files("base"),
    output:
        manifest="results/{experiment}/base/manifest.json",
        model=directory("results/{experiment}/base/model"),
        metrics=report(
            "results/{experiment}/base/metrics.json",
            caption="../report/base.rst",
            category="base",
            labels={"experiment": "{experiment}"},
        ),
        provenance="results/{experiment}/base/provenance.json",
    log:
        "results/logs/{experiment}/base.log",
    benchmark:
        "results/benchmarks/{experiment}/base.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 2
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=720,
    shell:
        "posttrain base --threads 2 --config {input.config} --data {input.data} --fetched {input.fetched} "
        "--output {output.manifest} 2>&1 | tee {log}"

# Benchmark a policy with lm-eval.


rule evaluate:
    input:
        config="results/{experiment}/evaluate/config.yaml",
        data=artifact("prepare"),
        base=lambda wildcards: foundation(wildcards.policy)(wildcards),
        policy=lambda wildcards: f"{PLAN.folder(wildcards.experiment, wildcards.policy)}/manifest.json",
        fetched=fetched("evaluate"),
    output:
        manifest="results/{experiment}/evaluate/{policy}/manifest.json",
        data=directory("results/{experiment}/evaluate/{policy}/data"),
        metrics=report(
            "results/{experiment}/evaluate/{policy}/metrics.json",
            caption="../report/evaluate.rst",
            category="evaluate",
            labels={"experiment": "{experiment}", "policy": "{policy}"},
        ),
        lm_eval="results/{experiment}/evaluate/{policy}/lm_eval.json",
        provenance="results/{experiment}/evaluate/{policy}/provenance.json",
    log:
        "results/logs/{experiment}/evaluate/{policy}.log",
    benchmark:
        "results/benchmarks/{experiment}/evaluate/{policy}.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=240,
    shell:
        "posttrain evaluate --config {input.config} --data {input.data} --base {input.base} "
        "--policy {input.policy} --fetched {input.fetched} --output {output.manifest} 2>&1 | tee {log}"

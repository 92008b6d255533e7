# A policy's own answers to held-out prompts, beside those of the SFT policy.


rule compare:
    input:
        config="results/{experiment}/compare/config.yaml",
        data=artifact("prepare"),
        base=foundation("reward"),
        sft=artifact("sft"),
        reward=reward_model,
        beside=sft_answers,
        files=local_files("compare"),
        policy=lambda wildcards: f"{PLAN.folder(wildcards.experiment, wildcards.policy)}/manifest.json",
    output:
        manifest="results/{experiment}/compare/{policy}/manifest.json",
        data=directory("results/{experiment}/compare/{policy}/data"),
        metrics=report(
            "results/{experiment}/compare/{policy}/metrics.json",
            caption="../report/compare.rst",
            category="compare",
            labels={"experiment": "{experiment}", "policy": "{policy}"},
        ),
        provenance="results/{experiment}/compare/{policy}/provenance.json",
    log:
        "results/logs/{experiment}/compare/{policy}.log",
    benchmark:
        "results/benchmarks/{experiment}/compare/{policy}.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=240,
    params:
        beside=lambda wildcards, input: " ".join(
            f"--{role} {input.get(role)}"
            for role in ("reward", "beside")
            if input.get(role)
        ),
    shell:
        "posttrain compare --config {input.config} --data {input.data} --base {input.base} --sft {input.sft} "
        "--policy {input.policy} {params.beside} --output {output.manifest} 2>&1 | tee {log}"

# Download a model, a data set or benchmark data from the hub into the shared cache; the only rule that uses the network.


localrules:
    fetch,


rule fetch:
    output:
        manifest="results/fetch/{item}/manifest.json",
    log:
        "results/logs/fetch/{item}.log",
    wildcard_constraints:
        item=r"[A-Za-z0-9_.@-]+",
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=2000,
        runtime=240,
    params:
        section=lambda wildcards: canonical(PLAN.fetch_section(wildcards.item)),
    shell:
        POSTTRAIN
        + " fetch --config {params.section:q} --output {output.manifest} 2>&1 | tee -i {log}"

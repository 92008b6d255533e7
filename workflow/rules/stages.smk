# One rule for each stage of the table in workflow/posttrain/config/stages.py, with the stage's name: `prepare`, `base`,
# `sft`, ... The rules differ in that name, and in whether the stage runs once for each policy.

for stage, entry in STAGES.items():
    policy = entry.makes == "judgement"
    place = (
        f"{{experiment}}/{stage}/{{policy}}" if policy else f"{{experiment}}/{stage}"
    )

    rule:
        name:
            stage
        input:
            inputs(stage),
        output:
            manifest=f"results/{place}/manifest.json",
            metrics=report(
                f"results/{place}/metrics.json",
                caption=f"../report/{stage}.rst",
                category=stage,
                labels={"experiment": "{experiment}"}
                | ({"policy": "{policy}"} if policy else {}),
            ),
        log:
            f"results/logs/{place}.log",
        conda:
            CONDA
        threads: wanted_threads(stage)
        resources:
            gpu=need(stage, "gpu"),
            mem_mb=need(stage, "mem_mb"),
            runtime=need(stage, "runtime"),
            disk_mb=need(stage, "disk_mb"),
            batch_size=need(stage, "batch_size"),
        params:
            arguments=arguments(stage),
        # `tee -i`: a plain tee would exit at Ctrl-C, before the stage has reported. The stage's name is in the arguments:
        # the loop's variable would be the table's last stage when a job runs.
        shell:
            POSTTRAIN
            + " attempt --gpus {resources.gpu} --batch-size {resources.batch_size} {params.arguments} "
            + ("--threads {threads} " if entry.any_threads else "")
            + "--output {output.manifest} 2>&1 | tee -i {log}"

"""Measure how long Snakemake takes to decide that nothing is to be done, in this workflow and with bare rules.

python benchmarks/planning.py [JOBS ...]    # default: 100 1000 10000

Bare rules have as many jobs, with the same inputs, outputs and parameters, written into the Snakefile; `chain` has one
input and one output for each job. All outputs exist. Reported are the least CPU seconds of three rounds.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from posttrain.engine.records import record_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
PARENT = """
prepare: {world: {documents: 300}}
base: {scratch: {seed: 0}}
sft: {rank: 8}
dpo: {}
"""
# Shape -> rule -> its inputs; {n} is the number of the chain
SHAPES = {
    "same": {
        "parent": [],
        "dpo": [f"made/parent/{n}/manifest" for n in range(4)],
        "evaluate": ["made/parent/0/manifest", "made/parent/1/manifest", "made/dpo/{n}/manifest"],
        "compare": [*(f"made/parent/{n}/manifest" for n in (0, 1, 2, 4)), "made/dpo/{n}/manifest"],
    },
    "chain": {"first": [], "second": ["made/first/{n}/manifest"], "third": ["made/second/{n}/manifest"]},
}
OUTPUTS = {"same": ["manifest", "metrics"], "chain": ["manifest"]}
RULE = """
rule {name}:
    input: {inputs}
    output: {outputs}
    log: "logs/{name}/{{n}}"
    params: section="{{}}", code="0123456789abcdef"
    shell: "echo {name}"
"""


def measured(folder: Path) -> float:
    """CPU seconds of `snakemake -n`; asserts that nothing is to be done."""
    before = os.times()
    done = subprocess.run(["snakemake", "-n"], cwd=folder, capture_output=True, text=True)
    after = os.times()
    assert "Nothing to be done" in done.stdout + done.stderr, (done.stdout + done.stderr)[-2000:]
    return sum(after[2:4]) - sum(before[2:4])


def ours(folder: Path, jobs: int) -> int:
    """Make a finished campaign of about `jobs` jobs in a folder; returns the exact number."""
    from fabricated import fabricate

    from posttrain.dag import campaign

    cells = max(1, (jobs - 7) // 3)
    for name in ("workflow", "envs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "config/experiments").mkdir(parents=True)
    (folder / "config/experiments/parent.yaml").write_text(PARENT)
    axes = f"grid: {{dpo.beta: {[round(0.001 * n, 3) for n in range(1, cells + 1)]}}}\n"
    (folder / "config/experiments/child.yaml").write_text(f"extends: parent\n{axes}")
    (folder / "config/config.yaml").write_text("experiments: [child]\n")
    os.chdir(folder)
    plan = campaign.load("config/config.yaml")
    fabricate(plan)
    return len(plan.folders())


def bare(folder: Path, jobs: int, shape: str) -> None:
    """Make a finished workflow of bare rules with as many jobs in a folder."""
    rules, chains = SHAPES[shape], max(1, jobs // 3)
    ends = [name for name in rules if not any(f"/{name}/" in file for files in rules.values() for file in files)]
    text = f"rule all:\n    input: [f'made/{{name}}/{{n}}/manifest' for name in {ends} for n in range({chains})]\n"
    for name, inputs in rules.items():
        outputs = [f"made/{name}/{{n}}/{part}" for part in OUTPUTS[shape]]
        text += RULE.format(name=name, inputs=str(inputs)[1:-1], outputs=str(outputs)[1:-1])
    (folder / "Snakefile").write_text(text.replace("    input: \n", ""))
    os.chdir(folder)
    for name, inputs in rules.items():
        for n in range(5 if name == "parent" else chains):
            record = {"rule": name, "input": sorted(file.format(n=n) for file in inputs), "record_format_version": 6}
            record["params"] = ["'0123456789abcdef'", "'{}'"]
            for part in OUTPUTS[shape]:
                output = Path("made", name, str(n), part)
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(name)
                file = record_file(str(output))
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(record))


def main() -> None:
    """Print two lines for each number of jobs."""
    for jobs in map(int, sys.argv[1:] or (100, 1000, 10000)):
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two, \
                tempfile.TemporaryDirectory() as three:  # fmt: skip
            made = ours(Path(one), jobs)
            bare(Path(two), made, "same")
            bare(Path(three), made, "chain")
            rounds = [[measured(Path(folder)) for folder in (one, two, three)] for _ in range(4)]
            mine, same, chain = map(min, zip(*rounds[1:], strict=True))  # the first writes what later ones read
            os.chdir(ROOT)
        allowed, plain = 0.5 + 1.2 * same, 0.5 + 1.2 * chain
        print(f"{made:6} jobs: ours {mine:5.2f} s; bare rules of the same shape {same:5.2f} s, a chain {chain:5.2f} s;")
        print(f"       of 0.5 s + 1.2 x bare: {mine / allowed:.2f} and {mine / plain:.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Measure how fast `prepare` is beside `datasets.map`, and what memory it holds, on rows of random words.

python benchmarks/preparing.py --tokenizer FOLDER [--rows 20000 200000] [--processes 1 2]    # FOLDER: of a model

Each measurement is a program of its own; its times, in CPU seconds of all its processes and by the clock, are from the
file to the tokens on disk, without imports. `map` (`datasets.load_dataset` and `map`) writes tokens alone: of whole
rows, with labels for the reply (two calls of the chat template), or what `prepare` writes with the checks that it makes
of tokens (`tokens.encode`). `prepare` checks and divides rows too, searches them for overlap, and writes rows and
tokens. Memory is the most that all processes hold
together (Pss_Anon), without files that are mapped, which the system can drop.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow"))
WORDS = [f"{a}{b}" for a in ("lo", "ka", "mi", "ta", "re", "shi") for b in ("n", "ra", "to", "ved", "s", "king", "ly")]
KINDS = ("map, whole rows", "map, labels of the reply", "map, as prepare does", "prepare")


def write(file: Path, count: int) -> None:
    """Conversations of one turn with 10 to 120 words."""
    rng = random.Random(0)
    with open(file, "w") as lines:
        for number in range(count):
            said = [" ".join(rng.choices(WORDS, k=rng.randrange(10, 60))) for _ in range(2)]
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
            lines.write(json.dumps({"id": str(number), "messages": turns}) + "\n")


def peak_memory(of: dict) -> None:
    """Note the largest memory of this process and its children in `of`, in MB, until it ends."""
    while True:
        of["mb"] = max(of.get("mb", 0.0), sum(map(memory, [psutil.Process(), *psutil.Process().children()])))
        time.sleep(0.5)  # a look takes milliseconds of the processes that are measured


def memory(process: psutil.Process) -> float:
    """A process's share of the memory that no file backs, in MB; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss_Anon:")), 0.0)


def spent() -> tuple[float, float]:
    """(CPU seconds of this process and of its children that have ended, seconds by the clock)."""
    return sum(os.times()[:4]), time.monotonic()


def measure(kind: str, file: Path, processes: int, folder: Path) -> None:
    """Print CPU seconds, seconds and the growth of memory of one way."""
    import gc

    import datasets
    import transformers

    from posttrain.config.sections import Prepare, Source, Tokenizer
    from posttrain.data.tokenizer import set_chat_template
    from posttrain.jobs.artifact import RARELY
    from posttrain.models import tokens
    from posttrain.stages.prepare import prepare

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    set_chat_template(tokenizer, None, conversations=True)

    def template(turns: list[dict], prompt: bool = False) -> list[int]:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, return_dict=False)

    def whole(row: dict) -> dict:
        return {"input_ids": template(row["messages"])}

    def labelled(row: dict) -> dict:
        prompt, ids = template(row["messages"][:-1], prompt=True), template(row["messages"])
        return {"input_ids": ids, "labels": [tokens.MASKED] * len(prompt) + ids[len(prompt) :]}

    work = file.parent
    held: dict[str, float] = {}
    threading.Thread(target=peak_memory, args=(held,), daemon=True).start()
    time.sleep(1)
    before, (cpu, clock) = held["mb"], spent()
    if kind == "prepare":
        section = Prepare(
            tokenizer=Tokenizer(path=str(folder)), max_tokens=4096, world=None, sft=[Source(path=str(file))], seed=0
        )
        gc.freeze()
        gc.set_threshold(*RARELY)
        prepare(section, work / "work", work / "checkpoints", processes=processes)
    else:
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(work / "cache"))
        way = dict(zip(KINDS, (whole, labelled, lambda row: tokens.encode(tokenizer, row)), strict=False))[kind]
        rows.map(way, remove_columns=rows.column_names, num_proc=processes if processes > 1 else None)
    ended = spent()
    print(json.dumps([ended[0] - cpu, ended[1] - clock, held["mb"] - before]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "FILE", "PROCESSES"))
    options = parser.parse_args()
    if options.measure:
        kind, file, processes = options.measure
        return measure(kind, Path(file), int(processes), options.tokenizer.resolve())
    for count, processes in itertools.product(options.rows, options.processes):
        print(f"{count:,} rows, {processes} processes")
        for kind in KINDS:
            cpu, clock, megabytes = apart(kind, count, processes, options.tokenizer)
            speeds = f"{count / cpu:8,.0f} rows a CPU second {count / clock:8,.0f} a second"
            print(f"{kind:26} {speeds} {megabytes:8,.0f} MB more", flush=True)


def apart(kind: str, count: int, processes: int, tokenizer: Path) -> list[float]:
    """What `measure` prints, in a program of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write(file := Path(folder) / "rows.jsonl", count)
        line = [sys.executable, __file__, "--tokenizer", str(tokenizer), "--measure", kind, str(file), str(processes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        ended = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
        return json.loads(ended.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()

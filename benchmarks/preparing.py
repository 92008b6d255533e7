"""Measure how fast `prepare` is beside `datasets.map`, and what memory it holds, on rows of random words.

python benchmarks/preparing.py --tokenizer FOLDER [--rows 20000 200000]    # FOLDER: of a model

Each measurement is a process of its own on one core; times are its CPU seconds without those of imports. `map` only
writes the tokens of rows that are read before: whole rows, labels for the reply (two calls of the chat template), or
what `prepare` writes (`tokens.encode`). `prepare` reads, checks, divides, searches for overlap, writes rows and tokens.
Memory is the most that the process holds itself (RssAnon), without files that are mapped, which the system can drop.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

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
    """Note the largest RssAnon of this process in `of`, in MB, until it ends."""
    while True:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        of["mb"] = max(of.get("mb", 0.0), int(line.split()[1]) / 1024)
        time.sleep(0.05)


def measure(kind: str, file: Path, folder: Path) -> None:
    """Print CPU seconds and the growth of memory of one way."""
    import datasets
    import transformers

    from posttrain.config.sections import Prepare, Source, Tokenizer
    from posttrain.data.tokenizer import set_chat_template
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
    if kind != "prepare":
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(work / "cache"))
    memory: dict[str, float] = {}
    threading.Thread(target=peak_memory, args=(memory,), daemon=True).start()
    time.sleep(0.2)
    before, start = memory["mb"], time.process_time()
    if kind == "prepare":
        section = Prepare(
            tokenizer=Tokenizer(path=str(folder)), max_tokens=4096, world=None, sft=[Source(path=str(file))], seed=0
        )
        prepare(section, work / "work", work / "checkpoints")
    else:
        way = dict(zip(KINDS, (whole, labelled, lambda row: tokens.encode(tokenizer, row)), strict=False))[kind]
        rows.map(way, remove_columns=rows.column_names)
    print(json.dumps([time.process_time() - start, memory["mb"] - before]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "FILE"))
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure[0], Path(options.measure[1]), options.tokenizer.resolve())
    for count in options.rows:
        print(f"{count:,} rows")
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as folder:
                write(file := Path(folder) / "rows.jsonl", count)
                line = [sys.executable, __file__, "--tokenizer", str(options.tokenizer), "--measure", kind, str(file)]
                environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
                ended = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
                seconds, megabytes = json.loads(ended.stdout.splitlines()[-1])
                print(f"{kind:26} {count / seconds:8,.0f} rows a CPU second {megabytes:8,.0f} MB more", flush=True)


if __name__ == "__main__":
    main()

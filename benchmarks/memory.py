"""Compare the memory that `posttrain plan` predicts with what stages use on the CPU.

python benchmarks/memory.py [FOLDER]    # default: a temporary folder; stages that FOLDER holds are not run again

Each stage of a small campaign runs as a process of its own, whose peak of resident memory the kernel reports. `beyond`
is the error of what comes on top of the libraries, whose memory is measured with the same stage of a minimal model.
With MALLOC_MMAP_THRESHOLD_=131072 glibc gives freed blocks back, as a GPU's allocator does.
"""

import json
import multiprocessing
import os
import random
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

from posttrain.config.stages import JUDGES
from posttrain.dag import campaign
from posttrain.dag.artifacts import at
from posttrain.dag.plan import Plan
from posttrain.resources import estimates

SIZES = {
    "bare": {"hidden_size": 64, "layers": 1, "heads": 1, "kv_heads": 1, "intermediate_size": 64, "context": 256,
             "vocab": 512, "batch_size": 4},
    "deep": {"hidden_size": 384, "layers": 8, "heads": 6, "kv_heads": 6, "intermediate_size": 1024, "context": 256,
             "vocab": 2048, "batch_size": 8},
    "wide": {"hidden_size": 768, "layers": 3, "heads": 12, "kv_heads": 4, "intermediate_size": 2048, "context": 192,
             "vocab": 8192, "batch_size": 8},
}  # fmt: skip
SHORT = {"steps": 2, "learning_rate": 1e-5, "checkpoint_steps": 100}


def experiments(name: str, size: dict) -> dict[str, dict]:
    """The experiments for one size of model: a parent with every stage, and children that train in other ways."""
    size = dict(size)
    vocab, context, _ = size.pop("vocab"), size["context"], size.pop("kv_heads")
    from_scratch = {"tokenizer": {"vocab_size": vocab}, "chat_template": "default"}
    short = SHORT | {"batch_size": size["batch_size"]}
    rails = {"max_kl": 1e9, "max_ratio_error": 1e9, "min_eos_rate": 0.0}
    parent = {
        "prepare": {
            **{kind: [{"path": f"{kind}.jsonl"}] for kind in ("text", "long", "sft", "preference")},
            "long_rows": "cut", "max_tokens": context,
        },
        "base": {"path": f"models/{name}"},
        "sft": short | {"method": "qlora"},
        "reward": short | {"batch_size": short["batch_size"] // 2},
        "ppo": short | {"value_warmup": 1, "max_new_tokens": 48, "rails": rails},
        "dpo": short | {"batch_size": short["batch_size"] // 2},
        "longctx": short | {"batch_size": short["batch_size"] // 4, "factor": 4.0, "tuning": "qlora", "packing": True},
        "lengths": {"tokens": [context], "packing": True, "documents": 16},
        "compare": {"prompts": 16, "best_of": 1, "batch_size": 16},
        "evaluate": {"limit": 8, "batch_size": 8},
    }  # fmt: skip
    none = dict.fromkeys(("reward", "ppo", "dpo", "longctx", "lengths"))
    child = {"extends": name, **none}
    children = {
        name: parent,
        f"{name}-full": child | {"sft": {"method": "full"}},
        f"{name}-scratch": child
        | {"prepare": from_scratch, "base": {"path": None, "scratch": SHORT | size}, "sft": None},
    }
    if name != "deep":
        return children
    return children | {
        f"{name}-lora": child | {"sft": {"method": "lora"}},
        f"{name}-full-checkpointing": child | {"sft": {"method": "full", "gradient_checkpointing": True}},
        f"{name}-qlora-checkpointing": child | {"sft": {"method": "qlora", "gradient_checkpointing": True}},
        f"{name}-micro": child | {"sft": {"method": "full", "micro_batch_size": 2}},
        f"{name}-half": child | {"sft": {"method": "lora", "precision": "bfloat16"}},
        f"{name}-16": {"extends": name, "base": {"dtype": "bfloat16"}},
        f"{name}-16-lora": {"extends": f"{name}-16", **none, "sft": {"method": "lora"}},
        f"{name}-prompt": child | {"sft": {"method": "prompt"}},
        f"{name}-long-full": {
            "extends": name,
            "longctx": {"tuning": "full"},
            "ppo": None,
            "dpo": None,
            "lengths": None,
        },
        f"{name}-alibi": {"extends": f"{name}-scratch", "base": {"scratch": {"positions": "alibi"}}},
    }


def write(folder: Path) -> Plan:
    """Write the campaign and its data into a folder; returns its plan."""
    os.chdir(folder)
    write_texts()
    for name, size in SIZES.items():
        if not Path("models", name, "config.json").is_file():
            maker = multiprocessing.get_context("spawn").Process(target=write_model, args=(name, size))
            maker.start()  # in a process of its own: a child's peak includes what its parent held at its start
            maker.join()
    Path("config/experiments").mkdir(parents=True, exist_ok=True)
    made = {name: values for size, of in SIZES.items() for name, values in experiments(size, of).items()}
    for name, values in made.items():
        Path(f"config/experiments/{name}.yaml").write_text(json.dumps(values))
    Path("config/config.yaml").write_text(json.dumps({"experiments": list(made), "keep_gb": 0}))
    return campaign.load("config/config.yaml")


def write_model(name: str, size: dict) -> None:
    """Write a random Llama and its tokenizer into models/NAME."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain.data import tokenizer as tokenizers

    texts = [json.loads(line)["text"] for line in Path("text.jsonl").read_text().splitlines()]
    tokenizer = tokenizers.train_tokenizer(texts, size["vocab"], size["context"])
    tokenizers.set_chat_template(tokenizer, "default", True)
    tokenizer.save_pretrained(f"models/{name}")
    config = LlamaConfig(
        vocab_size=size["vocab"], hidden_size=size["hidden_size"], intermediate_size=size["intermediate_size"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"],
        max_position_embeddings=size["context"], tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(f"models/{name}")


def write_texts() -> None:
    """Write rows that fill every sequence. Text repeats its words, so that tied embeddings predict it at once."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(3, 7))) for _ in range(6000)]

    def row(count: int, again: int = 1) -> str:
        return " ".join(word for word in chance.sample(words, count) for _ in range(again))

    texts = [{"text": row(60, 20)} for _ in range(60)]
    rows = {
        "text": texts,
        "long": texts,
        "sft": [{"prompt": row(20), "completion": row(240)} for _ in range(48)],
        "preference": [{"prompt": row(40), "chosen": row(8), "rejected": row(8)} for _ in range(80)],
    }
    for kind, made in rows.items():
        Path(f"{kind}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in made))


def measured(plan: Plan, folder: str) -> float | None:
    """Peak resident memory in MB of the stage that makes a folder; None where it failed.

    A base that learned nothing in its few steps fails, but is measured all the same.
    """
    experiment, stage, policy = at(folder)
    file, words = Path(folder, "peak.json"), Path(folder, "said.txt")
    if not file.is_file():
        command = [sys.executable, "-m", "posttrain", *shlex.split(plan.arguments(experiment, stage, policy))]
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(words, "wb") as said:
            process = os.posix_spawn(
                sys.executable, [*command, "--output", f"{folder}/manifest.json"], os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, said.fileno(), 1), (os.POSIX_SPAWN_DUP2, said.fileno(), 2)],
            )  # fmt: skip
            _, code, used = os.wait4(process, 0)
        file.write_text(json.dumps({"mb": used.ru_maxrss / 1024, "code": code}))
    found = json.loads(file.read_text())
    return None if found["code"] and "did not learn" not in words.read_text() else found["mb"]


def wanted(folder: str) -> bool:
    """Whether a stage is measured: every builder, and some models' judges of two policies."""
    experiment, stage, policy = at(folder)
    return stage not in JUDGES or (experiment in (*SIZES, "deep-16") and policy in ("base", "sft"))


def main() -> None:
    """Print a line for each stage, and the errors over all but the minimal model's, which measure the libraries."""
    with tempfile.TemporaryDirectory() as temporary:
        plan = write(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
        errors, bare = [], {}
        print(f"{'stage':32} {'measured MB':>12} {'predicted MB':>13} {'error':>7} {'beyond':>7}")
        for folder in [folder for folder in plan.folders() if folder != "results/report" and wanted(folder)]:
            experiment, stage, _ = at(folder)
            used, need = measured(plan, folder), estimates.predicted(plan, at(folder))
            if used is None or need is None:
                continue
            told, key = need.host / 2**20, stage if need.terms else "given"
            if experiment.startswith("bare"):
                bare.setdefault(key, (used, told))
            libraries = bare[key]
            beyond = (told - libraries[1]) / (used - libraries[0]) - 1 if used > 1.1 * libraries[0] else None
            if not experiment.startswith("bare"):
                errors.append((told / used - 1, beyond))
            shown = "" if beyond is None else f"{beyond:+.0%}"
            name = folder.removeprefix("results/")
            print(f"{name:32} {used:12.0f} {told:13.0f} {told / used - 1:+7.0%} {shown:>7}", flush=True)
        for name, values in (("error", [e for e, _ in errors]), ("beyond", [b for _, b in errors if b is not None])):
            sizes = sorted(map(abs, values))
            print(f"{name}: median {statistics.median(sizes):.0%}, most {sizes[-1]:.0%} of {len(sizes)} stages")


if __name__ == "__main__":
    main()

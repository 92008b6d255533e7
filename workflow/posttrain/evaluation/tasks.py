"""lm-eval tasks over the data that `prepare` holds out: files that lm-eval reads by itself."""

import json
from pathlib import Path

from posttrain.ground.files import write_jsonl

NEXT_WORD = r"^\s*(\w+)"  # the answer to a question about a long text
NEW_TOKENS = 48  # the longest answer that is generated for a question of the built-in world


def write_tasks(
    folder: Path,
    home: str,
    questions: list[dict],
    texts: dict[str, list[str]],
    choices: list[dict],
    retrieval: list[dict] = (),
) -> list:
    """Write the tasks below `folder`, which will be read as `home`; returns the names that evaluation runs.

    questions: rows of the built-in world (kind, messages, answer); texts: name -> documents whose likelihood is
    measured; choices: rows with question, choices and the index of the right one; retrieval: questions about long
    texts (kind, length, text, answer, and of pass words their depth).
    """
    names = []
    if questions:
        names.append("world")
        write_world(folder, home, questions)
    for name, documents in texts.items():
        if documents:
            names.append(name)
            write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in documents])
            write_yaml(folder / f"{name}.yaml", rolling(name, home))
    if choices:
        names.append("choices")
        write_jsonl(folder / "choices.jsonl", choices)
        write_yaml(folder / "choices.yaml", multiple_choice(home))
    names += write_retrieval(folder, home, retrieval)
    if names:
        (folder / "default.json").write_text(json.dumps(names) + "\n")
    return names


def write_world(folder: Path, home: str, questions: list[dict]) -> None:
    """One exact-match task per kind of question, and the group `world` over all of them."""
    from posttrain.world.world import ANSWER_PATTERN

    kinds: dict[str, list[dict]] = {}
    for row in questions:
        prompt = row["messages"][0]["content"]
        kinds.setdefault(row["kind"], []).append({"id": row["id"], "prompt": prompt, "answer": row["answer"]})
    for kind, rows in sorted(kinds.items()):
        write_jsonl(folder / f"world_{kind}.jsonl", rows)
        write_yaml(folder / f"world_{kind}.yaml", exact_match(f"world_{kind}", home, ANSWER_PATTERN))
    write_yaml(folder / "world.yaml", group_of("world", [f"world_{kind}" for kind in sorted(kinds)]))


def group_of(name: str, members: list[str]) -> dict:
    """Exact match over some tasks, each question counting the same."""
    return {
        "group": name,
        "task": members,
        "aggregate_metric_list": [{"metric": "exact_match", "weight_by_size": True, "filter_list": "answer"}],
        "metadata": {"version": 1.0},
    }


def write_retrieval(folder: Path, home: str, questions: list[dict]) -> list[str]:
    """`recall_LENGTH`, and for pass words a group `passkey_LENGTH` over one task for each depth; returns the names."""
    tasks: dict[str, list[dict]] = {}
    groups: dict[str, list[str]] = {}
    for row in questions:
        group = f"{row['kind']}_{row['length']}"
        name = f"{group}_depth_{row['depth']}" if "depth" in row else group
        tasks.setdefault(name, []).append({"id": row["id"], "prompt": row["text"], "answer": row["answer"]})
        members = groups.setdefault(group, [])
        if name not in members:
            members.append(name)
    for name, rows in tasks.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
        task = exact_match(name, home, NEXT_WORD)
        task["generation_kwargs"] |= {"until": ["."], "max_gen_toks": 3}
        write_yaml(folder / f"{name}.yaml", task)
    for group, members in groups.items():
        if members != [group]:
            write_yaml(folder / f"{group}.yaml", group_of(group, members))
    return list(groups)


def exact_match(name: str, home: str, pattern: str) -> dict:
    """A greedy answer, of which the bare answer must equal the expected one."""
    return {
        **source(name, home),
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<|end|>"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "filter_list": [
            {"name": "answer", "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def rolling(name: str, home: str) -> dict:
    """Likelihood of whole documents."""
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    return {
        **source(name, home),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in zip(
                metrics, ("weighted_perplexity", "weighted_perplexity", "bits_per_byte"), strict=True
            )
        ],
    }


def multiple_choice(home: str) -> dict:
    """The most likely of several answers."""
    return {
        **source("choices", home),
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }


def source(name: str, home: str) -> dict:
    """What all tasks have: where their questions stand, relative to the working directory."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{home}/{name}.jsonl"}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }


def write_yaml(path: Path, value: dict) -> None:
    """Write lm-eval's YAML; JSON is YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

"""Write lm-eval tasks of held-out rows.

A task is NAME.yaml beside its questions, NAME.jsonl. `home`: the folder in which lm-eval will find them.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from posttrain.ground.files import write_jsonl


def write_task(folder: Path, task: dict, questions: Iterable[dict]) -> None:
    """Write a task and its questions."""
    write_jsonl(folder / f"{task['task']}.jsonl", questions)
    write_yaml(folder / f"{task['task']}.yaml", task)


def exact_match(name: str, home: str, pattern: str, until: str, longest: int) -> dict:
    """A task with greedy replies of at most `longest` tokens that end at `until`. The group of a reply's first match of
    the regular expression `pattern` must equal the expected answer."""
    return {
        **_source(name, home),
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [until], "max_gen_toks": longest, "do_sample": False},
        "filter_list": [
            {"name": "answer", "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def rolling(name: str, home: str) -> dict:
    """A task that measures the likelihood of whole documents."""
    aggregations = {
        "word_perplexity": "weighted_perplexity",
        "byte_perplexity": "weighted_perplexity",
        "bits_per_byte": "bits_per_byte",
    }
    return {
        **_source(name, home),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in aggregations.items()
        ],
    }


def multiple_choice(name: str, home: str) -> dict:
    """A task whose reply is the most likely of several answers."""
    return {
        **_source(name, home),
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }


NUMBER = r"-?\$?[\d,]*\.?\d+%?"


def generated(name: str, home: str, answers: list[str]) -> dict:
    """A task with greedy replies, of which the last number must equal the answer; the first line, or what follows
    `####`, where the answers are not all numbers. Case, `$`, `%`, commas in numbers and a full stop do not count.

    Where answers are numbers, prompt and metric are those of lm-eval's gsm8k (flexible-extract).
    """
    numbers = all(re.fullmatch(NUMBER, answer) for answer in answers)
    pattern = r"(-?[$0-9.,]{2,})|(-?[0-9]+)" if numbers else r"(?s)^(?:.*####)?\s*([^\n]+)"
    ignored = [",", r"\$", "%", r"\.$"] if numbers else [r"\.$"]
    settings = {"until": ["Question:", "</s>", "<|im_end|>"], "max_gen_toks": 256, "do_sample": False}
    taken = [{"function": "regex", "regex_pattern": pattern, "group_select": -1}, {"function": "take_first"}]
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    return {
        **_source(name, home),
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": settings,
        "filter_list": [{"name": "answer", "filter": taken}],
        "metric_list": [metric | {"ignore_case": True, "ignore_punctuation": False, "regexes_to_ignore": ignored}],
    }


def group_of(name: str, members: list[str]) -> dict:
    """A group with the exact match over its tasks, weighted by questions."""
    return {
        "group": name,
        "task": members,
        "aggregate_metric_list": [{"metric": "exact_match", "weight_by_size": True, "filter_list": "answer"}],
        "metadata": {"version": 1.0},
    }


def _source(name: str, home: str) -> dict:
    """The keys that all tasks have: the name, and the file of the questions."""
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

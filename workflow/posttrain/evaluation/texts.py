"""Metrics of generated texts against their references, of which a question may have several: BLEU, NIST, ROUGE, METEOR.

Words are those of mteval-v13a, by sacrebleu; capitals count, but for ROUGE and METEOR.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial, reduce
from operator import or_
from pathlib import Path

from posttrain.config.sections import Task
from posttrain.ground.errors import UserError

Item = list  # [references, answer] of one question
NO_WORDNET = "meteor needs WordNet, which nltk does not find: `python -m nltk.downloader wordnet`, with a network"
LONGEST_GRAM = 5  # words of NIST's longest n-gram, as in mteval-v13a


def bleu(items: list[Item]) -> float:
    """BLEU over all answers, from 0 to 100 (Papineni et al. 2002), by sacrebleu's defaults."""
    from sacrebleu import corpus_bleu

    most = max(len(references) for references, _ in items)
    streams: list[list] = [
        [references[n] if n < len(references) else None for references, _ in items] for n in range(most)
    ]
    return corpus_bleu([answer for _, answer in items], streams).score


def nist(items: list[Item]) -> float:
    """NIST over all answers (Doddington 2002, equation 3): each n-gram that a reference has too, by its information.

    nltk's own scores an answer by one reference for each length of n-gram. The equation, like mteval-v13a, counts those
    of all; with a single reference both agree.
    """
    from nltk.translate.nist_score import nist_length_penalty
    from nltk.util import ngrams

    corpus = [([words(text) for text in references], words(answer)) for references, answer in items]
    written = [reference for references, _ in corpus for reference in references]
    counts = Counter(gram for text in written for n in range(1, LONGEST_GRAM + 1) for gram in ngrams(text, n))
    total, score = sum(map(len, written)), 0.0

    def information(gram: tuple[str, ...]) -> float:
        return math.log2((counts[gram[:-1]] if len(gram) > 1 else total) / counts[gram])

    for n in range(1, LONGEST_GRAM + 1):
        gained, said = 0.0, 0
        for references, answer in corpus:
            grams = Counter(ngrams(answer, n))
            shared = grams & reduce(or_, (Counter(ngrams(reference, n)) for reference in references))
            gained += sum(information(gram) * count for gram, count in shared.items())
            said += grams.total()
        score += gained / said if said else 0.0
    expected = sum(sum(map(len, references)) / len(references) for references, _ in corpus)
    return score * nist_length_penalty(expected, sum(len(answer) for _, answer in corpus))


def rouge(kind: str, references: list[str], answer: str) -> float:
    """F1 of ROUGE (Lin 2004) with the reference that is nearest, by rouge-score, without stemming."""
    return scorer(kind).score_multi(references, answer)[kind].fmeasure


@cache
def scorer(kind: str):
    """rouge-score's scorer of one kind."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind])


def meteor(references: list[str], answer: str) -> float:
    """METEOR (Lavie and Agarwal 2007) with the reference that is nearest, by nltk; not of the Java program, 1.5."""
    from nltk.translate.meteor_score import meteor_score

    return float(meteor_score([words(text) for text in references], words(answer)))


def words(text: str) -> list[str]:
    """The words of a text, by mteval-v13a."""
    return tokenizer()(text).split()


@cache
def tokenizer():
    """sacrebleu's tokenizer of mteval-v13a."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


CORPUS: dict[str, Callable[[list[Item]], float]] = {"bleu": bleu, "nist": nist}  # of all answers together
SINGLE: dict[str, Callable[[list[str], str], float]] = {  # of one answer; the number is their mean
    "rouge_1": partial(rouge, "rouge1"),
    "rouge_2": partial(rouge, "rouge2"),
    "rouge_l": partial(rouge, "rougeL"),
    "meteor": meteor,
}


def has_wordnet() -> bool:
    """Whether nltk finds WordNet, without which METEOR knows no synonyms; it would be downloaded."""
    import nltk.data

    for name in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            return bool(nltk.data.find(name))
        except LookupError:
            continue
    return False


def pack(index: dict, tasks: Iterable[Task], folder: Path) -> Path:
    """Write lm-eval YAML for each task with `metrics`: the task, its answers measured by these. index: lm-eval's."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        if task.metrics:
            lines = [f"include: {json.dumps(str(index[task.task].yaml_path.resolve()))}"]
            lines += [f"process_results: !function {__name__}.{unmeasured.__name__}", "metric_list:"]
            for metric in task.metrics:
                function = f"!function {__name__}.{metric}" if metric in CORPUS else "mean"
                lines += [f"- metric: {metric}", f"  aggregation: {function}", "  higher_is_better: true"]
            if (
                task.task == "answers"
            ):  # of `prepare`: a row is a prompt with one reference; the whole reply is the answer
                lines += [f"process_docs: !function {__name__}.{grouped.__name__}"]
                lines += ["doc_to_text: question", "doc_to_target: references"]
                lines += ["filter_list: [{name: answer, filter: [{function: take_first}]}]"]
            (folder / f"{task.task}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def unmeasured(doc: dict, results: list) -> dict:
    """Stands for `measured` until the task is loaded, which that needs."""
    raise AssertionError("the task was loaded, but not by `measure`")


def grouped(docs):
    """The distinct questions, each with the answers of all rows that ask it as its references."""
    from datasets import Dataset

    rows: dict[str, dict] = {}
    for doc in docs:
        rows.setdefault(doc["question"], {**doc, "references": []})["references"].append(doc["answer"])
    return Dataset.from_list(list(rows.values()))


def measure(name: str, task, metrics: list[str]) -> None:
    """Let a loaded task of lm-eval measure its answers by metrics of texts, if any.

    Raises UserError for a question that is asked twice, or that has no reference, and for METEOR without WordNet.
    """
    asked: set[str] = set()
    for doc in task.eval_docs if metrics else ():
        question = task.doc_to_text(doc)
        if question in asked:
            way_out = "give all references of a question in one row, as a list that doc_to_target names"
            raise UserError(f"evaluate.tasks: {name} asks {question[:60]!r} twice: {way_out}")
        if not all(references := references_of(task, doc)):
            raise UserError(f"evaluate.tasks: {name} has an empty reference for {question[:60]!r}: {references}")
        asked.add(question)
    if "meteor" in metrics and not has_wordnet():
        raise UserError(f"evaluate.tasks: {name}: {NO_WORDNET}")
    if metrics:
        task.set_config(key="process_results", value=partial(measured, task, metrics))


def measured(task, metrics: list[str], doc: dict, results: list) -> dict:
    """Metric -> the number of an answer, or what is measured of all answers together."""
    references, answer = references_of(task, doc), str(results[0]).strip()
    return {name: SINGLE[name](references, answer) if name in SINGLE else [references, answer] for name in metrics}


def references_of(task, doc: dict) -> list[str]:
    """The references of a question; one empty text for none."""
    target = task.doc_to_target(doc)
    return [str(text).strip() for text in (target if isinstance(target, list) else [target])] or [""]

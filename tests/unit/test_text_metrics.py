"""BLEU, NIST, ROUGE and METEOR of answers: by hand, by their packages, and with controls that must be worse."""

import random
from pathlib import Path

import pytest

from posttrain.config.sections import Task
from posttrain.evaluation import texts
from posttrain.evaluation.tasks import generated, write_task
from posttrain.ground.errors import UserError
from posttrain.stages.evaluate import as_asked

REFERENCES = [
    ["The Eagle is a cheap pub near the river.", "Near the river there is a cheap pub, The Eagle."],
    ["The Mill serves Italian food in the city centre.", "Italian food is served at The Mill.", "Try The Mill!"],
    ["Zizzi is a family friendly coffee shop with low prices."],
]
PERFECT = [references[-1] for references in REFERENCES]
OF_ANOTHER = PERFECT[1:] + PERFECT[:1]
SHUFFLED = [" ".join(random.Random(0).sample(text.split(), len(text.split()))) for text in PERFECT]


@pytest.fixture
def wordnet(monkeypatch):
    """A WordNet without a word."""
    from nltk.corpus import wordnet

    monkeypatch.setattr(texts, "has_wordnet", lambda: True)
    monkeypatch.setitem(vars(wordnet), "synsets", lambda word: [])


def number(metric: str, answers: list[str]) -> float:
    items = [[references, answer] for references, answer in zip(REFERENCES, answers, strict=True)]
    if metric in texts.CORPUS:
        return texts.CORPUS[metric](items)
    return sum(texts.SINGLE[metric](*item) for item in items) / len(items)


@pytest.mark.parametrize("metric", [*texts.CORPUS, *texts.SINGLE])
def test_a_perfect_answer_is_best_and_a_shuffled_one_is_not(wordnet, metric):
    perfect = number(metric, PERFECT)
    assert perfect == pytest.approx({"bleu": 100, "nist": perfect}.get(metric, 1.0), abs=0.01)
    assert number(metric, OF_ANOTHER) < perfect / 2
    if metric != "rouge_1":  # it knows no order
        assert number(metric, SHUFFLED) < perfect * 0.9
    assert number(metric, ["", "", ""]) == 0


def test_nist_is_that_of_the_equation_and_with_one_reference_that_of_nltk():
    """ab with the references ab and ac: a is 2 of 4 words, 1 bit; b 1 of 4, 2 bits; b after a 1 of 2, 1 bit."""
    assert texts.nist([[["a b", "a c"], "a b"]]) == pytest.approx((1 + 2) / 2 + 1)
    assert texts.nist([[["a b", "a c"], "b c"]]) == pytest.approx((2 + 2) / 2), "words of both references count"

    from nltk.translate.nist_score import corpus_nist

    items = [[[reference], f"{reference} It is {n}."] for n, (reference, *_) in enumerate(REFERENCES)]
    words = [
        [[texts.words(text) for text in references] for references, _ in items],
        [texts.words(a) for _, a in items],
    ]
    assert texts.nist(items) == pytest.approx(corpus_nist(*words))
    items = [[references, " ".join(answer.split()[:4])] for references, answer in items]
    words = [words[0], [texts.words(answer) for _, answer in items]]
    assert texts.nist(items) == pytest.approx(corpus_nist(*words, n=4)), "too short: a penalty, and no gram of 5 words"


def test_bleu_has_as_many_references_as_there_are():
    from sacrebleu import sentence_bleu

    for references, answer in zip(REFERENCES, SHUFFLED, strict=True):
        by_hand = sentence_bleu(answer, references, use_effective_order=False).score
        assert texts.bleu([[references, answer]]) == pytest.approx(by_hand)
    assert number("bleu", PERFECT) > texts.bleu(
        [[refs[:1], one] for refs, one in zip(REFERENCES, PERFECT, strict=True)]
    )


def manager_of(folder: Path, task: Task):
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=str(folder), include_defaults=False).task_index
    pack = texts.pack(index, [task], folder.parent / f"{folder.name}-pack")
    return TaskManager(include_path=[str(folder), str(pack)], include_defaults=False)


def test_the_rows_of_a_question_are_its_references(tmp_path, cache):
    """Of prepared answers: asked once, with the whole reply as the answer. Control: without `metrics`, each row."""
    rows = [{"question": f"q{n}", "answer": text} for n, group in enumerate(REFERENCES) for text in group]
    write_task(tmp_path / "tasks", generated("answers", str(tmp_path / "tasks"), [row["answer"] for row in rows]), rows)
    task = Task(task="answers", metrics=["rouge_l", "bleu"])
    manager = manager_of(tmp_path / "tasks", task)
    (loaded,) = as_asked(manager, task, tmp_path / "tasks")
    assert [doc["references"] for doc in loaded.eval_docs] == REFERENCES
    assert {*loaded.aggregation()} == {"rouge_l", "bleu"} and loaded.aggregation()["bleu"] is texts.bleu
    found = loaded.process_results(loaded.eval_docs[0], [f" {PERFECT[0]}\n"])
    assert found == {"rouge_l": 1.0, "bleu": [REFERENCES[0], PERFECT[0]]}
    assert loaded.doc_to_text(loaded.eval_docs[0]) == "q0", "as it is: policies are trained on prompts of their own"
    plain = manager.load([str(tmp_path / "tasks/answers.yaml")])["tasks"]["answers"]
    assert len(plain.eval_docs) == len(rows) and {*plain.aggregation()} == {"exact_match"}
    assert plain.doc_to_text(plain.eval_docs[0]) == "Question: q0\nAnswer:"


@pytest.mark.parametrize(
    ("rows", "metrics", "said"),
    [
        ([["a", ["b", "c"]], ["d", ["e"]]], ["rouge_1"], ""),
        (
            [["a", ["b"]], ["a", ["c"]]],
            ["rouge_1"],
            "mine asks 'a' twice: give all references",
        ),
        ([["a", ["b", " "]]], ["bleu"], "mine has an empty reference for 'a'"),
        ([["a", []], ["b", ["c"]]], ["bleu"], "mine has an empty reference for 'a'"),
        ([["a", ["b"]]], ["meteor"], "meteor needs WordNet, which nltk does not find"),
    ],
)
def test_a_task_of_ones_own_has_its_references_in_a_list(tmp_path, cache, rows, metrics, said):
    given = {"task": "mine", "dataset_path": "json", "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "r"}
    given |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "tasks/mine.jsonl")}}}
    write_task(tmp_path / "tasks", given, [dict(zip("qr", row, strict=True)) for row in rows])
    task = Task(task="mine", metrics=metrics)
    manager = manager_of(tmp_path / "tasks", task)
    if said:
        with pytest.raises(UserError, match=said):
            as_asked(manager, task, tmp_path)
    else:
        (loaded,) = as_asked(manager, task, tmp_path)
        assert [loaded.process_results(doc, ["c"])["rouge_1"] for doc in loaded.eval_docs] == [1.0, 0.0]

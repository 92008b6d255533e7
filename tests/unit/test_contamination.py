"""Questions of lm-eval's tasks that are in the training rows.

pytest tests/unit/test_contamination.py
"""

import json

import pytest

from posttrain.config.sections import Task
from posttrain.evaluation.contamination import contaminated
from posttrain.ground.files import write_jsonl
from posttrain.stages.evaluate import as_asked, contamination_warnings

LEAKED = "Which town on the northern coast had the first public library of the whole island"
CLEAN = "How many wheels does the oldest tram in the museum at the harbour have today"
GENERATED = {
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
}
CHOSEN = {
    "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
}  # fmt: skip
CONTEXTS = CHOSEN | {"doc_to_text": "{{answer}}", "doc_to_target": "{{question}}"}  # as winogrande
ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}


ROWS = {  # the question in a training row of each task
    "text": {"text": f"A guide. {LEAKED}? It was Norhaven."},
    "sft": {"messages": [{"role": "user", "content": f"{LEAKED}?"}, {"role": "assistant", "content": "Norhaven."}]},
    "preference": {"prompt": "Ask me.", "chosen": f"{LEAKED}?", "rejected": "No."},
    "kto": {"prompt": "Ask me.", "completion": f"Well, {LEAKED}?", "label": True},
}


def prepared(folder, task: str):
    """The manifest of prepared data with one training row."""
    row = ROWS[task] | {"id": "1", "group": "g", "source": f"{task}.jsonl:7"}
    write_jsonl(folder / task / f"data/{task}/train.jsonl", [row])
    return folder / task / "manifest.json"


def manager_of(folder, **task):
    from lm_eval.tasks import TaskManager

    folder.mkdir(parents=True)
    docs = [{"question": text, "answer": 0, "choices": [f"{text} Norhaven", "no"]} for text in (CLEAN, LEAKED)]
    write_jsonl(folder / "quiz.jsonl", docs)
    given = {"task": "quiz", "dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    given |= {"dataset_kwargs": {"data_files": {"test": str(folder / "quiz.jsonl")}}} | task
    (folder / "quiz.yaml").write_text(json.dumps(given))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.mark.parametrize("kind", [GENERATED, CHOSEN, CONTEXTS, ROLLING], ids=["reply", "choice", "context", "text"])
def test_a_question_in_any_training_row_is_found(tmp_path, cache, kind):
    manager = manager_of(tmp_path / "tasks", **kind)
    for task in ROWS:
        (count, (finding,)) = contaminated(manager, ["quiz"], prepared(tmp_path, task))["quiz"]
        assert (count, finding.test, finding.train) == (2, "quiz:1", f"{task}.jsonl:7")
    assert contaminated(manager, ["quiz"], tmp_path / "empty/manifest.json") == {"quiz": (2, [])}, "control"


def test_a_contaminated_task_is_warned_of_and_its_questions_are_listed(tmp_path, cache, capsys):
    manager = manager_of(tmp_path / "tasks", **GENERATED)
    names = as_asked(manager, Task(task="quiz", shots=1), tmp_path / "tasks")
    (warning,) = contamination_warnings(manager, names, prepared(tmp_path, "text"), tmp_path / "work")
    assert warning.startswith("1 of 2 questions of quiz are in the training rows too, the first quiz:1: ")
    assert f"warning: {warning}" in capsys.readouterr().err
    (listed,) = (tmp_path / "work/data/overlap.jsonl").read_text().splitlines()
    assert json.loads(listed) == {"test": "quiz:1", "train": "text.jsonl:7", "how": "grams"}


def test_tasks_of_prepare_are_not_searched_again(tmp_path, cache):
    """Control: the same task elsewhere, above."""
    data = prepared(tmp_path, "text")
    manager = manager_of(data.parent / "data/tasks", **GENERATED)
    assert contaminated(manager, ["quiz"], data) == {}
    assert contamination_warnings(manager, ["quiz"], data, tmp_path / "work") == []
    assert not (tmp_path / "work").exists()

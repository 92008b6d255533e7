"""Questions of lm-eval's tasks that training rows hold too, by the rule of `data/overlap.py`.

`prepare` searches its own tasks before anything is trained; those of lm-eval are named by `evaluate` alone.
"""

from pathlib import Path

from posttrain.config.sections import TRAINED
from posttrain.data.overlap import Finding, overlap
from posttrain.data.stored import Rows, store
from posttrain.ground.files import rows_of


def contaminated(manager, names: list, data: Path) -> dict[str, tuple[int, list[Finding]]]:
    """Task -> (number of its questions, those of which a training row holds one); no entry for tasks of `prepare`.

    manager, names: lm-eval's, of tasks and groups, which may be loaded; data: manifest of `prepare`.
    """
    own = (data.parent / "data" / "tasks").resolve()
    tasks = manager.load(names)["tasks"]
    foreign = {name: questions(task) for name, task in tasks.items() if not (own / f"{name}.yaml").is_file()}
    train = training_rows(data) if foreign else store([])
    leaks = {name: [finding for finding in overlap(train, rows) if finding.is_leak] for name, rows in foreign.items()}
    return {name: (len(rows), leaks[name]) for name, rows in foreign.items()}


def training_rows(data: Path) -> Rows:
    """The training rows of all tasks."""
    files = [data.parent / "data" / task / "train.jsonl" for task in TRAINED]
    return store((row for file in files if file.is_file() for row in rows_of(file)), numbered=False)


def questions(task) -> list[dict]:
    """The questions of a task of lm-eval as rows of `overlap`, each with its answer and its place, TASK:NUMBER."""
    rows = []
    for number, doc in enumerate(task.eval_docs):
        asked, answer = task.doc_to_text(doc), task.doc_to_target(doc)
        choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else []
        if isinstance(answer, int) and answer < len(choices):
            answer = choices[answer]
        if not isinstance(asked, str):  # the number of the context among the choices
            asked = " ".join(choices)
        answer = answer[0] if isinstance(answer, list) and answer else answer
        row = {"question": asked, "answer": str(answer)} if asked.strip() else {"text": str(answer)}
        rows.append(row | {"id": str(number), "group": f"{task.config.task}:{number}"})
        rows[-1]["source"] = rows[-1]["group"]
    return rows

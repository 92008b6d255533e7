"""Tasks of the user's own in lm-eval's YAML: what they read is an input, and what lm-eval could not load is refused."""

from pathlib import Path

import pytest
import yaml

from posttrain.dag import campaign
from posttrain.ground.errors import UserError
from posttrain.ground.files import write_jsonl

REST = "base: {scratch: {}}\nsft: {}\n"
COMMIT = "86f7e437faa5a7fce15d1ddcb9eaeaea377667b8"
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: tasks/{name}.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""
CODE = "def shout(doc):\n    return doc['question'].upper()\n"


@pytest.fixture
def folder(here):
    """A task of the user's own, `mine`, with its data, and a function."""
    Path("tasks").mkdir()
    Path("tasks/mine.yaml").write_text(TASK.format(name="mine"))
    write_jsonl(Path("tasks/mine.jsonl"), [{"question": "a?", "answer": "b"}])
    Path("tasks/code.py").write_text(CODE)
    return here


def load(prepare="prepare: {world: {}}", **evaluate):
    Path("config/experiments").mkdir(parents=True, exist_ok=True)
    Path("config/config.yaml").write_text("experiments: [one]\n")
    section = {"tasks": [{"task": "mine"}], "task_files": ["tasks/mine.yaml"]} | evaluate
    Path("config/experiments/one.yaml").write_text(f"{prepare}\n{REST}{yaml.safe_dump({'evaluate': section})}")
    return campaign.load("config/config.yaml")


def refused(*prepare, **evaluate) -> str:
    with pytest.raises(UserError) as caught:
        load(*prepare, **evaluate)
    return str(caught.value)


def test_a_task_what_it_includes_its_data_and_its_functions_are_inputs(folder):
    assert load().inputs("one", "evaluate", "sft")["files"] == ["tasks/mine.yaml", "tasks/mine.jsonl"]
    assert "files" not in load(tasks=None, task_files=None).inputs("one", "evaluate", "sft"), "control"
    Path("tasks/mine.yaml").rename("tasks/base")
    Path("tasks/mine.yaml").write_text("include: base\ndoc_to_text: !function code.shout\n")
    files = load(task_functions=["tasks/code.py:shout"]).inputs("one", "evaluate", "sft")["files"]
    assert files == ["tasks/mine.yaml", "tasks/base", "tasks/mine.jsonl", "tasks/code.py"]


def test_code_is_refused_unless_it_is_named(folder):
    Path("tasks/mine.yaml").write_text(TASK.format(name="mine").replace('"{{question}}"', "!function code.shout"))
    said = refused()
    assert "evaluate.task_files[0]: tasks/mine.yaml:5: doc_to_text: runs code, tasks/code.py:shout" in said
    assert "defines no function 'whisper'" in refused(task_functions=["tasks/code.py:whisper"])
    load(task_functions=["./tasks/code.py:shout"])
    with open("tasks/code.py", "a") as file:
        file.write("\n\ndef other(doc): ...\n")
    both = ["tasks/code.py:shout", "tasks/code.py:other"]
    assert "task_functions[1]: no file of evaluate.task_files calls tasks/code.py:other" in refused(task_functions=both)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("task: mine", "tsk: mine"), "tasks/mine.yaml:1: defines no task"),
        (("doc_to_text", "doc_to_txt"), "tasks/mine.yaml:5: doc_to_txt: unknown key of lm-eval (did you mean 'doc_to_"),
        (("test_split: test", "test_split: [test"), "tasks/mine.yaml:5: not valid YAML"),
        (("test_split: test", "test_split: dev"), "tasks/mine.yaml:4: test_split: dataset_kwargs.data_files has no 'd"),
        (("test_split: test\n", ""), "tasks/mine.yaml:1: has no test_split"),
        (("{{answer}}", "{{answer}"), "tasks/mine.yaml:6: doc_to_target: is no Jinja template"),
        (("test_split", "output_type: guess\ntest_split"), "tasks/mine.yaml:4: output_type: found 'guess', allowed"),
        (("test_split", "class: !function code.shout\ntest_split"), "class makes the task in Python"),
        (("test_split", "unsafe_code: true\ntest_split"), "answers would run as code"),
        (("test_split", "include: gone.yaml\ntest_split"), "tasks/gone.yaml: cannot be read: No such file"),
        (("test_split", "include: mine.yaml\ntest_split"), "tasks/mine.yaml: is included twice"),
        (("test_split", "metric_list: [{metric: rouge}]\ntest_split"), "metric_list: rouge would come from the hub"),
        (("test_split", "metric_list: [{metric: acc, aggregation: men}]\ntest_split"), "found aggregation 'men'"),
        (("tasks/mine.jsonl", "tasks/gone.jsonl"), "evaluate.task_files[0]: there is no tasks/gone.jsonl"),
        (("tasks/mine.jsonl", "https://x/y.jsonl"), "its data are at an address"),
        (("dataset_kwargs: {data_files: {test: tasks/mine.jsonl}}\n", ""), "json needs dataset_kwargs"),
        (("dataset_path: json", "dataset_path: org/rows"), "tasks[0].revision: is missing: 'mine' reads the data set"),
    ],
)  # fmt: skip
def test_what_lm_eval_could_not_load_is_refused(folder, change, said):
    file = Path("tasks/mine.yaml")
    file.write_text(file.read_text().replace(*change))
    assert said in (text := refused()) and "config/experiments/one.yaml:" in text, text


def test_each_file_is_named_by_a_task(folder):
    assert "defines 'mine', which evaluate.tasks names neither" in refused(tasks=[{"task": "world"}])
    assert "'yours' is not made by prepare here" in refused(tasks=[{"task": "mine"}, {"task": "yours"}])
    assert "there is no tasks/gone.yaml" in refused(task_files=["tasks/mine.yaml", "tasks/gone.yaml"])
    Path("tasks/again.yaml").write_text(TASK.format(name="mine"))
    assert "defines 'mine', as tasks/mine.yaml does" in refused(task_files=["tasks/mine.yaml", "tasks/again.yaml"])
    Path("tasks/again.yaml").write_text(TASK.format(name="world").replace("tasks/world", "tasks/mine"))
    said = refused(tasks=[{"task": "mine"}, {"task": "world"}], task_files=["tasks/mine.yaml", "tasks/again.yaml"])
    assert "'world' is made by prepare too" in said


@pytest.mark.parametrize("text", [None, "task: [mine", "tsk: mine"], ids=["absent", "not YAML", "no task"])
def test_a_wrong_file_is_one_mistake(folder, text):
    """Though no task has its name then, and nothing calls its functions."""
    section = {"tasks": [{"task": "mine", "metrics": ["bleu"]}], "task_functions": ["tasks/code.py:shout"]}
    Path("tasks/mine.yaml").unlink() if text is None else Path("tasks/mine.yaml").write_text(text)
    assert len(refused(**section).splitlines()) == 1


def test_a_group_and_a_tag_stand_for_their_tasks(folder):
    files = ["tasks/mine.yaml", "tasks/both.yaml"]
    Path("tasks/both.yaml").write_text("group: both\ntask: [mine]\n")
    load(tasks=[{"task": "both"}], task_files=files)
    Path("tasks/both.yaml").write_text("group: both\ntask: [mine, yours]\n")
    assert "tasks/both.yaml:2: task: no file of evaluate.task_files defines 'yours'" in refused(
        tasks=[{"task": "both"}], task_files=files
    )
    with open("tasks/mine.yaml", "a") as file:
        file.write("tag: few\n")
    load(tasks=[{"task": "few"}])


def test_data_on_the_hub_are_fetched_at_their_commit(folder):
    file = Path("tasks/mine.yaml")
    assert "tasks[0].revision: has no effect" in refused(tasks=[{"task": "mine", "revision": COMMIT}])
    file.write_text(TASK.format(name="mine").replace("path: json", "path: org/rows").replace("dataset_kw", "#"))
    plan = load(tasks=[{"task": "mine", "revision": COMMIT}])
    assert plan.fetched("one", "evaluate") == [f"results/fetch/datasets--org--rows@{COMMIT}/manifest.json"]
    assert plan.fetch_section(f"datasets--org--rows@{COMMIT}")["datasets"][0]["id"] == "org/rows"
    assert "'main' can move" in refused(tasks=[{"task": "mine", "revision": "main"}])


BEAMS = {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4}


@pytest.mark.parametrize(
    ("task", "generation", "said"),
    [
        ("world", BEAMS, ""),
        ("mine", BEAMS, ""),
        ("heldout_text", BEAMS, "tasks[0].generation: has no effect: the answers to 'heldout_text' are not generated"),
        ("chosen", BEAMS, "tasks[0].generation: has no effect: the answers to 'chosen' are not generated"),
        ("world", {}, "tasks[0].generation: is empty"),
        ("world", {"length_penalty": 0.9}, "generation.length_penalty: has no effect without num_beams"),
        ("world", {"temperature": 0.7}, "generation.temperature: has no effect without do_sample"),
        ("world", {"top_p": 0.9, "do_sample": False}, "generation.top_p: has no effect without do_sample"),
        ("world", {"max_gen_toks": 999}, "generation.max_gen_toks: 999 leaves no room"),
        ("world", {"do_sample": True, "top_p": 0.9}, "evaluate.batch_size: must be a number"),
    ],
)
def test_settings_of_generation_need_a_task_that_generates(folder, task, generation, said):
    section = {"tasks": [{"task": task, "generation": generation}], "task_files": None}
    if task in ("mine", "chosen"):
        kind = "multiple_choice" if task == "chosen" else "generate_until"
        Path("tasks/mine.yaml").write_text(
            f"output_type: {kind}\n" + TASK.format(name=task).replace("/chosen", "/mine")
        )
        section["task_files"] = ["tasks/mine.yaml"]
    assert said in refused(**section) if said else load(**section)


def test_sampling_has_a_fixed_batch(folder):
    sampled = {"do_sample": True, "top_p": 0.9}
    load(tasks=[{"task": "world", "generation": sampled}], task_files=None, batch_size=8)
    with open("tasks/mine.yaml", "a") as file:
        file.write("generation_kwargs: {do_sample: true, temperature: 0.7}\n")
    assert "batch_size: must be a number: the sampled answers to 'mine'" in refused()
    load(tasks=[{"task": "mine", "generation": {"do_sample": False}}])


def test_sampling_is_from_all_tokens_unless_the_paper_says_otherwise():
    from posttrain.config.sections import Generation
    from posttrain.stages.evaluate import kwargs_of

    own = {"until": ["."], "temperature": 0.0, "do_sample": False}
    assert kwargs_of(Generation(num_beams=4), own) == own | {"num_beams": 4}
    free = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    assert kwargs_of(Generation(do_sample=True), own) == own | free
    assert kwargs_of(Generation(do_sample=True, top_p=0.9, temperature=0.7), own) == own | free | {
        "top_p": 0.9,
        "temperature": 0.7,
    }


@pytest.mark.parametrize(
    ("task", "metrics", "said"),
    [
        ("mine", ["bleu", "nist", "rouge_1", "rouge_2", "rouge_l"], ""),
        ("answers", ["bleu"], ""),
        (
            "world",
            ["bleu"],
            "tasks[0].metrics: are for `answers`, and for tasks of task_files that",
        ),
        ("chosen", ["bleu"], "tasks[0].metrics: are of generated texts: 'chosen' does not generate"),
        ("both", ["bleu"], "tasks[0].metrics: are of generated texts: 'both' is a group: name its tasks"),
        ("mine", ["bleu", "bleu"], "tasks[0].metrics: names one twice"),
        ("mine", ["meteor"], "tasks[0].metrics: meteor needs WordNet, which nltk does not find"),
        ("mine", ["cider"], "tasks[0].metrics[0]: 'cider' is refused: its package, pycocoevalcap, is of 2020"),
        ("mine", ["blue"], "tasks[0].metrics[0]: found 'blue', it should be 'bleu', 'nist'"),
    ],
)
def test_metrics_of_texts_need_texts(folder, task, metrics, said):
    section = {"tasks": [{"task": task, "metrics": metrics}], "task_files": ["tasks/mine.yaml"]}
    if task == "chosen":
        text = TASK.format(name="chosen").replace("tasks/chosen", "tasks/mine")
        Path("tasks/mine.yaml").write_text(f"output_type: multiple_choice\n{text}")
    elif task == "both":
        Path("tasks/both.yaml").write_text("group: both\ntask: [mine]\n")
        section["task_files"].append("tasks/both.yaml")
    elif task != "mine":
        section["task_files"] = None
    prepare = "prepare: {world: {}, answers: [{path: tasks/mine.jsonl}]}"
    assert said in refused(prepare, **section) if said else load(prepare, **section)

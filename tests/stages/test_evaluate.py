"""evaluate: lm-eval's numbers, the same by hand, for every kind of policy; nothing that batch or cache could move."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make, sft

from posttrain.__main__ import main
from posttrain.config.sections import Evaluate, Generation, Task
from posttrain.ground.errors import UserError
from posttrain.ground.files import manifest_of, read_json, read_jsonl, write_json, write_jsonl
from posttrain.tools.export import export
from posttrain.training import parallel
from posttrain.world.language import KINDS

TABLE = ("task", "metric", "value", "stderr", "n", "higher_is_better")


@pytest.fixture(scope="module")
def tuned(data, base) -> Path:
    """A 4-bit LoRA."""
    return make("sft", sft(method="qlora", steps=30), Path("results/evaluated/sft/manifest.json"), data=data, base=base)


def evaluate(data, policy, base, name, **section) -> dict:
    output = Path(f"results/{name}/evaluate/{policy.parent.name}/manifest.json")
    make("evaluate", Evaluate(**section), output, data=data, policy=policy, base=base)
    return {(row["task"], row["metric"]): row for row in read_json(output.parent / "metrics.json")["rows"]}


def test_the_batch_changes_no_answer_of_a_prompt_tuned_policy(data, base):
    """PEFT puts virtual tokens before the padding of a batch: there, shorter questions would get other answers."""
    section = sft(method="prompt", steps=12, learning_rate=0.1, virtual_tokens=8)
    policy = make("sft", section, Path("results/prompted/sft/manifest.json"), data=data, base=base)
    said = {}
    for size in (1, 16):
        evaluate(data, policy, base, f"prompted-{size}", batch_size=size, tasks=[Task(task="world")])
        folder = Path(f"results/prompted-{size}/evaluate/sft/data/samples")
        said[size] = {file.name: [row["resps"] for row in read_jsonl(file)] for file in sorted(folder.iterdir())}
    assert said[1] and said[1] == said[16]


@pytest.fixture(scope="module")
def rows(data, base, tuned) -> dict:
    return evaluate(data, tuned, base, "first")


def test_rows_have_value_error_and_count(rows):
    world = rows["world", "exact_match"]
    assert set(world) == set(TABLE) and world["n"] == 33 and world["stderr"] is not None
    members = [row for (task, _), row in rows.items() if task.startswith("world_")]
    assert world["n"] == sum(row["n"] for row in members)
    assert world["value"] == pytest.approx(sum(row["value"] * row["n"] for row in members) / world["n"])
    assert rows["heldout_text", "bits_per_byte"]["value"] < 8


def test_lm_evals_own_files_are_kept_whole(rows):
    folder = Path("results/first/evaluate/sft")
    result = read_json(folder / "lm_eval.json")
    assert {"results", "configs", "versions", "n-samples", "higher_is_better", "date"} <= set(result)
    sample = read_jsonl(next(folder.glob("data/samples/world_*.jsonl")))[0]
    assert {"doc", "target", "arguments", "resps", "filtered_resps", "doc_hash", "prompt_hash"} <= set(sample)


def test_the_prompt_is_the_one_that_was_trained(rows):
    """One BOS, the question, and the token after which the assistant speaks."""
    sample = read_jsonl(next(Path("results/first/evaluate/sft").glob("data/samples/world_*.jsonl")))[0]
    prompt = sample["arguments"][0][0]
    assert prompt.count("<|bos|>") == 1 and prompt.endswith("<|end|><|assistant|>")


def test_the_answer_is_deterministic_and_the_batch_changes_nothing(rows, data, base, tuned, monkeypatch):
    """Where memory holds one request, `auto` is one: with the same identity, and a record of what it was."""
    import lm_eval

    sizes, by = [], lm_eval.simple_evaluate

    def spied(**asked):
        sizes.append(asked["model"].batch_size)
        return by(**asked)

    monkeypatch.setattr(lm_eval, "simple_evaluate", spied)
    again = evaluate(data, tuned, base, "again")
    monkeypatch.setattr(parallel, "fits", 1)
    small = evaluate(data, tuned, base, "small")
    records = [read_json(Path(f"results/{name}/evaluate/sft/provenance.json")) for name in ("again", "small")]
    assert [record["shape"]["batch_size"] for record in records] == sizes == [64, 1]
    assert records[0]["identity"] == records[1]["identity"]
    names = "data/samples/world_biggest.jsonl", "metrics.json"
    first, second = (
        read_json(Path(f"results/{name}/evaluate/sft/manifest.json"))["files"] for name in ("first", "again")
    )
    assert all(first[name] == second[name] for name in names)
    for key, row in rows.items():
        assert again[key]["value"] == row["value"]
        assert small[key]["value"] == pytest.approx(row["value"], rel=1e-5)


def edited(file: Path, edit) -> None:
    """Edit a file of JSON, or the first line of one of JSON Lines, and sign the artifact anew."""
    folder = Path("results/edited/evaluate/sft")
    lines = [json.loads(line) for line in (folder / file).read_text().splitlines()] if file.suffix == ".jsonl" else None
    content = lines[0] if lines else read_json(folder / file)
    edit(content)
    write_jsonl(folder / file, lines) if lines else write_json(folder / file, content)
    write_json(folder / "manifest.json", manifest_of(folder, ["data", "metrics.json"]))


def spotcheck(capsys, artifact: str, *options: str) -> tuple[int, str]:
    code = main(["spotcheck", artifact, *options])
    output = capsys.readouterr()
    return code, output.err + output.out


def test_questions_are_asked_again(rows, capsys, monkeypatch):
    """All of them, and some; in another batch than before."""
    monkeypatch.setattr(parallel, "fits", None)  # set by a spot-check for its process
    code, text = spotcheck(capsys, "first/evaluate/sft", "--questions", "1000")
    assert code == 0 and "asked again: 68 of 68 questions" in text and text.rstrip().endswith("agrees"), text
    assert "world: 33 of its 33 questions were asked again, all equal: with 95 % confidence at most 0 of them" in text
    code, text = spotcheck(capsys, "first/evaluate/sft", "--questions", "12", "--seed", "1")
    assert code == 0 and "asked again: 12 of 68 questions (--seed 1 draws the same)" in text, text
    assert "is off by at most 0." in text


def test_an_edited_answer_score_or_number_is_noticed(rows, capsys, monkeypatch):
    """Though the manifest was made anew."""
    monkeypatch.setattr(parallel, "fits", None)
    whole, copy = Path("results/first/evaluate/sft"), Path("results/edited/evaluate/sft")
    file, other = (one.relative_to(whole) for one in sorted(whole.glob("data/samples/world_*.jsonl"))[:2])

    def other_answer(sample):
        sample["resps"] = [[" the answer is that."]]

    def other_score(sample):
        sample["exact_match"] = 1.0 - sample["exact_match"]

    def left_out(sample):
        sample["doc_id"] = 999

    def other_number(metrics):
        next(row for row in metrics["rows"] if row["task"] == "world")["value"] += 0.01

    shutil.copytree(whole, copy)
    for place, edit in ((file, other_answer), (other, other_score), (Path("metrics.json"), other_number)):
        edited(place, edit)
    code, text = spotcheck(capsys, "edited/evaluate/sft", "--questions", "1000")
    for named in (
        rf"{file.stem} question 0: answer \[\[.* the answer is that",
        rf"{other.stem} exact_match: .* is reported, their answers make",
        "world exact_match: .* is reported, their answers make",
    ):
        assert code == 1 and re.search(f"differs: {named}", text), text
    edited(file, left_out)
    code, text = spotcheck(capsys, "edited/evaluate/sft", "--questions", "1000")
    assert code == 1 and re.search(rf"{file.stem}: \d+ questions were to be asked, \d+ of them have answers", text), (
        text
    )


def test_stale_answers_are_never_served(rows, data, base, tuned, tmp_path):
    """lm-eval's request cache would; the questions change and so must the answers."""
    import shutil

    copied = tmp_path / "prepare"
    shutil.copytree(data.parent, copied)
    file = copied / "data/tasks/world_biggest.jsonl"
    changed = [{**row, "prompt": "what is your name?"} for row in read_jsonl(file)]
    from posttrain.ground.files import manifest_of, write_json, write_jsonl

    write_jsonl(file, changed)
    for task in (copied / "data/tasks").glob("*.yaml"):
        task.write_text(task.read_text().replace("results/tiny/prepare", str(copied)))
    write_json(copied / "manifest.json", manifest_of(copied, ["data", "metrics.json"]))
    evaluate(copied / "manifest.json", tuned, base, "changed")
    sample = read_jsonl(Path("results/changed/evaluate/sft/data/samples/world_biggest.jsonl"))[0]
    assert "what is your name?" in sample["arguments"][0][0]


def by_hand(folder: Path, data: Path, *more: str) -> dict:
    """The `lm_eval` command, with nothing of ours."""
    output = Path("by-hand")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32",
               "--tasks", "world,heldout_text", "--include_path", str(data.parent / "data/tasks"), "--batch_size", "64",
               "--device", "cpu", "--apply_chat_template", "--output_path", str(output), *more]  # fmt: skip
    environment = os.environ | {"HF_DATASETS_CACHE": str(Path.cwd() / "cache-by-hand")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_json(max(output.rglob("results_*.json"), key=lambda file: file.stat().st_mtime))["results"]


@pytest.mark.slow
def test_lm_eval_by_hand_gives_the_same_numbers(rows, data, base, tuned):
    """On the exported 4-bit policy and on the base's own folder; the two differ from each other (control)."""
    export(tuned, Path("exported"))
    assert "`qlora, merged; a whole model`" in Path("exported/README.md").read_text()
    hand = by_hand(Path("exported"), data)
    untouched = by_hand(base.parent / "model", data)
    ours = evaluate(data, base, base, "first")
    for found, expected in ((hand, rows), (untouched, ours)):
        for (task, metric), row in expected.items():
            name = next(key for key in found[task] if key.startswith(f"{metric},"))
            assert found[task][name] == pytest.approx(row["value"], rel=1e-6), (task, metric)
    differ = ("heldout_text", "bits_per_byte")
    assert rows[differ]["value"] != pytest.approx(ours[differ]["value"], rel=1e-6)


@pytest.mark.parametrize("method", ["prefix", "prompt", "full"])
def test_policies_that_are_no_lora_are_evaluated_too(data, base, home, method):
    policy = make("sft", sft(method=method), Path(f"results/as-{method}/sft/manifest.json"), data=data, base=base)
    found = evaluate(data, policy, base, f"as-{method}", limit=2)
    assert found["world", "exact_match"]["n"] == 2 * len(KINDS)
    plain = evaluate(data, base, base, f"base-{method}", limit=2)
    key = "heldout_text", "bits_per_byte"
    assert found[key]["value"] != plain[key]["value"], "control: the adapter is really in use"


def test_examples_are_put_before_each_question(data, base):
    """`shots` ended in a TypeError. Of a group and of one task; control: another number puts another number there."""
    for shots, task in ((2, "world"), (0, "world_biggest")):
        name = f"shots-{task}-{shots}"
        evaluate(data, base, base, name, tasks=[Task(task=task, shots=shots)], limit=2)
        (sample, _) = read_jsonl(Path(f"results/{name}/evaluate/base/data/samples/world_biggest.jsonl"))
        prompt = str(sample["arguments"])
        asked = sum(prompt.count(row["prompt"]) for row in read_jsonl(data.parent / "data/tasks/world_biggest.jsonl"))
        assert asked == 1 + shots


def answers(name: str) -> list[str]:
    rows = read_jsonl(Path(f"results/{name}/evaluate/base/data/samples/world_biggest.jsonl"))
    return [row["resps"][0][0] for row in rows]


def test_answers_are_generated_as_the_config_says(data, base, capsys, monkeypatch):
    """A beam search is transformers' own, whatever the batch. Sampling is repeated by its seed, and by a spot-check."""
    from posttrain.models.policy import load_policy

    def asked(name: str, seed: int = 0, batch_size: int = 3, **generation) -> list[str]:
        task = Task(task="world_biggest", generation=Generation(max_gen_toks=6, **generation))
        evaluate(data, base, base, name, tasks=[task], limit=3, batch_size=batch_size, seed=seed)
        return answers(name)

    search = {"num_beams": 4, "length_penalty": 0.5, "no_repeat_ngram_size": 2}
    found, greedy = asked("beams", **search), asked("greedy")
    assert read_json(Path("results/beams/evaluate/base/metrics.json"))["generation"]["world_biggest"]["num_beams"] == 4
    model, tokenizer = load_policy(base, None)
    by_hand = []
    for row in read_jsonl(Path("results/beams/evaluate/base/data/samples/world_biggest.jsonl")):
        tokens = tokenizer(row["arguments"][0][0], add_special_tokens=False, return_tensors="pt").input_ids
        ends = {"stop_strings": ["<|end|>"], "tokenizer": tokenizer, "pad_token_id": tokenizer.pad_token_id}
        said = model.generate(tokens, max_new_tokens=6, do_sample=False, **search, **ends)[0, tokens.shape[1] :]
        by_hand.append(tokenizer.decode(said, skip_special_tokens=True))
    assert found == by_hand == asked("beams-alone", batch_size=1, **search) and found != greedy

    drawn = asked("drawn", do_sample=True)
    assert drawn == asked("drawn-again", do_sample=True) and drawn != asked("drawn-otherwise", seed=1, do_sample=True)
    code, text = spotcheck(capsys, "drawn/evaluate/base", "--questions", "1")
    assert code == 0 and "asked again: 3 of 3 questions" in text, text
    monkeypatch.setattr(parallel, "fits", 2)
    with pytest.raises(UserError, match="sampled answers to world_biggest depend on the requests at once"):
        asked("drawn-in-less", do_sample=True)


def test_texts_are_measured_against_all_their_references(data, base, capsys, monkeypatch):
    """Those with the answer itself among them make it perfect. Control: the answers to the other questions."""
    questions = [row["prompt"] for row in read_jsonl(data.parent / "data/tasks/world_biggest.jsonl")[:3]]
    Path("texts.yaml").write_text(
        "task: texts\ndataset_path: json\ndataset_kwargs: {data_files: {test: texts.jsonl}}\ntest_split: test\n"
        "doc_to_text: '{{prompt}} {{number}}'\ndoc_to_target: references\n"
    )
    metrics = ["rouge_l", "bleu", "nist"]
    task = Task(task="texts", metrics=metrics, generation=Generation(max_gen_toks=12, no_repeat_ngram_size=1))

    def measured(name: str, *references: list[str]) -> list[float]:
        asked = enumerate(zip(questions, zip(*references, strict=True), strict=True))
        rows = [{"prompt": prompt, "number": n, "references": given} for n, (prompt, given) in asked]
        write_jsonl(Path("texts.jsonl"), rows)
        found = evaluate(data, base, base, name, tasks=[task], task_files=["texts.yaml"])
        assert [row["n"] for row in found.values()] == [3, 3, 3]
        return [found["texts", metric]["value"] for metric in metrics]

    none = ["zzz"] * 3
    assert measured("unlike", none) == [0.0, 0.0, 0.0]
    rows = read_jsonl(Path("results/unlike/evaluate/base/data/samples/texts.jsonl"))
    said = [row["resps"][0][0] for row in rows]
    perfect, others = measured("perfect", none, said), measured("others", none, said[1:] + said[:1])
    assert perfect[0] == 1.0 and all(one > other for one, other in zip(perfect, others, strict=True))
    monkeypatch.setattr(parallel, "fits", None)
    code, text = spotcheck(capsys, "others/evaluate/base", "--questions", "2")
    assert code == 0 and "equal: the reported numbers" in text, text


def test_a_task_of_ones_own_is_asked(data, base, home, capsys):
    """In lm-eval's own format, with a function; its questions are searched for in the training rows."""
    trained = read_jsonl(data.parent / "data/sft/train.jsonl")[0]["messages"][-2]["content"]
    write_jsonl(
        Path("mine.jsonl"), [{"question": trained, "answer": "x"}, {"question": "what is seven?", "answer": "y"}]
    )
    Path("shouting.py").write_text("def shout(doc):\n    return doc['question'].upper()\n")
    Path("mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: mine.jsonl}}\ntest_split: test\n"
        'doc_to_text: !function shouting.shout\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n"
    )
    section = {"tasks": [Task(task="mine")], "task_files": ["mine.yaml"]}
    with pytest.raises(UserError, match=r"mine\.yaml: runs code, shouting\.py:shout"):
        evaluate(data, base, base, "mine", **section)
    section["task_functions"] = ["shouting.py:shout"]
    assert evaluate(data, base, base, "mine", **section)["mine", "exact_match"]["n"] == 2
    folder = Path("results/mine/evaluate/base")
    assert "WHAT IS SEVEN?" in read_jsonl(folder / "data/samples/mine.jsonl")[1]["arguments"][0][0]
    assert {*read_json(folder / "provenance.json")["inputs"]["files"]} == {"mine.yaml", "mine.jsonl", "shouting.py"}
    assert "mine: 0 of 2 questions are in the training rows too" in capsys.readouterr().err, "they were searched for"
    Path("shouting.py").write_text("def shout(doc):\n    return doc['quest']\n")
    with pytest.raises(UserError, match=r"lm-eval cannot load 'mine': KeyError: 'quest'"):
        evaluate(data, base, base, "mine-wrong", **section)


def test_an_unknown_task_is_named(data, base, tuned):
    with pytest.raises(UserError, match=r"evaluate\.tasks: 'wrold'.*world.*revision"):
        evaluate(data, tuned, base, "unknown", tasks=[Task(task="wrold")])


def test_virtual_tokens_cannot_be_exported(data, base, home, tmp_path):
    policy = make("sft", sft(method="prompt"), Path("results/as-prompt/sft/manifest.json"), data=data, base=base)
    with pytest.raises(UserError, match="cannot be merged"):
        export(policy, tmp_path / "x")


def test_altered_bytes_are_not_exported(base, home, tmp_path):
    copied = tmp_path / "base"
    shutil.copytree(base.parent, copied)
    weights = bytearray((copied / "model/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model/model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors: its bytes differ from its manifest"):
        export(copied / "manifest.json", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_no_connection_is_opened(data, base, tuned, monkeypatch):
    """Compute nodes have no network."""
    import socket

    def refuse(self, address):
        raise AssertionError(f"a connection to {address} was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(AssertionError):
        socket.create_connection(("127.0.0.1", 9))  # control: the guard works
    evaluate(data, tuned, base, "offline", limit=1)


def test_another_chat_template_than_the_trained_one_is_refused(rows, data, base, tuned, monkeypatch):
    """What lm-eval itself would use is compared, and recorded; control: lm-eval handed another template."""
    from lm_eval.models.huggingface import HFLM

    from posttrain.models.policy import read_contract

    used = read_json(Path("results/first/evaluate/sft/metrics.json"))["chat_template"]
    assert used == read_contract(tuned)["chat_template"] is not None
    monkeypatch.setattr(HFLM, "chat_template", lambda self, chosen: "{{ messages }}")
    with pytest.raises(UserError, match="was trained with"):
        evaluate(data, tuned, base, "templated", limit=1)

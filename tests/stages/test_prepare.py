"""prepare: the built-in world, local files, splits that do not leak, lengths, and the tasks that come of it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from families import tokenizer_of
from tiny import make, scratch, sft

from posttrain.config.sections import Base, Prepare, Source, Tokenizer, World
from posttrain.data import stored, usable
from posttrain.ground import workers
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, read_jsonl
from posttrain.stages.prepare import prepare as run

CHAT = {
    "messages": [{"role": "user", "content": "Name a colour number {}"}, {"role": "assistant", "content": "It is {}."}]
}


def chat_file(folder, name="chat.jsonl", rows=40, start=0):
    path = folder / name
    lines = [json.dumps(CHAT).replace("{}", f"{n} of {n * 7919} things") for n in range(start, start + rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def text_file(folder, name="text.jsonl", rows=60, start=0):
    path = folder / name
    texts = [f"Document {n} about thing {n * 31}." for n in range(start, start + rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def prepare(folder, **section):
    section = {"tokenizer": Tokenizer(vocab_size=300), "max_tokens": 200} | section
    return make("prepare", Prepare(**section), folder / "out" / "prepare" / "manifest.json")


def test_the_world_is_prepared(data):
    card = read_json(data.parent / "metrics.json")
    assert card["splits"]["sft"]["train"] == 159 and card["splits"]["sft"]["test"] == 33
    assert card["tokens"]["sft"]["max"] <= 128
    assert set(card["tasks"]) == {"world", "heldout_text"}
    assert not any("<unk>" in row["text"] for row in read_jsonl(data.parent / "data/text/train.jsonl"))


def test_the_same_section_makes_the_same_bytes(data, tmp_path):
    section = Prepare(world=World(documents=300, questions=160, test_questions=33, pairs=96),
                      tokenizer=Tokenizer(vocab_size=512), max_tokens=128)  # fmt: skip
    again = make("prepare", section, tmp_path / "again/prepare/manifest.json")
    first, second = (read_json(path)["files"] for path in (data, again))
    differing = {name for name in first if first[name] != second[name]}
    assert all(name.startswith("data/tasks/") and name.endswith(".yaml") for name in differing), "these name a path"
    other = make("prepare", section.model_copy(update={"seed": 1}), tmp_path / "other/prepare/manifest.json")
    assert read_json(other)["files"]["data/sft/train.jsonl"] != first["data/sft/train.jsonl"], "control"


def test_local_files_are_split_by_group(tmp_path, cache):
    manifest = prepare(tmp_path, text=[Source(path=text_file(tmp_path))], sft=[Source(path=chat_file(tmp_path))])
    train, test = (read_jsonl(manifest.parent / f"data/sft/{side}.jsonl") for side in ("train", "test"))
    assert train and test and not {row["group"] for row in train} & {row["group"] for row in test}
    assert read_json(manifest.parent / "metrics.json")["tasks"] == ["heldout_text", "heldout_sft"]


def test_rows_given_for_evaluation_that_were_trained_on_are_refused(tmp_path, cache):
    text, train = Source(path=text_file(tmp_path)), Source(path=chat_file(tmp_path), use="train")
    clean = Source(path=chat_file(tmp_path, "clean.jsonl", rows=5, start=1000), use="test")
    prepare(tmp_path, text=[text], sft=[train, clean])
    leaking = Source(path=chat_file(tmp_path, "leak.jsonl", rows=5, start=38), use="test")
    with pytest.raises(UserError, match=r"leak.jsonl:1.*chat.jsonl:39"):
        prepare(tmp_path, text=[text], sft=[train, leaking])
    manifest = prepare(tmp_path, text=[text], sft=[train, leaking], overlap="drop")
    listed = [(Path(row["file"]).name, row["line"]) for row in read_jsonl(manifest.parent / "data/dropped.jsonl")]
    kept = read_jsonl(manifest.parent / "data/sft/test.jsonl")
    assert listed == [("leak.jsonl", 1), ("leak.jsonl", 2)] and len(kept) == 3, "those of 38 and 39"


def test_long_rows_are_dropped_or_cut_named_and_counted(tmp_path, cache, capsys):
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": f"say {n}", "completion": "word " * (400 if n == 3 else 2)} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = [Source(path=text_file(tmp_path))]
    for policy, dropped, truncated in (("drop", 1, 0), ("cut", 0, 1)):
        manifest = prepare(tmp_path, text=text, sft=[Source(path=str(path))], max_tokens=100, long_rows=policy)
        metrics = read_json(manifest.parent / "metrics.json")
        found = metrics["tokens"]["sft"]
        assert found["truncated"] == truncated and found["max"] <= 100
        counted = [entry["dropped"] for entry in metrics["sources"] if "too long" in entry["dropped"]]
        assert counted == ([{"too long": 1}] if dropped else []), "the data card says so"
        named = "1 of 20 sft rows are longer than prepare.max_tokens (100) and dropped: " + f"{path}:4 ("
        assert (named in capsys.readouterr().err) == bool(dropped), "with file and line"
    kept = [row for side in ("train", "test") for row in read_jsonl(manifest.parent / f"data/sft/{side}.jsonl")]
    assert all(row["completion"].strip() for row in kept), "a cut row keeps reply tokens"


def test_long_prompts_and_long_answers_are_dropped_apart_and_counted(tmp_path, cache, capsys):
    path = tmp_path / "parts.jsonl"
    long = "word " * 25
    rows = [{"prompt": f"say {n}", "completion": "a word"} for n in range(20)]
    rows[3] |= {"prompt": f"say 3 {long}"}
    rows[5] |= {"completion": long}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, source = [Source(path=text_file(tmp_path))], Source(path=str(path))
    for keys, dropped in (
        ({}, {}),
        ({"max_prompt_tokens": 40}, {4: "prompt too long"}),
        ({"max_answer_tokens": 40}, {6: "answer too long"}),
        ({"max_prompt_tokens": 40, "max_answer_tokens": 40}, {4: "prompt too long", 6: "answer too long"}),
        ({"max_prompt_tokens": 40, "max_answer_tokens": 40, "long_rows": "cut"}, {}),
    ):
        manifest = prepare(tmp_path, text=text, sft=[source], max_tokens=200, **keys)
        folder, metrics, told = manifest.parent, read_json(manifest.parent / "metrics.json"), capsys.readouterr().err
        listed = read_jsonl(folder / "data/dropped.jsonl") if (folder / "data/dropped.jsonl").is_file() else []
        assert {row["line"]: row["reason"] for row in listed} == dropped
        counted = [entry["dropped"] for entry in metrics["sources"] if entry["dropped"]]
        assert counted == [{reason: 1} for reason in dropped.values()], "the data card says so"
        assert metrics["tokens"]["sft"]["truncated"] == (2 if "long_rows" in keys else 0)
        for line, reason in dropped.items():
            key = f"prepare.max_{reason.split()[0]}_tokens (40)"
            assert f"1 of 20 sft rows are longer than {key} and dropped: {path}:{line} (" in told


def written(folder, section: Prepare, processes: int) -> dict[str, bytes]:
    """The files that the stage writes with so many processes, without those that name a folder."""
    folder.mkdir()
    run(section, folder / "work", folder / "checkpoints", processes=processes)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".yaml"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_any_number_of_processes_writes_the_same_bytes(tmp_path, cache, monkeypatch, capsys):
    """Rows that are dropped, cut or warned of stand in several of the batches that processes take."""
    for module in (stored, usable):
        monkeypatch.setattr(module, "BATCH", 10)
    path = Path(chat_file(tmp_path, rows=90))
    lines = path.read_text().splitlines()
    odd = [(place, "\u200b a \x07") for place in range(5, 90, 9)]
    for place, text in (*odd, (3, "word " * 300), (44, "<|end|>"), (45, " "), (46, ""), (67, " "), (88, "long " * 90)):
        turns = [{"role": "user", "content": f"Say {place * 7919}"}, {"role": "assistant", "content": text}]
        lines[place] = json.dumps({"messages": turns})
    path.write_text("\n".join(lines) + "\n")
    section = Prepare(
        tokenizer=Tokenizer(vocab_size=300), max_tokens=100, long_rows="cut", sft=[Source(path=str(path))]
    )
    one, two = (written(tmp_path / str(count), section, count) for count in (1, 2))
    first, second = capsys.readouterr().err.split("; tasks")[:2]
    assert one == two and first == second.split("\n", 1)[1], "and says the same"
    assert one["work/data/dropped.jsonl"].count(b"\n") == 4 and {"work/data/sft/train.arrow"} <= one.keys()
    results = workers._results
    monkeypatch.setattr(workers, "_results", lambda *given: reversed(list(results(*given))))
    other = written(tmp_path / "other", section, 2)
    assert other["work/data/sft/train.arrow"] != one["work/data/sft/train.arrow"], "control: batches in another order"


def test_a_question_asked_twice_is_measured_once(tmp_path, cache):
    """In one file, and in two of them."""
    question = {"question": "What is it?", "choices": ["this", "that"], "answer": 0}
    for name in ("one", "two"):
        lines = [question, question, question | {"question": f"Which is the {name} one?"}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    choices = [Source(path=str(tmp_path / f"{name}.jsonl")) for name in ("one", "two")]
    manifest = prepare(tmp_path, text=[Source(path=text_file(tmp_path))], choices=choices)
    assert len(read_jsonl(manifest.parent / "data/tasks/choices.jsonl")) == 3
    counted = [source["dropped"] for source in read_json(manifest.parent / "metrics.json")["sources"]]
    assert counted.count({"exact duplicate": 1}) == 3
    chats = Source(path=chat_file(tmp_path))
    twice = prepare(tmp_path, text=[Source(path=text_file(tmp_path))], sft=[chats, chats])
    once = sum(read_json(twice.parent / "metrics.json")["splits"]["sft"].values())
    assert once == 40, "neither training nor evaluation sees a row twice"


def asked(folder, name: str, rows: list[dict], replies: list[str]) -> tuple[float, list[str]]:
    """(exact match of scripted replies to rows given as `answers`, the prompts), by lm-eval."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Scripted(LM):
        prompts: tuple[str, ...] = ()
        loglikelihood = loglikelihood_rolling = None

        def generate_until(self, requests):
            self.prompts = [request.args[0] for request in requests]
            return replies

    (folder / name).mkdir()
    path = folder / name / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"sft": [Source(path=chat_file(folder))], "answers": [Source(path=str(path))]}
    manifest = prepare(folder / name, **sources, tokenizer=chatml(folder))
    tasks = TaskManager(include_path=str(manifest.parent / "data/tasks"), include_defaults=False)
    assert "answers" in read_json(manifest.parent / "metrics.json")["tasks"]
    model = Scripted()
    result = lm_eval.simple_evaluate(model, tasks=["answers"], task_manager=tasks, bootstrap_iters=0)
    return result["results"]["answers"]["exact_match,answer"], list(model.prompts)


def test_questions_with_answers_become_a_task_with_replies(tmp_path, cache):
    """As GSM8K's, with a solution before the number, and with words. Wrong replies, beside right ones, do not count."""
    solved = [
        {"question": f"How much is {n} and {n}?", "answer": f"{n}+{n}=<<{n}>>\n#### {2 * n:,}"} for n in (2, 600, 9)
    ]
    replies = [" It is 4.", "600+600=1200\n#### $1,200", " That is 18 or 19"]
    rate, prompts = asked(tmp_path, "numbers", solved, replies)
    assert rate == pytest.approx(2 / 3) and prompts[0] == "Question: How much is 2 and 2?\nAnswer:"
    words = [
        {"question": f"Where is the needle {n}?", "answer": place} for n, place in enumerate(("Rome", "-1", "Oslo"))
    ]
    assert asked(tmp_path, "words", words, [" rome.\nIndeed", "1", "in Oslo"])[0] == pytest.approx(1 / 3)


def kto_rows(conversations: bool) -> list[dict]:
    """40 rows for KTO, every third unwanted; row 3 has a long completion, row 5 an empty one."""
    rows = []
    for n in range(40):
        prompt, completion = f"Name number {n} of {n * 7919}", {3: "word " * 400, 5: " "}.get(n, f"It is {n}.")
        if conversations:
            prompt, completion = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
        rows.append({"prompt": prompt, "completion": completion, "label": n % 3 > 0})
    return rows


def kto_file(folder, rows):
    path = folder / "kto.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


@pytest.mark.parametrize("conversations", [False, True])
@pytest.mark.parametrize(("long_rows", "left"), [("drop", 38), ("cut", 39)])
def test_rows_for_kto_are_checked_limited_split_and_written(tmp_path, cache, capsys, conversations, long_rows, left):
    source = kto_file(tmp_path, kto_rows(conversations))
    text = [Source(path=text_file(tmp_path))]
    manifest = prepare(tmp_path, text=text, kto=[source], max_tokens=100, long_rows=long_rows)
    train, test = (read_jsonl(manifest.parent / f"data/kto/{side}.jsonl") for side in ("train", "test"))
    assert train and test and len(train) + len(test) == left
    assert not {row["group"] for row in train} & {row["group"] for row in test}
    assert {row["label"] for row in train} == {True, False}
    assert all({"prompt", "completion", "label"} < row.keys() and "messages" not in row for row in train + test)
    metrics = read_json(manifest.parent / "metrics.json")
    assert metrics["splits"]["kto"] == {"train": len(train), "test": len(test)}
    assert metrics["tokens"]["kto"]["max"] <= 100 and metrics["tokens"]["kto"]["truncated"] == left - 38
    assert next(entry["dropped"] for entry in metrics["sources"] if entry["task"] == "kto") == {"empty_reply": 1}
    assert "nothing to contrast" not in capsys.readouterr().err, "control of the warning about one class"


def test_rows_for_kto_of_one_class_are_warned_about_over_all_sources(tmp_path, cache, capsys):
    rows = [row for row in kto_rows(False) if row["label"]]
    manifest = prepare(tmp_path, text=[Source(path=text_file(tmp_path))], kto=[kto_file(tmp_path, rows)])
    count = len(read_jsonl(manifest.parent / "data/kto/train.jsonl"))
    assert f"all {count} training rows have label true: nothing to contrast" in capsys.readouterr().err
    warnings = [entry["warnings"] for entry in read_json(manifest.parent / "metrics.json")["sources"]]
    assert {"one_label": count} in warnings


def test_a_held_out_kto_row_that_training_knows_is_dropped(tmp_path, cache):
    """Its prompt is trained on by sft; control: without that source it is kept."""
    text, rows = [Source(path=text_file(tmp_path))], kto_rows(False)
    kto = [kto_file(tmp_path, rows)]
    alone = prepare(tmp_path, text=text, kto=kto)
    held_out = read_jsonl(alone.parent / "data/kto/test.jsonl")
    known = tmp_path / "known.jsonl"
    known.write_text(json.dumps({"prompt": held_out[0]["prompt"], "completion": "Nothing."}) + "\n")
    both = prepare(tmp_path, text=text, kto=kto, sft=[Source(path=str(known), use="train")])
    assert read_jsonl(both.parent / "data/kto/test.jsonl") == held_out[1:]


def test_the_token_contract_holds_for_kto_rows(tmp_path, cache):
    """A template without an end of turn; control: the default one, in the tests above."""
    template = tmp_path / "no_end.jinja"
    template.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    source = kto_file(tmp_path, kto_rows(True))
    with pytest.raises(UserError, match=r"token contract: row kto-\d+ .*end-of-turn token"):
        prepare(tmp_path, text=[Source(path=text_file(tmp_path))], kto=[source], chat_template=str(template))


def chatml(folder):
    """A byte-level tokenizer with a token for several line breaks, as Qwen's and Llama 3's, and ChatML."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(models.BPE())
    words = Regex(r"\p{L}+|\p{N}|\s*[\r\n]+|[^\s\p{L}\p{N}]+|\s+")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), bytes_of])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["user\nassistant\n\nthe dog ran\n\nthe cat sat\n"] * 50, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = (
        "{% for m in messages %}{% if m.content == 'raise' %}{{ raise_exception('no such turn') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    fast.save_pretrained(folder / "chatml")
    return Tokenizer(path=str(folder / "chatml"))


BAD = {3: "control_text", 4: "chat_template", 7: "prefix", 9: "control_text", 12: "prefix"}  # row -> reason


def sources_with_bad_rows(folder) -> dict:
    """40 rows for each of sft, preference, kto, and long documents; of them those of BAD break the token contract."""
    turn = lambda role, content: [{"role": role, "content": content}]  # noqa: E731
    asked = {3: "what ends with <|im_end|>", 4: "raise"}
    begun = {7: "\n", 9: "the <|im_end|> ends ", 12: "\n"}
    rows: dict[str, list] = {"sft": [], "preference": [], "kto": [], "long": []}
    for n in range(40):
        prompt, reply = turn("user", asked.get(n, f"say {n * 7919}")), f"{begun.get(n, '')}the dog {n} ran."
        rows["sft"].append({"messages": prompt + turn("assistant", reply)})
        rows["preference"].append(
            {"prompt": prompt, "chosen": turn("assistant", reply), "rejected": turn("assistant", f"no {n}.")}
        )
        rows["kto"].append({"prompt": prompt, "completion": turn("assistant", reply), "label": n % 2 > 0})
        rows["long"].append({"text": f"{'<|im_start|>' if n in (3, 9) else ''} tale {n} of {n * 31}"})
    for task, lines in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {task: [Source(path=str(folder / f"{task}.jsonl"))] for task in rows}


def kept(manifest, task) -> list[dict]:
    files = [manifest.parent / f"data/{task}/{side}.jsonl" for side in ("train", "test")]
    return [row for file in files if file.exists() for row in read_jsonl(file)]


def test_rows_that_break_the_token_contract_are_dropped_counted_and_all_listed(tmp_path, cache, capsys):
    """In every kind of data; one row stops none. Control: the other rows are all there, byte for byte."""
    sources = sources_with_bad_rows(tmp_path)
    manifest = prepare(tmp_path, **sources, tokenizer=chatml(tmp_path))
    printed, metrics = capsys.readouterr().err, read_json(manifest.parent / "metrics.json")
    listed = list(read_jsonl(manifest.parent / "data/dropped.jsonl"))
    assert "data/dropped.jsonl" in read_json(manifest)["files"]
    for task, [source] in sources.items():
        bad = BAD if task != "long" else {3: "control_text", 9: "control_text"}
        found = [(row["file"], row["line"], row["reason"]) for row in listed if row["task"] == task]
        assert sorted(found) == sorted((source.path, n + 1, reason) for n, reason in bad.items())
        assert {int(row["source"].rsplit(":")[-1]) - 1 for row in kept(manifest, task)} == set(range(40)) - bad.keys()
        counted = {reason: list(bad.values()).count(reason) for reason in set(bad.values())}
        assert counted in [entry["dropped"] for entry in metrics["sources"] if entry["task"] == task]
        assert f"{len(bad)} of 40 {task} rows break the token contract" in printed
        assert f"{task}: control_text, 2 rows, first {source.path}:4: " in printed, "the first of each kind"
        assert f"{source.path}:10: token contract" not in printed
    assert all("prepare.control_text: plain" in row["message"] for row in listed if row["reason"] == "control_text")


def test_a_question_with_control_text_is_not_asked(tmp_path, cache):
    """lm-eval would read it as a control token; control: the other questions."""
    texts = ["Which animal ran?", "What does <|im_end|> end?"]
    chosen = [{"question": text, "choices": ["a dog", "a turn"], "answer": 0} for text in [*texts, "Who sat?"]]
    chosen[2]["choices"] = ["the <|im_start|>", "the cat"]
    answered = [{"question": text, "answer": "a turn of it"} for text in texts]
    for name, rows in (("choices", chosen), ("answers", answered)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {name: [Source(path=str(tmp_path / f"{name}.jsonl"))] for name in ("choices", "answers")}
    manifest = prepare(tmp_path, sft=[Source(path=chat_file(tmp_path))], **asked, tokenizer=chatml(tmp_path))
    listed = [(row["task"], row["line"], row["reason"]) for row in read_jsonl(manifest.parent / "data/dropped.jsonl")]
    assert listed == [("choices", 2, "control_text"), ("choices", 3, "control_text"), ("answers", 2, "control_text")]
    for name in asked:
        (row,) = read_jsonl(manifest.parent / f"data/tasks/{name}.jsonl")
        assert row["question"] == texts[0]


def test_control_text_is_kept_as_plain_text_where_asked(tmp_path, cache):
    """The trainers' tokens of these rows then hold the template's control tokens alone."""
    from transformers import AutoTokenizer

    from posttrain.data import preferences
    from posttrain.models import tokens

    manifest = prepare(tmp_path, **sources_with_bad_rows(tmp_path), tokenizer=chatml(tmp_path), control_text="plain")
    reasons = {row["reason"] for row in read_jsonl(manifest.parent / "data/dropped.jsonl")}
    assert reasons == {"prefix", "chat_template"}
    tokenizer = AutoTokenizer.from_pretrained(manifest.parent / "data/tokenizer")
    for row in kept(manifest, "sft"):
        assert tokens.encode(tokenizer, row)["input_ids"].count(tokenizer.eos_token_id) == 2
    ended = [row for row in kept(manifest, "sft") if "<|im_end|>" in json.dumps(row)]
    assert len(ended) == 2, "control"
    for task, answers in preferences.ANSWERS.items():
        rows = [
            row for side in ("train", "test") for row in preferences.tokenized(tokenizer, manifest, side, None, task)
        ]
        assert len(rows) == 37
        assert all(row["prompt_ids"].count(tokenizer.eos_token_id) == 1 for row in rows)
        assert all(row[f"{answer}_ids"].count(tokenizer.eos_token_id) == 1 for row in rows for answer in answers)


def test_data_of_which_every_row_breaks_the_token_contract_is_refused(tmp_path, cache):
    source = sources_with_bad_rows(tmp_path)["preference"][0]
    lines = Path(source.path).read_text().splitlines(True)
    (tmp_path / "bad.jsonl").write_text("".join(lines[n] for n in BAD))
    words = r"prepare\.preference: no training row is left.*\n.*control_text, 2 rows, first .*bad\.jsonl:1"
    with pytest.raises(UserError, match=words):
        prepare(tmp_path, preference=[Source(path=str(tmp_path / "bad.jsonl"))], tokenizer=chatml(tmp_path))


def test_contradictions_between_sources_are_warned_of(tmp_path, cache, capsys):
    """Control: the same pairs without the exchanged answers."""
    pairs = [{"prompt": f"say {n * 7919}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(40)]
    other = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs[:7]]
    for name, rows in (("one", pairs), ("other", other), ("same", pairs[:7])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other, same = (Source(path=str(tmp_path / f"{name}.jsonl"), use="train") for name in ("one", "other", "same"))
    keys = {"tokenizer": chatml(tmp_path)}
    counted = prepare(tmp_path, preference=[one, other], **keys)
    assert f"{other.path}:5: warning: contradicts {one.path}:5" in (printed := capsys.readouterr().err)
    assert "2 more rows contradict" in printed
    assert {"contradiction": 7} in [
        entry["warnings"] for entry in read_json(counted.parent / "metrics.json")["sources"]
    ]
    prepare(tmp_path, preference=[one, same], **keys)
    assert "warning: contradicts" not in capsys.readouterr().err


def test_training_rows_among_worked_examples_are_warned_of_and_a_leak_behind_them_is_refused(tmp_path, cache, capsys):
    train = Source(path=chat_file(tmp_path), use="train")
    known = "Name a colour number {} of {} things".format
    shots = "\n\n".join(f"Question: {known(n, n * 7919)}\nAnswer: It is {n}." for n in (3, 4))
    for question, refused in (
        ("How deep is the lake behind the old mill in spring", False),
        (known(7, 7 * 7919), True),
    ):
        path = tmp_path / "test.jsonl"
        path.write_text(
            json.dumps({"question": f"{shots}\n\nQuestion: {question}\nAnswer:", "answer": "It is so"}) + "\n"
        )
        keys = {"sft": [train], "answers": [Source(path=str(path))], "tokenizer": chatml(tmp_path)}
        if refused:
            with pytest.raises(UserError, match=r"test\.jsonl:1: .*chat\.jsonl:8"):
                prepare(tmp_path, **keys)
            continue
        manifest = prepare(tmp_path, **keys)
        assert f"{path}:1: few-shot overlap: among its worked examples is {train.path}:" in capsys.readouterr().err
        warnings = [entry["warnings"] for entry in read_json(manifest.parent / "metrics.json")["sources"]]
        assert {"training rows as examples": 1} in warnings and {"few_shot": 1, "too_few_rows": 1} in warnings


def test_a_missing_file_is_named(tmp_path, cache):
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        prepare(tmp_path, text=[Source(path=str(tmp_path / "gone.jsonl"))])


def test_real_files_in_every_format(tmp_path, cache, shared):
    folder = shared / "data"
    manifest = prepare(
        tmp_path,
        text=[Source(path=str(folder / "text-tinystories-1k.jsonl"))],
        sft=[
            Source(path=str(folder / "sft-open-2k.chat.jsonl")),
            Source(path=str(folder / "sft-tinystories-2k.completion.jsonl"), separator=" "),
        ],
        preference=[Source(path=str(folder / "pref-hh-helpful-2k.raw.jsonl"))],
        choices=[Source(path=str(folder / "eval-mmlu-500.jsonl"))],
        tokenizer=Tokenizer(path=str(folder / "models/stories260K")),
        max_tokens=512,
        long_rows="cut",
    )
    card = read_json(manifest.parent / "metrics.json")
    assert card["splits"]["preference"]["train"] > 1000 and "choices" in card["tasks"]
    dropped = {reason for source in card["sources"] for reason in source["dropped"]}
    assert {"repeated_role", "no_signal"} & dropped, "real defects of the set are counted"


def test_data_of_which_nothing_is_left_is_refused(tmp_path, cache):
    with pytest.raises(UserError, match=r"prepare\.sft: no training row is left \(\d+ longer than max_tokens 8\)"):
        prepare(tmp_path, text=[Source(path=text_file(tmp_path))], sft=[Source(path=chat_file(tmp_path))], max_tokens=8)


def test_a_question_of_the_benchmark_that_training_knows_is_refused(data, tmp_path):
    """Planted in a local file; control: the same world without it is the fixture `data`."""
    question = read_jsonl(data.parent / "data/sft/test.jsonl")[0]
    planted = tmp_path / "planted.jsonl"
    planted.write_text(json.dumps({"messages": question["messages"]}) + "\n")
    world = World(documents=300, questions=160, test_questions=33, pairs=96)
    with pytest.raises(UserError, match=r"world:sft-test-0.*planted\.jsonl:1"):
        prepare(tmp_path, world=world, sft=[Source(path=str(planted), use="train")], max_tokens=128)


def retold(**changes):
    def change(folder):
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | changes
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (retold(eos_token=None), "no end-of-sequence token"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model":'), "can be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "can be loaded"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "can be loaded"),
        (retold(tokenizer_class="Odd", auto_map={"AutoTokenizer": ["odd.Odd", None]}), "can be loaded"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(data, tmp_path, cache, damage, words, monkeypatch):
    """Without an end of turn `None` stood among the tokens; code that comes with one was offered to be run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to run code of the tokenizer's"))
    folder = tmp_path / "model"
    shutil.copytree(data.parent / "data/tokenizer", folder)
    damage(folder)
    sources = [Source(path=chat_file(tmp_path))]
    with pytest.raises(UserError, match=rf"prepare\.tokenizer: {folder}.*{words}"):
        prepare(tmp_path, sft=sources, tokenizer=Tokenizer(path=str(folder)))


def test_conversations_are_put_in_the_form_that_a_template_can_write(tmp_path, cache):
    """Qwen3's template has each reply's thinking in its own row; a system turn is the user's first words. Both told."""
    tokenizer_of("qwen3").save_pretrained(tmp_path / "qwen3")
    turns = [{"role": "system", "content": "Be brief."}]
    turns += [{"role": role, "content": f"{role} {n}"} for n in (1, 2) for role in ("user", "assistant")]
    with (tmp_path / "two.jsonl").open("w") as file:
        for n in range(40):  # 20 conversations of two replies, 20 of three
            last = [{"role": "user", "content": f"and {n} ?"}, {"role": "assistant", "content": f"{n * 7919}"}]
            print(json.dumps({"id": str(n), "messages": turns[: 3 + n % 2 * 2] + last}), file=file)
    keys = {"sft": [Source(path=str(tmp_path / "two.jsonl"))], "tokenizer": Tokenizer(path=str(tmp_path / "qwen3"))}
    with pytest.raises(UserError, match=r"prepare\.conversations: split"):
        prepare(tmp_path, **keys)
    manifest = prepare(tmp_path, **keys, conversations="split", system_turns="user")
    rows = [row for side in ("train", "test") for row in read_jsonl(manifest.parent / f"data/sft/{side}.jsonl")]
    assert len(rows) == 20 * 2 + 20 * 3 and len({row["id"] for row in rows}) == len(rows)
    assert all(row["messages"][0] == {"role": "user", "content": "Be brief.\n\nuser 1"} for row in rows)
    warnings = [entry["warnings"] for entry in read_json(manifest.parent / "metrics.json")["sources"]]
    assert {"system turns put into the first user turn": 40} in warnings
    assert {"rows more, one for each reply of a conversation": 60} in warnings
    documents = list(read_jsonl(next((manifest.parent / "data/tasks").glob("*heldout_sft*.jsonl"))))
    held_out = {row["group"] for row in read_jsonl(manifest.parent / "data/sft/test.jsonl")}
    assert len(documents) == len(held_out), "a conversation is one held-out document"


def test_a_tokenizer_of_sentencepiece_alone_is_refused(tmp_path, cache):
    """transformers 5.23 reads one with other tokens than sentencepiece itself; control: beside a tokenizer.json."""
    tokenizer_of("qwen2.5").save_pretrained(tmp_path / "model")
    (tmp_path / "model/tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    keys = {"sft": [Source(path=chat_file(tmp_path))], "tokenizer": Tokenizer(path=str(tmp_path / "model"))}
    prepare(tmp_path, **keys)
    (tmp_path / "model/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"prepare\.tokenizer: .*model has a tokenizer\.model and no tokenizer\.json"):
        prepare(tmp_path, **keys)


def test_a_mixture_is_read_by_its_weights(tmp_path, base, capsys):
    """From the config to the trainers, with packing too; control: without weights there is no such file."""
    few, many = chat_file(tmp_path, "few.jsonl", 10), chat_file(tmp_path, "many.jsonl", 30, start=100)
    tokenizer = Tokenizer(path=str(base.parent / "model"))
    section = {"tokenizer": tokenizer, "test_fraction": 0.0, "max_tokens": 128}
    plain = prepare(tmp_path / "plain", sft=[Source(path=few), Source(path=many)], **section)
    assert not (plain.parent / "data/sft/mixture.json").exists() and "mixture" not in read_json(
        plain.parent / "metrics.json"
    )
    weighed = [Source(path=few, weight=3.0), Source(path=many)]
    texts = [text_file(tmp_path, "a.jsonl", 40), text_file(tmp_path, "b.jsonl", 80, start=500)]
    documents = [Source(path=texts[0], weight=3.0), Source(path=texts[1])]
    documents.append(Source(path=text_file(tmp_path, start=900), use="test"))
    data = prepare(tmp_path / "weighed", sft=weighed, text=documents, weigh_by="tokens", **section)
    mixtures = read_json(data.parent / "metrics.json")["mixture"]
    first, second = mixtures["sft"]
    assert (first["source"], first["rows"], second["rows"]) == (few, 10, 30)
    of_tokens = [one["share"] * one["tokens"] / one["rows"] for one in (first, second)]
    assert of_tokens[0] == pytest.approx(3 * of_tokens[1]) and first["times"] == pytest.approx(4 * first["share"])
    for packing, what in ((False, "rows"), (True, "packed sequences")):
        section = sft(steps=2, batch_size=8, method="lora", packing=packing)
        make("sft", section, tmp_path / f"{what}/sft/manifest.json", data=data, base=base)
        assert re.search(rf"(\d+) of 16 {what} that are read are of {few}", capsys.readouterr().err)[1] == "12"
    of_tokens = [one["tokens"] * one["times"] for one in mixtures["text"]]
    assert of_tokens[0] == pytest.approx(3 * of_tokens[1])
    section = Base(scratch=scratch(context=32, steps=40))
    make("base", section, tmp_path / "weighed/out/base/manifest.json", data=data)
    assert f"240 of 320 blocks that are read are of {texts[0]}" in capsys.readouterr().err

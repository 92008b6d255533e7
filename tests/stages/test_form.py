"""The form of training, plain text or chat template: recorded in each policy, and that of the questions put to it."""

import json
from pathlib import Path

import pytest
from tiny import dpo, make, sft

from posttrain.config.sections import Base, Compare, Evaluate, Prepare, Reference, Source, Tokenizer
from posttrain.ground.files import read_json
from posttrain.models.policy import read_contract

PLAIN, CHAT = "warning: evaluate.chat_template: questions are", "through the chat template"


@pytest.fixture(scope="module")
def plain(data, base, tmp_path_factory) -> dict[str, Path]:
    """Policies trained on plain text, on a base whose tokenizer has a chat template."""
    files = tmp_path_factory.mktemp("plain")
    rows = [{"prompt": f"Story {n}.", "completion": f" The dog {n} ran to {n * 7} shops."} for n in range(60)]
    pairs = [{"prompt": f"Tale {n}.", "chosen": f" The cat {n * 3} sat.", "rejected": " No."} for n in range(40)]
    choices = [{"question": f"Where {n} ?", "choices": ["here", "there"], "answer": n % 2} for n in range(4)]
    for name, content in (("sft", rows), ("preference", pairs), ("choices", choices)):
        (files / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    keys = {name: [Source(path=str(files / f"{name}.jsonl"))] for name in ("sft", "preference", "choices")}
    section = Prepare(**keys, tokenizer=Tokenizer(path=str(base.parent / "model")), max_tokens=128)
    made = {"data": make("prepare", section, Path("results/plain/prepare/manifest.json"))}
    given = Base(path=str(base.parent / "model"))
    made["base"] = make("base", given, Path("results/plain/base/manifest.json"), data=made["data"])
    made["sft"] = make("sft", sft(method="lora", steps=2), Path("results/plain/sft/manifest.json"), **made)
    of_pairs = make("reference", Reference(), Path("results/plain/reference/manifest.json"), **made)
    section = dpo(steps=1, target_modules="all-linear")
    made["dpo"] = make("dpo", section, Path("results/plain/dpo/manifest.json"), reference=of_pairs, **made)
    return made


def evaluated(name: str, data: Path, base: Path, policy: Path, **section) -> dict:
    """The metrics of a policy's benchmarks."""
    output = Path(f"results/{name}/evaluate/{policy.parent.name}/manifest.json")
    make("evaluate", Evaluate(limit=2, **section), output, data=data, policy=policy, base=base)
    return read_json(output.parent / "metrics.json")


@pytest.mark.parametrize("policy", ["base", "sft", "dpo"])
def test_a_policy_of_plain_text_is_asked_in_plain_text(plain, policy, capfd):
    assert read_contract(plain[policy])["form"] == "plain"
    assert read_contract(plain[policy])["chat_template"], "its tokenizer has one"
    metrics = evaluated("plain", plain["data"], plain["base"], plain[policy])
    assert metrics["chat_template"] is None and "warnings" not in metrics and PLAIN not in capfd.readouterr().err


def test_another_form_that_is_asked_for_is_a_warning(plain, tuned_policy, data, base, capfd):
    """Controls: each in its own form, without a warning."""
    metrics = evaluated("templated", plain["data"], plain["base"], plain["sft"], chat_template=True)
    assert metrics["chat_template"] and CHAT in metrics["warnings"][0]
    assert f"{PLAIN} put through" in capfd.readouterr().err
    metrics = evaluated("untemplated", data, base, tuned_policy, chat_template=False)
    assert metrics["chat_template"] is None and CHAT in metrics["warnings"][0]
    assert f"{PLAIN} plain text, while" in capfd.readouterr().err
    metrics = evaluated("same", data, base, tuned_policy)
    assert metrics["chat_template"] == read_contract(tuned_policy)["chat_template"] and "warnings" not in metrics
    assert "form" not in read_contract(tuned_policy)


def test_prompts_in_another_form_are_a_warning(plain, tuned_policy, data, base, capfd):
    section = Compare(prompts=2, max_new_tokens=4, best_of=1)
    for name, prompts, expected in (("own", plain["data"], False), ("other", data, True)):
        output = Path(f"results/{name}/compare/dpo/manifest.json")
        inputs = {"base": plain["base"], "sft": plain["sft"], "policy": plain["dpo"], "data": prompts}
        make("compare", section, output, **inputs)
        warned = read_json(output.parent / "metrics.json").get("warnings", [])
        assert warned == (["2 of 2 prompts are not plain text, as its training rows are"] if expected else [])
        assert ("warning: dpo: 2 of 2 prompts" in capfd.readouterr().err) == expected

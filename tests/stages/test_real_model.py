"""A real pretrained model and real data through the spine: stories260K (Llama architecture, RoPE) on TinyStories."""

from pathlib import Path

import pytest
from conftest import make, sft

from posttrain.config import Base, Evaluate, Prepare, Source, Tokenizer
from posttrain.export import export
from posttrain.files import read_json
from posttrain.policy import load_contract

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stories(shared, home) -> dict[str, Path]:
    """prepare and base of the real model."""
    model = str(shared / "data/models/stories260K")
    source = Source(path=str(shared / "data/sft-tinystories-2k.completion.jsonl"), separator=" ")
    section = Prepare(sft=[source], tokenizer=Tokenizer(path=model), max_tokens=512, long_rows="cut")
    data = make("prepare", section, Path("results/stories/prepare/manifest.json"))
    base = make("base", Base(path=model), Path("results/stories/base/manifest.json"), data=data)
    return {"data": data, "base": base}


def test_its_bytes_are_taken_as_they_are(stories, shared):
    assert read_json(stories["base"])["files"]["model/model.safetensors"]["sha256"].startswith("407a7c581bdd6697")
    assert load_contract(stories["base"])["chat_template"] is None


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_it_is_fine_tuned_and_evaluated(stories, method):
    """Held-out loss falls, and lm-eval sees the policy that was trained; control: the base's own likelihood."""
    section = sft(method=method, steps=30, batch_size=8, learning_rate=2e-3, max_length=512, log_steps=10)
    policy = make("sft", section, Path(f"results/stories-{method}/sft/manifest.json"), **stories)
    summary = read_json(policy.parent / "metrics.json")["summary"]
    assert summary["eval_loss"] < summary["eval_loss_before"] - 0.01
    measured = {}
    for name, manifest in (("base", stories["base"]), ("sft", policy)):
        output = Path(f"results/stories-{method}/evaluate/{name}/manifest.json")
        make("evaluate", Evaluate(limit=40), output, policy=manifest, **stories)
        rows = read_json(output.parent / "metrics.json")["rows"]
        measured[name] = next(row["value"] for row in rows if row["metric"] == "bits_per_byte")
    assert measured["sft"] < measured["base"] < 2
    export(policy, Path(f"exported-{method}"))


def test_the_base_writes_stories(stories):
    """Greedy continuation is English, as its author's tests have it: the conversion and the tokenizer are right."""
    from posttrain.policy import load

    model, tokenizer = load(stories["base"])
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily")

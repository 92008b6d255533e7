"""A real pretrained model and real data through the spine: stories260K (Llama architecture, RoPE) on TinyStories."""

from pathlib import Path

import pytest
from tiny import make, sft

from posttrain.config.sections import Base, Evaluate, Prepare, Source, Tokenizer
from posttrain.ground.files import read_json
from posttrain.models.policy import read_contract
from posttrain.tools.export import export

pytestmark = pytest.mark.slow


def first(rows: int, file: Path, folder: Path) -> str:
    """A file of a real file's first rows."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
    (folder / file.name).write_text("".join(lines), encoding="utf-8")
    return str(folder / file.name)


@pytest.fixture(scope="module")
def stories(shared, home, tmp_path_factory) -> dict[str, Path]:
    """prepare and base of the real model."""
    model = str(shared / "data/models/stories260K")
    rows = first(800, shared / "data/sft-tinystories-2k.completion.jsonl", tmp_path_factory.mktemp("stories"))
    source = Source(path=rows, separator=" ")
    section = Prepare(sft=[source], tokenizer=Tokenizer(path=model), max_tokens=256, long_rows="cut")
    data = make("prepare", section, Path("results/stories/prepare/manifest.json"))
    base = make("base", Base(path=model), Path("results/stories/base/manifest.json"), data=data)
    return {"data": data, "base": base}


def bits(policy: Path, stories: dict[str, Path]) -> float:
    """Bits per byte that lm-eval finds."""
    made = make("evaluate", Evaluate(limit=40), policy.parent / "evaluated/manifest.json", policy=policy, **stories)
    rows = read_json(made.parent / "metrics.json")["rows"]
    return next(row["value"] for row in rows if row["metric"] == "bits_per_byte")


@pytest.fixture(scope="module")
def base_bits(stories) -> float:
    """Those of the base."""
    return bits(stories["base"], stories)


def test_its_bytes_are_taken_as_they_are(stories, shared):
    assert read_json(stories["base"])["files"]["model/model.safetensors"]["sha256"].startswith("407a7c581bdd6697")
    assert read_contract(stories["base"])["chat_template"] is None


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_it_is_fine_tuned_and_evaluated(stories, base_bits, method):
    """Held-out loss falls, and lm-eval sees the policy that was trained; control: the base's own likelihood."""
    section = sft(method=method, steps=40, batch_size=8, learning_rate=2e-3, max_length=256, log_steps=10)
    policy = make("sft", section, Path(f"results/stories-{method}/sft/manifest.json"), **stories)
    summary = read_json(policy.parent / "metrics.json")["summary"]
    assert summary["eval_loss"] < summary["eval_loss_before"] - 0.01
    assert bits(policy, stories) < base_bits < 2
    export(policy, Path(f"exported-{method}"))


def test_the_base_writes_stories(stories):
    """Greedy continuation is English, as its author's tests have it: the conversion and the tokenizer are right."""
    from posttrain.models.policy import load_policy

    model, tokenizer = load_policy(stories["base"])
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily")


@pytest.mark.parametrize("file", ["pref-hh-helpful-2k.raw.jsonl", "pref-tinystories-2k.jsonl"])
def test_it_is_aligned_with_real_preferences(shared, home, file, tmp_path):
    """Human preferences as transcripts, and preferences of plain text: reward model, PPO, DPO and comparison."""
    from tiny import dpo, ppo, reward

    from posttrain.config.sections import Compare, Reference

    name, model = file.split("-")[1], str(shared / "data/models/stories260K")
    # Both are conversations, or both plain text, so that policy and pairs speak one format.
    told = {"hh": "sft-multiturn-500.chat.jsonl", "tinystories": "sft-tinystories-2k.completion.jsonl"}[name]
    section = Prepare(
        preference=[Source(path=first(300, shared / "data" / file, tmp_path))],
        sft=[Source(path=first(300, shared / "data" / told, tmp_path))],
        tokenizer=Tokenizer(path=model), max_tokens=384,
    )  # fmt: skip
    data = make("prepare", section, Path(f"results/{name}/prepare/manifest.json"))
    base = make("base", Base(path=model), Path(f"results/{name}/base/manifest.json"), data=data)
    short = {"steps": 2, "batch_size": 4, "max_length": 512}
    policy = make("sft", sft(**short), Path(f"results/{name}/sft/manifest.json"), data=data, base=base)
    inputs = {"data": data, "base": base, "sft": policy}
    judge = make("reward", reward(**short), Path(f"results/{name}/reward/manifest.json"), **inputs)
    known = make("reference", Reference(batch_size=8), Path(f"results/{name}/reference/manifest.json"), **inputs)
    direct = make("dpo", dpo(**short), Path(f"results/{name}/dpo/manifest.json"), **inputs, reference=known)
    near = make("ppo", ppo(steps=2), Path(f"results/{name}/ppo/manifest.json"), **inputs, reward=judge)
    assert read_json(direct.parent / "metrics.json")["summary"]["loss before"] == pytest.approx(0.693147, abs=1e-5)
    assert read_json(near.parent / "metrics.json")["history"][0]["kl"] == 0
    beside = None
    for stage, manifest in (("sft", policy), ("dpo", direct), ("ppo", near)):
        output = Path(f"results/{name}/compare/{stage}/manifest.json")
        section = Compare(prompts=6, max_new_tokens=12, best_of=2)
        more = {"beside": beside} if beside else {}
        made = make("compare", section, output, policy=manifest, reward=judge, **inputs, **more)
        beside = beside or made
        rows = {row["metric"]: row for row in read_json(output.parent / "metrics.json")["rows"]}
        assert "gold_reward" not in rows and "reward" in rows, "no world, no gold"
        assert stage == "sft" or rows["win_rate"]["n"] >= 2


def test_its_context_is_made_four_times_as_long(shared, home):
    """stories260K was trained on 512 tokens: at 2,048 it fails beyond them, and no longer after interpolation."""
    from posttrain.config.sections import Lengths, Longctx

    model = str(shared / "data/models/stories260K")
    texts = [Source(path=str(shared / "data/text-tinystories-1k.jsonl"))]
    section = Prepare(long=texts, tokenizer=Tokenizer(path=model), max_tokens=512, test_fraction=0.06)
    data = make("prepare", section, Path("results/stories-long/prepare/manifest.json"))
    base = make("base", Base(path=model), Path("results/stories-long/base/manifest.json"), data=data)
    section = Longctx(
        packing=True, steps=24, batch_size=2, learning_rate=4e-3, warmup_steps=3, seed=0,
    )  # fmt: skip
    longer = make("longctx", section, Path("results/stories-long/longctx/manifest.json"),
                  data=data, base=base, policy=base)  # fmt: skip
    contract = read_contract(longer)["positions"]
    assert (contract["original_context"], contract["context"], contract["factor"]) == (512, 2048, 4.0)
    judge, by_position = Lengths(tokens=[512, 2048], packing=True, documents=4, buckets=4, batch_size=4), {}
    for name, manifest in (("base", base), ("longctx", longer)):
        output = Path(f"results/stories-long/lengths/{name}/manifest.json")
        made = make("lengths", judge, output, data=data, policy=manifest)
        by_position[name] = [part["loss"] for part in read_json(made.parent / "metrics.json")["positions"]]
    assert by_position["base"][3] > by_position["base"][0] + 1, "control: un-scaled it collapses"
    assert by_position["longctx"][3] < by_position["base"][3] - 0.4
    lost = [by_position[name][3] - by_position[name][0] for name in ("base", "longctx")]
    assert lost[1] < 0.4 * lost[0], "after a moment's tuning little is left of the collapse"


def test_pass_words_fit_into_the_context_of_a_given_model(shared, home):
    """A question of N tokens has at most N by the model's own tokenizer, of several tokens a word, with its answer."""
    import json

    from transformers import AutoTokenizer

    from posttrain.config.sections import Long, World

    model = str(shared / "data/models/stories260K")
    long = Long(context=128, factor=2, documents=16, questions=10)
    world = World(documents=64, questions=20, test_questions=7, pairs=16, long=long)
    section = Prepare(world=world, tokenizer=Tokenizer(path=model), max_tokens=256)
    data = make("prepare", section, Path("results/stories-world/prepare/manifest.json"))
    tokenizer, folder = AutoTokenizer.from_pretrained(model), data.parent / "data/tasks"
    files = [*folder.glob("passkey_*_depth_*.jsonl"), *folder.glob("recall_*.jsonl")]
    assert len(files) == 12
    for file in files:
        length = int(file.stem.split("_")[1])
        longest = json.loads(file.with_suffix(".yaml").read_text())["generation_kwargs"]["max_gen_toks"]
        for question in map(json.loads, file.read_text().splitlines()):
            answer = len(tokenizer(f" {question['answer']}.", add_special_tokens=False).input_ids)
            tokens = len(tokenizer(question["prompt"]).input_ids)
            assert answer <= longest and 0.6 * length < tokens <= length - answer, (file.name, tokens, answer)
    base = make("base", Base(path=model), Path("results/stories-world/base/manifest.json"), data=data)
    section = Evaluate(limit=2, tasks=[{"task": "passkey_128"}, {"task": "recall_256"}])
    make("evaluate", section, Path("results/stories-world/evaluate/base/manifest.json"), data=data, policy=base)

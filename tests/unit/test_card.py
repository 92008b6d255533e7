"""Model cards: what is known of a policy, what is called unknown, and that no text in it can be markup."""

from pathlib import Path

import pytest
import yaml

from posttrain.ground.files import sha256, write_json
from posttrain.reporting import card

EVIL = "a`|b</table><script>alert(1)</script>\n---\nlicense: mit\n\u202e"
HUB = {"hub": {"id": "org/model", "revision": "a" * 40}}
CONTRACT = {"method": "weights", "positions": {"context": 128}}


def artifact(name: str, section: dict, metrics: dict, model: dict | None = None, **inputs: Path) -> Path:
    """An artifact as `jobs.artifact` leaves it; returns its manifest."""
    home = Path(name)
    home.mkdir(parents=True)
    write_json(home / "config.yaml", section)
    write_json(home / "metrics.json", metrics)
    if model:
        (home / "model").mkdir()
        write_json(home / "model/policy.json", model)
        card.write_published(home / "model", home.name, section, inputs, metrics)
    read = {role: {str(file): sha256(file)} for role, file in inputs.items()}
    write_json(home / "provenance.json", {"stage": home.name, "inputs": read})
    write_json(home / "manifest.json", {"files": {"name": name}})
    return home / "manifest.json"


def metadata(folder: Path) -> dict:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def text_of(manifest: Path) -> str:
    return (manifest.parent / "model/README.md").read_text()


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    sources = [{"name": "/home/me/secret/rows.jsonl", "task": "sft", "kept": 900}]
    section = {"sft": [{"path": "/home/me/secret/rows.jsonl"}], "preference": [{"dataset": "org/pairs"}]}
    return artifact("results/a/prepare", section, {"sources": sources})


@pytest.fixture
def base(data) -> Path:
    return artifact("results/a/base", {"scratch": {"steps": 9}}, {"summary": {"perplexity": 2.5}}, CONTRACT, data=data)


@pytest.fixture
def tuned(data, base) -> Path:
    section = {"method": "qlora", "learning_rate": 0.008}
    metrics = {"summary": {"eval_loss": 0.25}}
    return artifact("results/a/sft", section, metrics, {"method": "qlora"}, data=data, base=base)


def test_a_card_says_what_is_known_and_what_is_not(data, base, tuned):
    text = text_of(tuned)
    assert metadata(tuned.parent / "model") == {
        "license": "unknown", "library_name": "peft", "pipeline_tag": "text-generation", "datasets": ["org/pairs"],
        "tags": ["posttrain", "sft", "trained-from-scratch"],
    }  # fmt: skip
    for line in ("| `method` | `qlora; an adapter: load it with PEFT on its base` |", "| `licence` | `unknown` |",
                 "| `base model` | `trained from scratch` |", "| `rows.jsonl` | `sft` | `900` |",
                 f"| `data, sha256 of its manifest` | `{sha256(data)}` |", '"learning_rate": 0.008',
                 "| `eval_loss` | `0.250` |", "Unknown: this card was written without them."):  # fmt: skip
        assert line in text, line
    assert "secret" not in text and str(Path.cwd()) not in text
    assert "library_name: transformers" in text_of(base) and "| `perplexity` | `2.500` |" in text_of(base)


def test_equal_settings_and_inputs_give_equal_bytes(data, base, tuned):
    section, inputs = {"method": "qlora", "learning_rate": 0.008}, {"data": data, "base": base}
    again = artifact("results/b/sft", section, {"summary": {"eval_loss": 0.25}}, {"method": "qlora"}, **inputs)
    assert text_of(again) == text_of(tuned)
    other = artifact("results/c/sft", section | {"seed": 1}, {}, {"method": "qlora"}, **inputs)
    assert text_of(other) != text_of(tuned), "control"


def test_settings_that_do_not_change_what_is_learned_change_no_card(data, base):
    sections = [{"seed": 0, "checkpoint_minutes": minutes, "micro_batch_size": minutes} for minutes in (1, 5)]
    cards = [
        text_of(artifact(f"results/{n}/sft", section, {}, CONTRACT, data=data, base=base))
        for n, section in enumerate([*sections, {"seed": 1}])
    ]
    assert cards[0] == cards[1] != cards[2], "control: another seed"


def test_a_base_from_the_hub_and_its_licence_are_named_by_all_that_descends_from_it(data, monkeypatch, tmp_path):
    (tmp_path / "fetched").mkdir()
    monkeypatch.setattr("posttrain.data.hub.fetched_repo", lambda *_: tmp_path / "fetched")
    without = artifact("results/x/base", HUB, {}, CONTRACT, data=data)
    assert metadata(without.parent / "model")["license"] == "unknown", "control: a model without a card"
    (tmp_path / "fetched/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    hub = artifact("results/y/base", HUB, {}, CONTRACT, data=data)
    sft = artifact("results/y/sft", {}, {}, CONTRACT, data=data, base=hub)
    dpo = artifact("results/y/dpo", {}, {}, {"method": "qlora"}, data=data, base=sft)
    for manifest in (hub, sft, dpo):
        assert metadata(manifest.parent / "model")["base_model"] == "org/model"
        assert metadata(manifest.parent / "model")["license"] == "apache-2.0"
    assert f"| `revision of the base` | `{'a' * 40}` |" in text_of(hub)


def test_no_text_in_a_card_is_markup(data):
    sources = {"sources": [{"name": EVIL, "task": "sft", "kept": 1}]}
    hostile = artifact("results/e/prepare", {"sft": [{"dataset": EVIL}]}, sources)
    manifest = artifact("results/e/sft", {"target_modules": [f"```\n{EVIL}"]}, {"summary": {EVIL: EVIL}},
                        {"method": "lora"}, data=hostile)  # fmt: skip
    known = metadata(manifest.parent / "model")
    assert known["license"] == "unknown" and len(known["datasets"]) == 1
    body = text_of(manifest).split("---\n", 2)[2]
    assert "\u202e" not in body and not [line for line in body.splitlines() if line.startswith(("<", "```\n"))]
    outside = body.replace(body.split("```json\n")[1].split("\n```\n")[0], "")
    code = "".join(outside.split("`")[::2])
    assert "script" in outside and "script" not in code, "it stands in code alone"


def test_what_holds_no_language_model_gets_no_card(data):
    assert not list(data.parent.rglob("README.md"))


def test_an_exported_policy_has_its_own_benchmarks_alone(data, base, tuned, tmp_path):
    rows = [{"task": "world", "metric": "exact_match", "value": 0.963, "stderr": 0.009, "n": 431}]
    artifact("results/a/evaluate/sft", {}, {"rows": rows}, policy=tuned)
    (tmp_path / "out").mkdir()
    card.write_exported(tuned, tmp_path / "out")
    text, known = (tmp_path / "out/README.md").read_text(), metadata(tmp_path / "out")
    assert "| `world` | `exact_match` | `0.963` | `0.009` | `431` |" in text
    assert "`qlora, merged; a whole model`" in text
    assert known["library_name"] == "transformers" and "trained-from-scratch" in known["tags"]
    (result,) = known["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "exact_match", "value": 0.963}] and result["dataset"]["name"] == "world"
    tuned.write_text(tuned.read_text() + "\n")
    card.write_exported(tuned, tmp_path / "out")
    assert "Unknown: this card was written without them." in (tmp_path / "out/README.md").read_text()

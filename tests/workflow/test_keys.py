"""Every key of the schema, one at a time: what Snakemake reruns, and that `posttrain why` says the same."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from fabricated import RERUN, fabricate, put, rerun

from posttrain.config.sections import section_class
from posttrain.config.stages import Experiment
from posttrain.dag import campaign
from posttrain.data.shape import KEYS
from posttrain.ground.errors import UserError
from posttrain.tools import why

HERE = Path(__file__).parent
WRITTEN = yaml.safe_load((HERE / "whole/experiments/whole.yaml").read_text())


def keys(model=Experiment, prefix=""):
    """Every dotted key of the schema with its field; those of a list's sections as `key[].inner`."""
    for key, field in model.model_fields.items():
        inner = section_class(field.annotation)
        if key not in ("extends", "grid"):  # what is inherited counts as if it stood here; cells are other experiments
            yield f"{prefix}{key}", field
        if inner:
            yield from keys(inner, f"{prefix}{key}{'[]' if 'list' in str(field.annotation) else ''}.")


COMMIT, LATER = "86f7e437faa5a7fce15d1ddcb9eaeaea377667b8", "e9d71f5ee7c92d6dc9e92ffdad17b8bd49418f98"
HUB = {"id": "some/model", "revision": COMMIT}
SOURCES = ("text", "long", "sft", "preference", "kto", "choices", "answers")
CONVERSATIONS = ("sft", "preference", "kto")
FORMAT = {
    "text": "text",
    "long": "text",
    "sft": "messages",
    "preference": "preference",
    "kto": "kto",
    "choices": "refused",
    "answers": "refused",
}
ADAPTER, MODULES = {"sft.method": "lora"}, ["q_proj", "v_proj"]
SOURCE = {"prepare.sft": [{"path": "a.jsonl"}]}
NO_LONGCTX = {"longctx": None}
OTHER_TEXT = {"prepare.world.long": None, "prepare.long": [{"path": "a.jsonl"}]}
GIVEN = {"base.scratch": None, "base.path": "model", "prepare.tokenizer": None}
CLAIM = {
    "sentence": "It is so.",
    "paper": "a paper",
    "measured": {"of": "sft", "value": "summary.loss"},
    "expected": {"at_most": 1.0, "date": "2026-11-30"},
    "tolerance": {"basis": "algebra"},
    "control": {"of": "base"},
}
PAPER = {"title": "A Paper", "id": "arXiv 1", "variant": "paper", "deviations": {}}
OTHER_PAPER = {
    "title": "Another",
    "id": "arXiv 2",
    "table": "2",
    "variant": "authors-later",
    "deviations": {"seed": "ours"},
    "rows": {"sft": 9},
}
JUDGE = {"url": "http://localhost:8000/v1", "model": "a"}
OTHER_JUDGE = {
    "url": "http://localhost:8001/v1", "model": "b", "against": "given", "prompt": "{prompt} {first} {second}",
    "key_variable": "JUDGE_API_KEY", "temperature": 0.5, "max_tokens": 99, "timeout": 9.0, "attempts": 2, "pause": 1.0,
}  # fmt: skip
# Keys that cannot simply get the next value: what must be set beforehand, and the other value.
REWARD = ("kind", "weight", "answer", "pattern", "tags", "words")
SPECIAL = {
    "claims": ({}, {"it": CLAIM}),
    "paper": ({}, PAPER),
    **{f"paper.{key}": ({"paper": PAPER}, value) for key, value in OTHER_PAPER.items()},
    "prepare": ({}, {"world": {"documents": 500, "long": {"context": 64}}}),
    "base": ({}, {"scratch": {"context": 64, "layers": 3}}),
    "prepare.world": ({"prepare.sft": [{"path": "a.jsonl"}]}, {"documents": 500, "long": {"context": 64}}),
    "prepare.world.long": ({}, {"context": 64, "documents": 500}),
    "prepare.world.long.context": (NO_LONGCTX, 32),
    "prepare.world.long.factor": (NO_LONGCTX, 8),
    "prepare.tokenizer": ({}, {"vocab_size": 600}),
    "prepare.tokenizer.vocab_size": ({}, 600),
    "prepare.tokenizer.path": ({"prepare.tokenizer": {"path": "model"}}, "model-b"),
    "prepare.tokenizer.hub": ({"prepare.tokenizer": {"hub": HUB}}, HUB | {"id": "other/model"}),
    "prepare.tokenizer.hub.id": ({"prepare.tokenizer": {"hub": HUB}}, "other/model"),
    "prepare.tokenizer.hub.revision": ({"prepare.tokenizer": {"hub": HUB}}, LATER),
    "prepare.tokenizer.hub.allow_floating": ({"prepare.tokenizer": {"hub": HUB}}, True),
    "prepare.chat_template": ({}, "a.jinja"),
    "prepare.end_of_turn": ({"prepare.tokenizer": {"path": "model"}}, "<end>"),
    "prepare.date": ({}, "2025-01-03"),
    "prepare.system_turns": ({}, "user"),
    "prepare.control_text": ({}, "plain"),
    "prepare.conversations": ({}, "split"),
    "prepare.max_tokens": ({}, 60),
    "prepare.max_prompt_tokens": ({}, 40),
    "prepare.max_answer_tokens": ({}, 20),
    "prepare.group_key": (SOURCE, "kind"),
    "prepare.overlap": ({"prepare.sft": [{"path": "a.jsonl", "use": "test"}]}, "drop"),
    "prepare.test_fraction": (SOURCE, 0.2),
    "prepare.allow_empty_user": (SOURCE, True),
    "prepare.max_line_mb": (SOURCE, 8.0),
    "base.path": (GIVEN, "model-b"),
    "base.hub": ({**GIVEN, "base.path": None, "base.hub": HUB}, HUB | {"id": "other/model"}),
    "base.hub.id": ({**GIVEN, "base.path": None, "base.hub": HUB}, "other/model"),
    "base.hub.revision": ({**GIVEN, "base.path": None, "base.hub": HUB}, LATER),
    "base.hub.allow_floating": ({**GIVEN, "base.path": None, "base.hub": HUB}, True),
    "base.dtype": ({}, "bfloat16"),
    "base.scratch": ({}, {"context": 64, "layers": 3}),
    "base.scratch.context": (NO_LONGCTX, 80),
    "base.scratch.positions": (NO_LONGCTX, "alibi"),
    "base.scratch.heads": ({}, 2),
    "sft": ({}, {"method": "lora"}),
    "sft.virtual_tokens": (
        {"sft.method": "prefix", "longctx.policy": "base", **dict.fromkeys(("reward", "ppo", "grpo", "dpo", "kto"))},
        8,
    ),
    "sft.prefix_projection": (
        {"sft.method": "prefix", "longctx.policy": "base", **dict.fromkeys(("reward", "ppo", "grpo", "dpo", "kto"))},
        32,
    ),
    "sft.prompt_text": (
        {"sft.method": "prompt", "longctx.policy": "base", **dict.fromkeys(("reward", "ppo", "grpo", "dpo", "kto"))},
        "Answer in few words.",
    ),
    "sft.group_by_length": ({}, True),
    "sft.dora": ({"sft.method": "lora"}, True),
    "sft.rank_stabilized": ({"sft.method": "lora"}, True),
    "sft.layers": ({"sft.method": "lora"}, [0]),
    "sft.fused_parts": ({"base.scratch.positions": "alibi", **NO_LONGCTX}, ["query", "value"]),
    "sft.compute": ({}, "bfloat16"),
    "sft.max_length": ({}, 80),
    "reward.max_length": ({}, 80),
    "dpo.max_length": ({}, 80),
    "kto.max_length": ({}, 80),
    "sft.method": ({}, "lora"),
    **{f"{stage}.method": ({"sft.method": "full", "kto": None}, "full") for stage in ("reward", "ppo", "grpo", "dpo")},
    "kto.method": ({"sft.method": "full", "dpo": None}, "full"),
    **{f"{stage}.method": ({}, "full") for stage in ("reference", "compare")},
    "ppo.value_from": ({"ppo.target_modules": None}, "reward"),
    "reward": ({}, {"steps": 10}),
    "reward.normalize": ({}, "demonstrations"),
    "ppo": ({}, {"steps": 10}),
    "ppo.reward_function": ({"ppo.reward_function": "reward.py:short"}, "reward.py:long"),
    "ppo.gold_function": ({}, "reward.py:long"),
    "grpo": ({}, {"steps": 10}),
    "grpo.reward_function": ({"grpo.reward_function": "reward.py:short", "ppo": None}, "reward.py:long"),
    "grpo.gold_function": ({}, "reward.py:long"),
    "grpo.reward_code": ({}, "refused"),
    "grpo.gold_code": ({}, "refused"),
    "grpo.rails": ({}, {"max_kl": 40.0}),
    "grpo.group": ({}, 4),
    "grpo.batch_size": ({}, 128),
    "grpo.rewards": ({}, [{"kind": "exact"}]),
    "grpo.rewards[].kind": ({"grpo.rewards": [{"kind": "exact"}]}, "model"),
    "grpo.rewards[].weight": ({"grpo.rewards": [{"kind": "exact"}]}, 0.5),
    "grpo.rewards[].answer": ({"grpo.rewards": [{"kind": "exact"}]}, "text"),
    "grpo.reward_seconds": ({"grpo.reward_function": "reward.py:short", "ppo": None}, 5.0),
    "compare.checks": ({}, [{"kind": "exact"}]),
    **{f"compare.checks[].{key}": ({"compare.checks": [{"kind": "exact"}]}, "refused") for key in REWARD},
    "grpo.labels": ({}, "shuffled"),
    "grpo.rewards[].pattern": ({"grpo.rewards": [{"kind": "pattern", "pattern": "a"}]}, "b"),
    "grpo.rewards[].tags": ({"grpo.rewards": [{"kind": "tags", "tags": ["a"]}]}, ["b"]),
    "grpo.rewards[].words": ({"grpo.rewards": [{"kind": "length", "words": 4}]}, 5),
    "ppo.kl_target": ({}, 3.0),
    "ppo.kl_horizon": ({"ppo.kl_target": 3.0}, 500),
    "ppo.rails": ({}, {"max_kl": 40.0}),
    "reference": ({}, {"batch_size": 32}),
    "dpo": ({}, {"beta": 0.3}),
    "kto": ({}, {"rows": "preference", "beta": 0.3}),
    "kto.rows": ({"prepare.kto": [{"path": "a.jsonl"}]}, "kto"),
    "dpo.loss": ({}, ["hinge"]),
    "dpo.loss_weights": ({"dpo.loss": ["sigmoid", "hinge"]}, [1.0, 0.5]),
    "dpo.label_smoothing": ({"dpo.loss": ["robust"]}, 0.2),
    "longctx": ({}, {"steps": 10}),
    "longctx.micro_batch_size": ({}, 4),
    "longctx.optimizer": ({}, "muon"),
    "longctx.factor": (OTHER_TEXT, 2.0),
    "longctx.policy": ({}, "sft"),
    "lengths": ({}, {"tokens": [64]}),
    "lengths.stride_tokens": ({}, 8),
    "lengths.passkey": ({}, {"questions": 5}),
    "lengths.passkey.questions": ({"lengths.passkey": {}}, 5),
    "lengths.passkey.depths": ({"lengths.passkey": {}}, 3),
    "lengths.tokens": ({}, [64, 128]),
    "algebra": ({}, {"seed": 1}),
    "compare": ({}, {"prompts": 100}),
    "evaluate": ({}, {"limit": 5}),
    **{f"{judge}.quantize": ({}, True) for judge in ("evaluate", "compare", "lengths")},
    **{f"{judge}.merge": ({}, False) for judge in ("evaluate", "lengths")},
    "evaluate.batch_size": ({}, 8),
    "evaluate.chat_template": ({}, False),
    "evaluate.tasks": ({}, [{"task": "world"}]),
    "evaluate.tasks[].task": ({"evaluate.tasks": [{"task": "world"}]}, "passkey_64"),
    "evaluate.tasks[].revision": ({"evaluate.tasks": [{"task": "sciq", "revision": COMMIT}]}, LATER),
    "evaluate.tasks[].allow_floating": ({"evaluate.tasks": [{"task": "sciq", "revision": COMMIT}]}, True),
    "evaluate.task_files": ({"evaluate.tasks": [{"task": "own"}], "evaluate.task_files": ["own.yaml"]}, ["other.yaml"]),
    "evaluate.task_functions": (
        {
            "evaluate.tasks": [{"task": "own"}],
            "evaluate.task_files": ["called.yaml"],
            "evaluate.task_functions": ["reward.py:short", "reward.py:long"],
        },
        ["reward.py:long", "reward.py:short"],
    ),
    "evaluate.tasks[].generation": ({"evaluate.tasks": [{"task": "world"}]}, {"num_beams": 4}),
    **{
        f"evaluate.tasks[].generation.{key}": ({"evaluate.tasks": [{"task": "world", "generation": before}]}, value)
        for key, before, value in (
            ("num_beams", {"num_beams": 4}, 5),
            ("length_penalty", {"num_beams": 4}, 0.9),
            ("no_repeat_ngram_size", {"num_beams": 4}, 4),
            ("max_gen_toks", {"num_beams": 4}, 9),
            ("do_sample", {"num_beams": 4}, False),
        )
    },
    **{
        f"evaluate.tasks[].generation.{key}": (
            {"evaluate.tasks": [{"task": "world", "generation": {"do_sample": True}}], "evaluate.batch_size": 8},
            0.9,
        )
        for key in ("temperature", "top_p")
    },
    "evaluate.tasks[].metrics": (
        {"prepare.answers": [{"path": "a.jsonl"}], "evaluate.tasks": [{"task": "answers", "metrics": ["bleu"]}]},
        ["rouge_l"],
    ),
    "evaluate.tasks[].shots": ({"evaluate.tasks": [{"task": "world"}]}, 2),
    "compare.gold_function": ({"compare.gold_function": "reward.py:short"}, "reward.py:long"),
    "compare.judge": ({}, JUDGE),
    **{f"compare.judge.{key}": ({"compare.judge": JUDGE}, value) for key, value in OTHER_JUDGE.items()},
    "compare.reward_function": ({}, "refused"),
    "compare.reward_code": ({}, "refused"),
    "ppo.reward_code": ({}, "refused"),
    "ppo.gold_code": ({}, "refused"),
    "compare.gold_code": ({}, "refused"),
}
for source in SOURCES:
    rows = {"dataset": "some/rows", "revision": COMMIT}
    held = [] if source in ("text", "long") else [{"path": "a.jsonl"}]
    fields = {"path": ({"path": "a.jsonl"}, "b.jsonl"), "dataset": (rows, "other/rows"), "revision": (rows, LATER)}
    fields |= {"allow_floating": (rows, True), "subset": (rows, "part"), "rows": (rows, "test")}
    fields |= {"format": ({"path": "a.jsonl"}, FORMAT[source]), "separator": ({"path": "a.jsonl"}, " ")}
    key = next(iter(sorted(KEYS[source])))
    fields |= {"use": ({"path": "a.jsonl"}, "train"), "files": (rows, ["part-*.jsonl"])}
    fields |= {"columns": ({"path": "a.jsonl"}, {key: "column"}), "template": ({"path": "a.jsonl"}, {key: "{column}"})}
    fields |= {"max_rows": ({"path": "a.jsonl"}, 3), "sample": ({"path": "a.jsonl", "max_rows": 3}, "random")}
    fields |= {"system": ({"path": "a.jsonl"}, "be brief"), "threshold": ({"path": "a.jsonl"}, 2.0)}
    SPECIAL[f"prepare.{source}"] = ({f"prepare.{source}": [{"path": "a.jsonl"}]}, [{"path": "b.jsonl"}])
    for key, (before, value) in fields.items():
        SPECIAL[f"prepare.{source}[].{key}"] = ({f"prepare.{source}": [before]}, value)
    SPECIAL[f"prepare.{source}[].weight"] = ({f"prepare.{source}": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}, 2.0)
for key, value in {"licence": "MIT", "origin": "a page", "languages": ["en"]}.items():
    SPECIAL[f"prepare.sft[].{key}"] = ({"prepare.sft": [{"path": "a.jsonl"}]}, value)
SPECIAL["prepare.weigh_by"] = ({"prepare.sft": [{"path": "a.jsonl", "weight": 2.0}, {"path": "b.jsonl"}]}, "tokens")
# Keys whose value reaches further than their own section; declared where the key stands, as `also`.
FURTHER = {
    "base.scratch.context": RERUN["prepare"],
    "base.path": RERUN["prepare"],
    "base.hub": RERUN["prepare"],
    "base.hub.id": RERUN["prepare"],
    "base.hub.revision": RERUN["prepare"],
    "base.hub.allow_floating": RERUN["prepare"],
    "base.scratch": RERUN["base"],
    "ppo.reward_function": RERUN["ppo"] | RERUN["compare"],
    **{f"{stage}.method": RERUN[stage] | RERUN["compare"] for stage in ("reward", "ppo", "grpo")},
    "grpo.reward_function": RERUN["grpo"] | RERUN["compare"],
    "grpo.reward_seconds": RERUN["grpo"] | RERUN["compare"],
    "grpo.rewards": RERUN["grpo"] | RERUN["compare"],
    **{f"grpo.rewards[].{key}": RERUN["grpo"] | RERUN["compare"] for key in REWARD},
    **{f"{stage}.method": RERUN[stage] | RERUN["reference"] | RERUN["compare"] for stage in ("dpo", "kto")},
}
REFUSED = (
    "reward_code",
    "gold_code",
    "compare.reward_function",
    "compare.reward_seconds",
    "compare.checks",
    *(f"compare.checks[].{key}" for key in REWARD),
    "reference.method",
    "compare.method",
    *(f"{asked}[].{key}" for asked in ("choices", "answers") for key in ("format", "use", "separator")),
)
REFUSED += ("text[].separator", "long[].separator")
REFUSED += tuple(f"{source}[].threshold" for source in SOURCES if source != "kto")
REFUSED += tuple(f"{source}[].weight" for source in ("choices", "answers"))
REFUSED += tuple(f"{source}[].system" for source in SOURCES if source not in CONVERSATIONS)


def next_value(key: str, field, value):
    """Another value of a key than its own or its default."""
    value = field.default if value is None else value
    text = str(field.annotation)
    if isinstance(value, bool):
        return not value
    if "target_modules" in key:
        return MODULES
    if "Literal" in text:
        choices = re.findall(r"'([^']*)'", text)
        return choices[(choices.index(value) + 1) % len(choices)] if value is not None else choices[0]
    if isinstance(value, int):
        return value + (64 if "size" in key and "64" in str(field.metadata) else 1)
    if isinstance(value, float):
        return value * 0.9 or 0.05
    if value is None or isinstance(value, str):
        return "another" if "str" in text else 16 if "int" in text else 0.5
    raise AssertionError(f"{key}: say in SPECIAL what its other value is")


def conditions(key: str, field) -> dict:
    """What must be set for a key to have an effect: its `only_with`."""
    only = (field.json_schema_extra or {}).get("only_with", {})
    return {f"{key.rpartition('.')[0]}.{other}": values[0] for other, values in only.items()}


def get(values, key: str):
    for part in key.split("."):
        values = (values or {}).get(part.removesuffix("[]"))
        values = values[0] if part.endswith("[]") and values else values
    return values


def settings(key: str, field) -> tuple[dict, object]:
    """What is set beforehand, key -> value, so that a key has an effect; and another value of the key."""
    return SPECIAL.get(key) or (conditions(key, field), next_value(key, field, get(WRITTEN, key)))


def with_settings(changes: dict) -> str:
    """The text of `whole` with other values of some keys."""
    values = copy.deepcopy(WRITTEN)
    for key, value in changes.items():
        put(values, key, copy.deepcopy(value))
    return yaml.safe_dump(values)


FILE = Path("config/experiments/whole.yaml")


def is_asked(key: str) -> bool:
    """Sources of all kinds are of one class: their keys are asked of `sft`, of other kinds what differs there."""
    kind, inner, name = key.removeprefix("prepare.").partition("[].")
    of_another_kind = inner and kind in SOURCES and kind != "sft"
    return not of_another_kind or name in ("path", "format", "threshold") or key.endswith(REFUSED)


# Keys with the same settings beforehand one after the other: the artifacts of these are made once.
ASKED = [(key, field) for key, field in keys() if is_asked(key)]
IN_GROUPS = sorted(ASKED, key=lambda one: json.dumps(settings(*one)[0], sort_keys=True))


@pytest.fixture(scope="module")
def made(done):
    """Makes the artifacts of the settings in a text, where the last ones are of others; nothing is to be done then.
    In the end that still holds: planning with other values has left nothing behind."""
    last = []

    def make(text: str) -> None:
        FILE.write_text(text)
        if last != [text]:
            fabricate(campaign.load("config/config.yaml"))
            assert rerun() == {}, "control"
            last[:] = [text]

    yield make
    FILE.write_text(last[0])
    assert rerun() == {}, "control"


@pytest.mark.parametrize(("key", "field"), [pytest.param(key, field, id=key) for key, field in IN_GROUPS])
def test_a_key_reruns_the_stage_of_its_section_and_what_descends_from_it(made, key, field):
    before, value = settings(key, field)
    if any(key.endswith(end) for end in REFUSED):
        FILE.write_text(with_settings(before | {key: value}))
        with pytest.raises(UserError, match=r"no effect|written by the workflow|it should be"):
            campaign.load("config/config.yaml")
        return
    made(with_settings(before))
    FILE.write_text(with_settings(before | {key: value}))
    plan = campaign.load("config/config.yaml")
    planned = {name for name in rerun() if not name.startswith("fetch/")}
    said = why.to_run(why.survey(plan))
    assert {folder.removeprefix("results/") for folder in said} == planned, "`posttrain why` says what Snakemake does"
    found = {name.removeprefix("whole/") for name in planned if not name.startswith("other/")}
    expected = FURTHER.get(key, RERUN[key.partition(".")[0]])
    there = {folder.removeprefix("results/whole/").removeprefix("results/") for folder in plan.folders()}
    assert found == expected & there

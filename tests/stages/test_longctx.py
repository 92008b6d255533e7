"""longctx: positions as a contract, whole models that others read correctly, exact merges, resume; lengths."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import longctx, make, scratch, sft

from posttrain.config.sections import Base, Evaluate, Lengths, Prepare, Source, Tokenizer
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, read_jsonl
from posttrain.models import policy, tokens
from posttrain.stages import lengths as lengths_stage
from posttrain.tools.export import export

WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="module")
def data(long_data) -> Path:
    return long_data


@pytest.fixture(scope="module")
def base(long_base) -> Path:
    return long_base


@pytest.fixture(scope="module")
def alibi(data) -> Path:
    section = Base(scratch=scratch(context=64, positions="alibi"))
    return make("base", section, Path("results/long-alibi/base/manifest.json"), data=data)


@pytest.fixture(scope="module")
def tuned(data, base) -> Path:
    section = sft(method="qlora", max_length=64, dropout=0.1)
    return make("sft", section, Path("results/long/sft/manifest.json"), data=data, base=base)


@pytest.fixture(scope="module")
def interpolated(data, base) -> Path:
    output = Path("results/long/longctx/manifest.json")
    return make("longctx", longctx(), output, data=data, base=base, policy=base)


def loss(folder: Path, row: list[int]) -> float:
    """Loss in nats of a row's tokens after the first, by transformers alone; the last token is not read."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        log_probs = model(torch.tensor([row[:-1]])).logits[0].log_softmax(dim=-1)
    return -log_probs[range(len(row) - 1), row[1:]].sum().item()


def long_ids(data: Path, length: int = 256, count: int = 4) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data.parent / "data" / "tokenizer")
    rows = [row for row in read_jsonl(data.parent / "data/long/test.jsonl") if "answer" not in row]
    found = [[tokenizer.bos_token_id, *tokenizer(row["text"], add_special_tokens=False).input_ids] for row in rows]
    return torch.tensor([ids[:length] for ids in found if len(ids) >= length][:count])


def test_the_contract_of_each_method(data, base):
    for method, factor, parameters in (
        ("linear", 4.0, {"rope_type": "linear", "factor": 4.0}),
        ("dynamic", 4.0, {"rope_type": "dynamic", "factor": 4.0}),
        ("yarn", 4.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        ("ntk", 1.0, {"rope_type": "default", "rope_theta": 10000.0 * 4.0 ** (32 / (32 - 2))}),
        ("none", 1.0, {"rope_type": "default"}),
    ):
        section = longctx(method=method, tuning="none")
        made = make("longctx", section, Path(f"results/{method}/longctx/manifest.json"),
                    data=data, base=base, policy=base)  # fmt: skip
        contract = policy.read_contract(made)["positions"]
        original = 256 if method in ("ntk", "none") else 64
        parameters = {"rope_theta": 10000.0} | parameters
        theta, kind = parameters["rope_theta"], parameters["rope_type"]
        expected = {"type": kind, "factor": factor, "theta": theta, "context": 256, "parameters": parameters}
        assert contract == expected | {"original_context": original}
        config = json.loads((made.parent / "model" / "config.json").read_text())
        assert config["rope_parameters"] == contract["parameters"]
        assert config["max_position_embeddings"] == (64 if method == "dynamic" else 256)
        tokenizer = json.loads((made.parent / "model" / "tokenizer_config.json").read_text())
        assert tokenizer["model_max_length"] == 256


def test_an_untuned_model_has_the_bases_weights_and_reads_otherwise(data, base):
    """PI reads token 4 p as the base reads token p: the same logits at positions of a quarter, others at their own."""
    made = Path("results/linear/longctx/manifest.json")
    model, _ = policy.load_policy(made)
    own, _ = policy.load_policy(base)
    ids = long_ids(data, 32, 2)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # without it, gaps are read as packed rows
    places = torch.arange(32)[None]
    with torch.no_grad():
        expected = own(**given, position_ids=places).logits
        assert torch.allclose(model(**given, position_ids=4 * places).logits, expected, atol=1e-5)
        assert not torch.allclose(model(**given, position_ids=places).logits, expected, atol=1e-3)


def test_positions_modulo_the_context_are_read_here_alone(data, base, tmp_path):
    """The base up to its context, another model beyond it, which transformers alone does not read: no export."""
    section = longctx(method="modulo", tuning="none")
    made = make("longctx", section, Path("results/modulo/longctx/manifest.json"), data=data, base=base, policy=base)
    ids = long_ids(data)
    model, own = policy.load_policy(made)[0], policy.load_policy(base)[0]
    with torch.no_grad():
        found, alone = model(ids).logits, own(ids).logits
        wrapped = own(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(256)[None] % 64).logits
    assert torch.allclose(found, wrapped, atol=1e-5) and torch.allclose(found[:, :64], alone[:, :64], atol=1e-5)
    assert not torch.allclose(found, alone, atol=1e-3), "control"
    assert loss(made.parent / "model", ids[0].tolist()) == pytest.approx(loss(base.parent / "model", ids[0].tolist()))
    with pytest.raises(UserError, match="its positions are read modulo 64, which transformers alone does not do"):
        export(made, tmp_path / "exported")
    assert "RoPE's are taken modulo 64" in (made.parent / "model/README.md").read_text()


def test_dynamic_frequencies_are_those_of_each_request(data, base, tmp_path):
    """One number for every batch size, benchmarks and windows; it is that of transformers, one text at a time."""
    model, tokenizer = policy.load_policy(base)
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data += torch.randn_like(weight) * 0.3  # so that positions decide what is read
    model.save_pretrained(tmp_path / "random")
    tokenizer.save_pretrained(tmp_path / "random")
    given = make("base", Base(path=str(tmp_path / "random")), Path("results/random/base/manifest.json"), data=data)
    untuned = longctx(method="dynamic", tuning="none")
    made = make("longctx", untuned, Path("results/random/longctx/manifest.json"),
                data=data, base=given, policy=given)  # fmt: skip
    rows = [row["text"] for row in read_jsonl(data.parent / "data/long/test.jsonl") if "answer" not in row]
    texts = [" ".join(text.split()[: 155 - 9 * number]) for number, text in enumerate(sorted(rows, key=len)[-16:])]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    section = Prepare(
        text=[Source(path=str(tmp_path / "texts.jsonl"), use="test")],
        tokenizer=Tokenizer(path=str(base.parent / "model")), max_tokens=256,
    )  # fmt: skip
    prepared = make("prepare", section, Path("results/random/prepare/manifest.json"))
    bits, perplexities = [], []
    for size in (1, 16):
        output = Path(f"results/random-{size}")
        judged = make("evaluate", Evaluate(batch_size=size), output / "evaluate/longctx/manifest.json",
                      data=prepared, policy=made)  # fmt: skip
        rows = read_json(judged.parent / "metrics.json")["rows"]
        bits += [row["value"] for row in rows if row["metric"] == "bits_per_byte"]
        lengths = Lengths(tokens=[64, 256], batch_size=size, documents=4)
        judged = make("lengths", lengths, output / "lengths/longctx/manifest.json", data=data, policy=made)
        perplexities += [[row["value"] for row in read_json(judged.parent / "metrics.json")["rows"]]]
    assert bits[0] == bits[1]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)
    ids = [[tokenizer.bos_token_id, *tokenizer(text).input_ids] for text in texts]  # as lm-eval begins a text
    losses = [loss(made.parent / "model", row) for row in ids]
    assert bits[0] == pytest.approx(sum(losses) / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-5)


@pytest.mark.parametrize("key", ["factor", "rope_theta", "rope_type"])
def test_a_model_that_would_be_read_otherwise_is_refused(interpolated, data, key, tmp_path):
    """A config whose numbers contradict the contract, at every load: here the judge's."""
    import shutil

    shutil.copytree(interpolated.parent, tmp_path / "longctx")
    edited = tmp_path / "longctx/model/config.json"
    config = json.loads(edited.read_text())
    policy.load_policy(tmp_path / "longctx/manifest.json")  # control: as it was made it loads
    config["rope_parameters"][key] = {"factor": 2.0, "rope_theta": 500.0, "rope_type": "default"}[key]
    edited.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json differ from those that it was trained with: .* is .*, not"):
        policy.load_policy(tmp_path / "longctx/manifest.json")


def test_positions_that_a_method_cannot_extend_are_refused(interpolated, data, base, alibi):
    yarn = longctx(method="yarn")
    for manifest, section, reason in (
        (interpolated, yarn, r"rescaled already \(linear\), which yarn cannot extend: set linear or ntk or none"),
        (alibi, longctx(), "bloom has ALiBi, no RoPE that can be rescaled: set method: none"),
    ):
        with pytest.raises(UserError, match=reason):
            make("longctx", section, Path("results/twice/longctx/manifest.json"),
                 data=data, base=base, policy=manifest)  # fmt: skip


def test_alibi_is_tuned_on_longer_texts_unchanged(data, alibi):
    section = longctx(method="none", steps=2)
    made = make("longctx", section, Path("results/alibi/longctx/manifest.json"), data=data, base=alibi, policy=alibi)
    contract = policy.read_contract(made)["positions"]
    assert (contract["type"], contract["context"]) == ("alibi", 4 * policy.read_contract(alibi)["positions"]["context"])


SMALL = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64)  # fmt: skip
TRAINED = dict(rope_theta=10000.0, original_max_position_embeddings=16)
NESTED = dict(full_attention=dict(rope_type="linear", rope_theta=1e6, factor=4.0),
              sliding_attention=dict(rope_type="default", rope_theta=1e4))  # fmt: skip
GIVEN = {
    "llama-3": ("yarn", "llama", dict(rope_parameters=TRAINED | dict(
        rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0))),
    "phi-3": ("linear", "phi3", dict(original_max_position_embeddings=16, pad_token_id=0, rope_parameters=TRAINED
        | dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8))),
    "gemma-3": ("linear", "gemma3_text", dict(head_dim=16, sliding_window=32, layer_types=list(NESTED),
                                              rope_parameters=NESTED)),
    "mixtral": ("yarn", "mixtral", dict(head_dim=16, num_local_experts=2, num_experts_per_tok=1, rope_parameters=TRAINED
        | dict(rope_type="yarn", factor=4.0))),
    "gpt-2": (None, "gpt2", dict(n_embd=64, n_layer=1, n_head=4, n_positions=64)),
    "mpt": ("none", "mpt", dict(d_model=64, n_layers=1, n_heads=4, max_seq_len=64)),
}  # fmt: skip


@pytest.fixture
def given(data, base, tmp_path):
    """Makes a base of a random model, with the tokenizer of the tiny one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def base_of(name: str, **changes) -> Path:
        _, kind, settings = GIVEN[name]
        tokenizer = policy.load_tokenizer(base)
        special = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                       eos_token_id=tokenizer.eos_token_id)  # fmt: skip
        sizes = {} if kind in ("gpt2", "mpt") else SMALL
        config = AutoConfig.for_model(kind, **sizes | special | settings | changes)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return make("base", Base(path=str(tmp_path / name)), Path(f"results/{name}/base/manifest.json"), data=data)

    return base_of


@pytest.mark.parametrize("name", GIVEN)
def test_given_models(name, given, data, base):
    """Extended by the method that fits, tuned, and judged by length; without positions beyond, refused in words."""
    own, method = given(name), GIVEN[name][0]
    inputs = {"data": data, "base": own, "policy": own}
    judged = Path(f"results/{name}/lengths")
    for wrong in {"linear", "yarn", "dynamic"} - {method}:
        with pytest.raises(UserError, match=r"rescaled already|has ALiBi, no RoPE|has a learned position"):
            make("longctx", longctx(method=wrong), Path(f"results/{name}/wrong/manifest.json"), **inputs)
    if name == "mpt":  # its ALiBi is made longer
        near, far = (
            make("lengths", Lengths(tokens=of, documents=4, packing=True), judged / f"{of[-1]}/manifest.json",
                 data=data, policy=own)
            for of in ([64], [64, 256])
        )  # fmt: skip
        of_near, of_far = (read_json(judged.parent / "metrics.json")["rows"] for judged in (near, far))
        assert [row["task"] for row in of_far[:2]] == ["long_text_64", "long_text_256"]
        assert all(math.isfinite(row["value"]) and row["value"] > 1 for row in of_near + of_far)
    if name == "gpt-2":
        with pytest.raises(UserError, match=r"lengths.tokens: 256 is over 64, after which .* has no positions"):
            make("lengths", Lengths(tokens=[64, 256], documents=4), judged / "beyond/manifest.json",
                 data=data, policy=own)  # fmt: skip
    for way in [method, "none"] if method else []:
        section = longctx(method=way, steps=2)
        longer = make("longctx", section, Path(f"results/{name}/{way}/manifest.json"), **inputs)
        assert policy.read_contract(longer)["positions"]["context"] == 256
        make("lengths", Lengths(tokens=[64, 256], documents=4), judged / f"{way}/manifest.json",
             data=data, policy=longer)  # fmt: skip


def test_virtual_tokens_take_positions(given, data):
    """Of GPT-2: rows that leave no room for them are refused, and a benchmark is cut to what is left."""
    from posttrain.models.positions import make_room

    own = given("gpt-2", n_positions=80)
    tokenizer, folder = policy.load_tokenizer(own), data.parent / "data/sft"
    rows = [row for side in ("train", "test") for row in read_jsonl(folder / f"{side}.jsonl")]
    longest = max(len(tokens.encode(tokenizer, row)["input_ids"]) for row in rows)
    section = sft(method="prefix", virtual_tokens=80 - longest, max_length=64)
    made = make("sft", section, Path("results/virtual/sft/manifest.json"), data=data, base=own)
    assert make_room(policy.load_policy(made, own)[0], 80) == longest
    with pytest.raises(UserError, match=f"a row has {longest} tokens, and the model has positions for {longest - 1}"):
        make("sft", section.model_copy(update={"virtual_tokens": 81 - longest}),
             Path("results/virtual/over/manifest.json"), data=data, base=own)  # fmt: skip


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_of_mpt(method, given, data):
    own = given("mpt", max_seq_len=80)
    section = sft(method=method, virtual_tokens=4, max_length=64)
    made = make("sft", section, Path(f"results/mpt-{method}/sft/manifest.json"), data=data, base=own)
    make("evaluate", Evaluate(limit=2, batch_size=4), Path(f"results/mpt-{method}/evaluate/sft/manifest.json"),
         data=data, base=own, policy=made)  # fmt: skip


ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not [name for name in sys.modules if name.startswith("posttrain")]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.load(sys.argv[2])
from lm_eval.models.huggingface import HFLM
longest = HFLM(pretrained=sys.argv[1], device="cpu").max_length
with torch.no_grad():
    loss = model(input_ids=ids, labels=ids).loss.item()
print(loss, longest, AutoTokenizer.from_pretrained(sys.argv[1]).model_max_length)
"""


def test_others_read_the_model_by_themselves(interpolated, data, tmp_path):
    """A fresh process without anything of ours; and the loss that `lengths` finds, by another way."""
    ids = long_ids(data)
    torch.save(ids, tmp_path / "ids.pt")
    command = [sys.executable, "-c", ALONE, str((interpolated.parent / "model").resolve()), str(tmp_path / "ids.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found, longest, tokenizer_longest = done.stdout.split()[-3:]
    assert (longest, tokenizer_longest) == ("256", "256")
    section = Lengths(tokens=[256], documents=4)
    judged = make(
        "lengths", section, Path("results/alone/lengths/longctx/manifest.json"), data=data, policy=interpolated
    )
    assert read_json(judged.parent / "metrics.json")["rows"][0]["value"] == pytest.approx(math.exp(float(found)), 1e-4)


@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_merges_are_certified(data, base, tuned, tuning):
    """From a QLoRA policy, tuned with an adapter, embeddings and norms; both merges are measured, and exact."""
    section = longctx(policy="sft", tuning=tuning, rank=4, alpha=8.0)
    output = Path(f"results/{tuning}/longctx/manifest.json")
    made = make("longctx", section, output, data=data, base=base, policy=tuned)
    summary = read_json(made.parent / "metrics.json")["summary"]
    assert 0 <= summary["merge_difference"] < 1e-4 and 0 <= summary["policy_merge_difference"] < 1e-4
    assert policy.read_contract(made)["method"] == "weights"
    assert not list(made.parent.glob("**/adapter_config.json"))
    before, after = (policy.load_policy(manifest, base)[0].state_dict() for manifest in (tuned, made))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= changed, "embeddings and norms are trained beside"
    assert torch.equal(after["model.embed_tokens.weight"], after["lm_head.weight"]), "tied as they were"


def test_a_wrong_merge_is_refused(data, base, tuned):
    """Control: merged into the weights before quantisation it is another model."""
    from peft import PeftModel

    adapter = tuned.parent / "model"
    expected = policy.probed(PeftModel.from_pretrained(policy.load_under(tuned, base), adapter))
    wrong = PeftModel.from_pretrained(policy.load_verified(base), adapter).merge_and_unload()
    with pytest.raises(UserError, match=r"another model: logits differ by .* allowed 0\.001"):
        policy.certified_difference(expected, policy.probed(wrong), "another model")
    right, difference = policy.merged_policy(tuned, base)
    assert policy.certified_difference(expected, policy.probed(right), "another model") == difference < 1e-4


def test_tuning_changes_the_weights_and_lowers_the_loss(interpolated, data):
    summary = read_json(interpolated.parent / "metrics.json")["summary"]
    assert summary["perplexity"] < summary["perplexity_before"] and summary["context"] == 256


def test_a_killed_run_resumes_to_the_same_bytes(data, base, interpolated, monkeypatch):
    from posttrain.training import trainers

    class Dying(trainers.Progress):
        def on_step_end(self, args, state, control, **rest):
            super().on_step_end(args, state, control, **rest)
            if state.global_step == 3:
                raise KeyboardInterrupt

    output = Path("results/long-killed/longctx/manifest.json")
    monkeypatch.setattr(trainers, "Progress", Dying)
    with pytest.raises(KeyboardInterrupt):
        make("longctx", longctx(), output, data=data, base=base, policy=base)
    monkeypatch.undo()
    make("longctx", longctx(), output, data=data, base=base, policy=base)
    assert read_json(output)["files"][WEIGHTS] == read_json(interpolated)["files"][WEIGHTS]


def test_windows_slide_over_a_document_and_count_each_token_once(interpolated, base):
    """Against one forward pass for each token, which sees just the window before it."""
    model, tokenizer = policy.load_policy(base)
    ids = [tokenizer.bos_token_id, *range(20, 95)]
    section = Lengths(tokens=[32], stride=0.5)
    found = lengths_stage.window_losses(section, model, ids, 32)
    assert len(found) == len(ids) - 1
    in_tokens = lengths_stage.window_losses(Lengths(tokens=[32], stride_tokens=16), model, ids, 32)
    assert in_tokens == found, "half a window"
    whole = lengths_stage.window_losses(Lengths(tokens=[32], stride=1.0), model, ids, 32)
    assert len(whole) == len(ids) - 1 and whole[40:] != found[40:], "a window's first token is not predicted in it"
    for place in (1, 31, 32, 47, 48, 60, 75):
        if place < 32:
            first = 0
        else:
            end = next(end for end in [*range(48, len(ids), 16), len(ids)] if end > place)
            first = end - 32
        with torch.no_grad():
            logits = model(torch.tensor([ids[first : place + 1]])).logits[0, -2]
        expected = -torch.log_softmax(logits, dim=-1)[ids[place]].item()
        assert found[place - 1] == pytest.approx(expected, abs=1e-4), place


def test_lengths_and_positions(data, base, alibi):
    for manifest, name in ((base, "rope"), (alibi, "alibi")):
        section = Lengths(tokens=[64, 256], documents=6, buckets=4)
        output = Path(f"results/{name}/lengths/base/manifest.json")
        made = make("lengths", section, output, data=data, policy=manifest)
        metrics = read_json(made.parent / "metrics.json")
        names = ["long_text_64", "long_text_256", "near_text_64", "near_text_256"]
        assert [(row["task"], row["n"]) for row in metrics["rows"]] == [(name, 6) for name in names]
        assert [(part["from"], part["to"]) for part in metrics["positions"]] == [
            (1, 64),
            (65, 128),
            (129, 191),
            (192, 255),
        ]
        rows = [row for row in read_jsonl(made.parent / "data/documents.jsonl") if row["length"] == 256][:6]
        mean = sum(row["loss"] for row in rows) / 6
        assert metrics["rows"][1]["value"] == pytest.approx(math.exp(mean))


def test_short_documents_are_refused_unless_packed(data, base, home):
    """A row is one document's beginning, so that what it depends on is in it."""
    section = longctx(packing=False)
    made = make("longctx", section, Path("results/unpacked/longctx/manifest.json"), data=data, base=base, policy=base)
    assert made.exists()
    with pytest.raises(
        UserError, match=r"longctx: none of .* documents in .* has 1024 tokens; give longer ones or set"
    ):
        make("longctx", longctx(packing=False, factor=16.0), Path("results/too-long/longctx/manifest.json"),
             data=data, base=base, policy=base)  # fmt: skip


def test_gradient_checkpointing_changes_nothing(data, base):
    """On a quantised model with an adapter, where it is easily without any gradient."""
    from safetensors.torch import load_file

    made = {}
    for saving in (False, True):
        section = longctx(tuning="qlora", rank=4, alpha=8.0, steps=2, gradient_checkpointing=saving)
        output = Path(f"results/saving-{saving}/longctx/manifest.json")
        made[saving] = load_file(make("longctx", section, output, data=data, base=base, policy=base).parent / WEIGHTS)
    nf4 = {"type": "nf4", "double_quantization": True, "compute": "float32"}
    own = policy.load_verified(base, nf4).dequantize().state_dict()
    key = "model.layers.0.self_attn.q_proj.weight"
    assert (made[True][key] - own[key]).abs().max() > 1e-4, "the adapter learned"
    assert max((made[True][key] - made[False][key]).abs().max() for key in made[True]) < 1e-5

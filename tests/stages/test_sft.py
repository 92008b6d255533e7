"""sft: every method trains, is loaded again exactly, and each trap that silently trains wrong stays shut."""

import shutil
from pathlib import Path

import pytest
import torch
from test_base import killed_at
from tiny import make, sft

from posttrain.data import tokenized
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json
from posttrain.models import policy, quantization
from posttrain.stages import sft as stage
from posttrain.training import trainers
from posttrain.training.order import Part, in_sequences

METHODS = ("full", "lora", "qlora", "prefix", "prompt")


@pytest.fixture(scope="module")
def tuned(data, base) -> dict[str, Path]:
    """One short fine-tuning for each method."""
    made = {}
    for method in METHODS:
        rate = 5e-2 if method in ("prefix", "prompt") else 5e-3  # virtual tokens need a larger one
        output = Path(f"results/{method}/sft/manifest.json")
        made[method] = make("sft", sft(method=method, learning_rate=rate), output, data=data, base=base)
    return made


def logits(manifest: Path, base: Path) -> torch.Tensor:
    model, tokenizer = policy.load_policy(manifest, base)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "what is this ?"}], return_tensors="pt")
    with torch.no_grad():
        return model(ids["input_ids"]).logits[0, -1]


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_loads_again(tuned, base, method):
    metrics = read_json(tuned[method].parent / "metrics.json")
    assert metrics["summary"]["eval_loss"] < metrics["summary"]["eval_loss_before"]
    assert [point["step"] for point in metrics["history"] if "loss" in point] == [2, 4, 6]
    assert logits(tuned[method], base).isfinite().all()
    assert not torch.equal(logits(tuned[method], base), logits(base, None))


def test_trained_parameters_are_counted_by_formula(tuned, base):
    """LoRA: the sum of r (d_in + d_out) over the adapted layers (arXiv 2106.09685, section 4.2)."""
    linear = [(64, 64)] * 4 + [(64, 64)] * 3  # attention q k v o; feed-forward gate up down, all 64 wide here
    expected = sum(16 * (rows + columns) for rows, columns in linear)
    for method in ("lora", "qlora"):
        assert read_json(tuned[method].parent / "metrics.json")["summary"]["trainable_parameters"] == expected
    prompt = read_json(tuned["prompt"].parent / "metrics.json")["summary"]["trainable_parameters"]
    assert prompt == 16 * 64


def test_artifacts_hold_safetensors_and_no_path_of_this_machine(tuned, home):
    for method, manifest in tuned.items():
        files = [file for file in manifest.parent.rglob("*") if file.is_file()]
        assert any(file.suffix == ".safetensors" for file in files), method
        assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth")], method
        for file in files:
            if file.name != "provenance.json":
                assert str(home).encode() not in file.read_bytes(), file


def test_every_policy_has_a_model_card(tuned, base):
    for method, manifest in tuned.items():
        text = (manifest.parent / "model/README.md").read_text()
        library = "transformers" if method == "full" else "peft"
        assert f"library_name: {library}\n" in text and f"`{method if method != 'full' else 'weights'}; " in text
        assert "license: unknown\n" in text and "trained-from-scratch" in text and "eval_loss_before" in text
        assert "model/README.md" in read_json(manifest)["files"]


def test_an_adapter_is_refused_on_another_base(tuned, base, data, home):
    other = Path("results/other-base/base/manifest.json")
    from tiny import scratch

    from posttrain.config.sections import Base

    make("base", Base(scratch=scratch(seed=5)), other, data=data)
    with pytest.raises(UserError, match="another base"):
        policy.load_policy(tuned["lora"], other)


def test_a_changed_chat_template_is_refused(tuned, base, tmp_path):

    folder = tmp_path / "sft"
    shutil.copytree(tuned["lora"].parent, folder)
    template = folder / "model/chat_template.jinja"
    template.write_text(template.read_text().replace("<|assistant|>", "<|user|>"))
    with pytest.raises(UserError, match=r"chat template.*not the one"):
        policy.load_policy(folder / "manifest.json", base)


# Traps: each was measured to train or load wrong without an error ---------------------------------------------


def quantised(base: Path):
    return policy.load_verified(base, {"type": "nf4", "double_quantization": True, "compute": "float32"})


def gradient(model, ids) -> torch.Tensor:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for name, p in adapted.named_parameters() if "lora_B" in name])


def test_an_evaluation_does_not_spoil_the_4_bit_weights(base, monkeypatch):
    """bitsandbytes repacks 4-bit weights in the first evaluation on CPUs with AVX512-BF16."""
    ids = torch.arange(10, 40).unsqueeze(0)
    fresh = gradient(quantised(base), ids)
    used = quantised(base)
    with torch.no_grad():
        used.eval()(input_ids=ids)
    assert torch.equal(gradient(used.train(), ids), fresh)


def test_without_the_switch_the_4_bit_gradient_is_wrong(base, monkeypatch):
    """Control of the test above, on machines that have the instruction."""
    import bitsandbytes.nn.modules as modules

    if not modules.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so there is nothing to spoil")
    monkeypatch.setattr(quantization, "keep_quantized_weights", lambda model: None)
    ids = torch.arange(10, 40).unsqueeze(0)
    used = quantised(base)
    with torch.no_grad():
        used.eval()(input_ids=ids)
    assert not torch.equal(gradient(used.train(), ids), gradient(quantised(base), ids))


def test_the_merged_model_is_the_trained_function(tuned, base):
    """Merged into the dequantised base it is; merged into the unquantised base it is not (control)."""
    from peft import PeftModel

    ids = torch.arange(10, 40).unsqueeze(0)
    folder = tuned["qlora"].parent / "model"
    with torch.no_grad():
        trained = PeftModel.from_pretrained(quantised(base), folder).eval()(input_ids=ids).logits
        merged = policy.load_policy(tuned["qlora"], base)[0](input_ids=ids).logits
        other = PeftModel.from_pretrained(policy.load_verified(base), folder).merge_and_unload().eval()
        wrong = other(input_ids=ids).logits
    assert (trained - merged).abs().max() < 1e-4
    assert (trained - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_killed_and_continued_gives_the_same_bytes(tuned, data, base, home, method, monkeypatch):
    """With dropout, accumulation and evaluation; what TRL leaves in bfloat16 would come back as float32."""
    dropout = {} if method == "full" else {"dropout": 0.1}
    section = sft(method=method, micro_batch_size=2, **dropout)
    whole = make("sft", section, Path(f"results/whole-{method}/sft/manifest.json"), data=data, base=base)
    output = Path(f"results/killed-{method}/sft/manifest.json")
    patch = killed_at(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make("sft", section, output, data=data, base=base)
    patch.undo()
    assert not output.exists() and list(output.parent.glob("checkpoints/*/checkpoint-4"))
    make("sft", section, output, data=data, base=base)
    assert read_json(output)["files"] == read_json(whole)["files"]


def test_bfloat16_adapters_do_not_survive_a_resume(data, base, home, monkeypatch):
    """Control of the test above: without the cast to float32 a continued 4-bit run is another run."""
    monkeypatch.setattr(trainers, "make_trained_float32", lambda model: None)
    section = sft(method="qlora", micro_batch_size=2, dropout=0.1)
    whole = make("sft", section, Path("results/bf-whole/sft/manifest.json"), data=data, base=base)
    output = Path("results/bf-killed/sft/manifest.json")
    patch = killed_at(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make("sft", section, output, data=data, base=base)
    patch.undo()
    make("sft", section, output, data=data, base=base)
    weights = "model/adapter_model.safetensors"
    assert read_json(output)["files"][weights] != read_json(whole)["files"][weights]


def test_another_identity_never_continues_a_checkpoint(data, base, home, monkeypatch):
    output = Path("results/switched/sft/manifest.json")
    patch = killed_at(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make("sft", sft(method="lora"), output, data=data, base=base)
    patch.undo()
    make("sft", sft(method="lora", learning_rate=1e-3), output, data=data, base=base)
    fresh = make(
        "sft", sft(method="lora", learning_rate=1e-3), Path("results/fresh/sft/manifest.json"), data=data, base=base
    )
    assert read_json(output)["files"] == read_json(fresh)["files"]


def test_the_seed_reaches_the_adapter(tuned, data, base, home):
    other = make("sft", sft(method="lora", seed=3), Path("results/seeded/sft/manifest.json"), data=data, base=base)
    again = make("sft", sft(method="lora"), Path("results/repeated/sft/manifest.json"), data=data, base=base)
    name = "model/adapter_model.safetensors"
    first, second, third = (read_json(path)["files"][name] for path in (tuned["lora"], again, other))
    assert first == second != third


def test_the_frozen_base_is_unchanged(tuned, base):
    from posttrain.ground.files import verify

    verify(base)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_packed_neighbours_cannot_see_each_other(base, data, method):
    rows = tokenized.load(policy.load_tokenizer(base), data, "sft", "train")
    stage.prove_isolation(policy.load_verified(base), rows.select(range(9)))


def test_packed_neighbours_that_see_each_other_are_found(base, data):
    """Control: a model that ignores where a packed row begins."""
    rows = tokenized.load(policy.load_tokenizer(base), data, "sft", "train")
    model = policy.load_verified(base)
    forward = model.forward
    model.forward = lambda input_ids, position_ids=None, **kwargs: forward(input_ids=input_ids, **kwargs)
    with pytest.raises(UserError, match="packed rows attend to each other"):
        stage.prove_isolation(model, rows.select(range(9)))


def test_bfloat16_trains_on_a_cpu_too(data, base, home):
    section = sft(method="lora", precision="bfloat16")
    manifest = make("sft", section, Path("results/bfloat16/sft/manifest.json"), data=data, base=base)
    summary = read_json(manifest.parent / "metrics.json")["summary"]
    assert summary["eval_loss"] < summary["eval_loss_before"]


def test_another_stages_manifest_is_told_in_words(data, base, home):
    output = Path("results/wrong/sft/manifest.json")
    with pytest.raises(UserError, match=r"sft/train\.jsonl: does not exist"):
        make("sft", sft(method="lora"), output, data=base, base=base)
    with pytest.raises(UserError, match="is not an artifact of a language model"):
        make("sft", sft(method="lora"), output, data=data, base=data)


def test_a_target_module_that_the_base_has_not_is_named(data, base, home):
    """PEFT would adapt q_proj alone and say nothing."""
    output = Path("results/typo/sft/manifest.json")
    with pytest.raises(UserError, match=r"sft\.target_modules: the base has no k_porj;.* down_proj.* k_proj"):
        make("sft", sft(method="lora", target_modules=["q_proj", "k_porj"]), output, data=data, base=base)


def test_epochs_are_the_steps_that_they_come_to(tuned, data, base, home):
    count = read_json(data.parent / "metrics.json")["splits"]["sft"]["train"]
    section = sft(method="lora").replaced(epochs=5.5 * 4 / count)  # the sixth batch ends with rows of the next pass
    again = make("sft", section, Path("results/epochs/sft/manifest.json"), data=data, base=base)
    assert "steps" not in read_json(again.parent / "config.yaml")
    weights = ("model/adapter_model.safetensors", "metrics.json")
    files, before = (read_json(manifest)["files"] for manifest in (again, tuned["lora"]))
    assert [files[name] for name in weights] == [before[name] for name in weights]


def test_a_model_that_keeps_a_cache_can_be_packed(data, base):
    """Every published model says `use_cache: true`; the trainer runs it without, and so does the proof."""
    rows = tokenized.load(policy.load_tokenizer(base), data, "sft", "train")
    model = policy.load_verified(base)
    model.config.use_cache = True
    stage.prove_isolation(model, rows.select(range(9)))


def test_packing_trains_the_same_tokens(data, base, home):
    packed = make(
        "sft", sft(method="lora", packing=True), Path("results/packed/sft/manifest.json"), data=data, base=base
    )
    summary = read_json(packed.parent / "metrics.json")["summary"]
    assert summary["eval_loss"] < summary["eval_loss_before"]


def test_rows_of_a_mixture_are_packed_apart():
    """Each row once, beside rows of its own source only; control: TRL packs all together."""
    from datasets import Dataset
    from trl import pack_dataset

    rows = [[100 * (1 + (n >= 4)) + n] + [1] * (n % 3) for n in range(14)]
    table = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows])
    sources = [Part("a", 4, 0.75, 0.75), Part("b", 10, 0.25, 0.25)]
    packed, parts = stage.packed_apart(table, 8, sources)
    owners = [{token // 100 for token in ids if token >= 100} for ids in packed["input_ids"]]
    assert owners == [{1}] * parts[0].rows + [{2}] * parts[1].rows and max(map(len, packed["input_ids"])) <= 8
    assert sorted(token for ids in packed["input_ids"] for token in ids if token >= 100) == [row[0] for row in rows]
    assert parts == in_sequences(sources, [parts[0].rows, parts[1].rows])
    together = pack_dataset(table, 8)["input_ids"]
    assert any(len({token // 100 for token in ids if token >= 100}) == 2 for ids in together), "control"


def test_the_micro_batch_changes_nothing_that_is_learned(tuned, data, base, home):
    """Global batch 4 as 1, 2 or 4 micro-batches: equal losses and weights within rounding."""
    from safetensors.torch import load_file

    name = "model/adapter_model.safetensors"
    whole = load_file(tuned["lora"].parent / name)
    for micro in (1, 2):
        output = Path(f"results/micro-{micro}/sft/manifest.json")
        split = load_file(
            make("sft", sft(method="lora", micro_batch_size=micro), output, data=data, base=base).parent / name
        )
        assert max((whole[key] - split[key]).abs().max() for key in whole) < 1e-4
    other = load_file(
        make(
            "sft", sft(method="lora", batch_size=2), Path("results/half/sft/manifest.json"), data=data, base=base
        ).parent
        / name
    )
    assert max((whole[key] - other[key]).abs().max() for key in whole) > 1e-4, "control: another global batch"


@pytest.mark.parametrize("change", ["chat_template", "vocabulary", "eos_token"])
def test_tokens_of_another_tokenizer_are_refused(data, base, change):
    """Tokens are written by `prepare`; the model would read other words in them."""
    tokenizer = policy.load_tokenizer(base)
    assert tokenized.load(tokenizer, data, "sft", "train")[0]["input_ids"], "control: the base's own"
    if change == "chat_template":
        tokenizer.chat_template += " "
    elif change == "eos_token":
        tokenizer.eos_token = tokenizer.bos_token
    else:
        tokenizer.add_tokens(["another"])
    for task in ("sft", "preference"):
        with pytest.raises(UserError, match=f"/{task}/train.arrow: holds tokens of another tokenizer .*: rm results/"):
            tokenized.load(tokenizer, data, task, "train")


def test_a_loss_that_is_no_number_stops_the_run(data, base, home, monkeypatch):
    def poison(model, begun=None):
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data.fill_(float("nan"))

    monkeypatch.setattr(trainers, "make_trained_float32", poison)
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        make("sft", sft(method="lora"), Path("results/nan/sft/manifest.json"), data=data, base=base)
    assert not Path("results/nan/sft/manifest.json").exists()


def test_a_run_that_stopped_early_is_no_result(data, base, home, monkeypatch):
    class Stopping(trainers.Progress):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    monkeypatch.setattr(trainers, "Progress", Stopping)
    with pytest.raises(UserError, match="stopped at step 3 of 6"):
        make("sft", sft(method="lora"), Path("results/early/sft/manifest.json"), data=data, base=base)
    assert not Path("results/early/sft/manifest.json").exists()


def test_what_a_collator_may_not_make_is_found():
    ids = torch.tensor([[5, 6, 7, 8]])
    padded = {"labels": torch.tensor([[-100, 6, 7, -100]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    packed = {"labels": torch.tensor([[-100, 6, -100, 8]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    stage.prove_batch(padded)
    stage.prove_batch(packed)
    with pytest.raises(UserError, match="labels padding"):
        stage.prove_batch(padded | {"labels": ids})
    with pytest.raises(UserError, match="predicted from the row before"):
        stage.prove_batch(packed | {"labels": torch.tensor([[-100, 6, 7, 8]])})


def test_a_loss_that_is_not_that_of_the_logits_is_refused(data, base, monkeypatch):
    """As where TRL does not know by which name a family scales its logits. Control: every other run of this file."""
    from trl import SFTTrainer

    loss = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *given, **named: loss(*given, **named) / 2)
    with pytest.raises(UserError, match=r"sft: TRL's loss of a row is \d\.\d+, by the logits of llama it is \d\."):
        make("sft", sft(method="lora", steps=2), Path("results/scaled/sft/manifest.json"), data=data, base=base)


def test_label_smoothing_is_the_formulas_and_only_in_training(data, base, tmp_path):
    """(1 - share) of the label's negative log-probability and the share of the vocabulary's mean, over labelled tokens
    (arXiv 1512.00567, section 7); the held-out loss has the first alone."""
    tokenizer, share = policy.load_tokenizer(base), 0.2
    rows = tokenized.load(tokenizer, data, "sft", "train").select(range(8))
    section = sft(label_smoothing=share, method="lora")
    trainer = stage.trainer_of(section, policy.load_verified(base), tokenizer, rows, rows, tmp_path)
    batch, model = trainer.data_collator([rows[number] for number in range(4)]), trainer.model.eval()
    with torch.no_grad():
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        words = -model(**inputs).logits[:, :-1].log_softmax(-1)
        loss = trainer.compute_loss(model, dict(batch)).item()
    labels = batch["labels"][:, 1:]
    learned = labels != -100
    plain = words.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[learned].mean().item()
    smoothed = (1 - share) * plain + share * words.mean(-1)[learned].mean().item()
    assert loss == pytest.approx(smoothed, rel=1e-5) and abs(smoothed - plain) > 1e-3, "control"
    trainer.eval_dataset = [rows[number] for number in range(4)]
    assert trainer.evaluation_loop().metrics["eval_loss"] == pytest.approx(plain, rel=1e-5)
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(smoothed, rel=1e-5), "training has it still"
    trainer.label_smoother = None
    trainer.args.label_smoothing_factor = 0.9
    with pytest.raises(UserError, match="TRL's loss of a row"):
        stage.prove_loss(trainer, batch)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_noise_and_a_paged_optimiser_continue_to_the_same_bytes(data, base, monkeypatch):
    """NEFTune's noise is in no evaluation: that within training finds what that behind it does. Controls: without
    noise, and without the state of the random numbers, the bytes are others."""
    chosen = dict(neftune_alpha=50.0, group_by_length=True, optimizer="paged_adamw_8bit", method="lora", steps=5)
    chosen["eval_steps"] = 5
    made = {}
    for name, changes in {"whole": {}, "continued": {}, "quiet": {"neftune_alpha": None}, "lost": {}}.items():
        section, output = sft(**chosen | changes), Path(f"results/noise-{name}/sft/manifest.json")
        if name in ("continued", "lost"):
            patch = killed_at(3, monkeypatch)
            with pytest.raises(KeyboardInterrupt):
                make("sft", section, output, data=data, base=base)
            patch.undo()
        if name == "lost":
            monkeypatch.setattr("transformers.Trainer._load_rng_state", lambda *_: None)
        made[name] = make("sft", section, output, data=data, base=base)
    files = {name: read_json(manifest)["files"] for name, manifest in made.items()}
    assert files["continued"] == files["whole"]
    metrics = read_json(made["whole"].parent / "metrics.json")
    assert metrics["history"][-1]["eval_loss"] == metrics["summary"]["eval_loss"]
    weights = "model/adapter_model.safetensors"
    assert files["quiet"][weights] != files["whole"][weights] != files["lost"][weights]


def test_a_prompt_that_starts_as_a_text_is_that_text_and_continues_to_the_same_bytes(data, base, home, monkeypatch):
    """Virtual tokens that are not trained yet are read as the text itself. Control: other text."""
    import peft

    from posttrain.models import methods

    model, tokenizer = policy.load_policy(base)
    ids = tokenizer("what is this ?").input_ids
    section = sft(method="prompt", prompt_text="what is this ?", virtual_tokens=len(ids), steps=4)
    adapted = peft.get_peft_model(policy.load_policy(base)[0], methods.adapter(section, model)).eval()
    rest = torch.tensor([tokenizer("this is it").input_ids])
    with torch.no_grad():
        said, other = (model(torch.cat([torch.tensor([first]), rest], dim=1)).logits for first in (ids, ids[::-1]))
        found = adapted(rest).logits[:, -rest.shape[1] :]
    assert torch.allclose(found, said[:, len(ids) :], atol=1e-5)
    assert not torch.allclose(found, other[:, len(ids) :], atol=1e-3), "control"
    with pytest.raises(UserError, match=rf"sft.prompt_text: has {len(ids)} tokens, over sft.virtual_tokens"):
        methods.adapter(section.replaced(virtual_tokens=len(ids) - 1), model)
    made = {}
    for name in ("whole", "continued"):
        made[name] = Path(f"results/text-{name}/sft/manifest.json")
        if name == "continued":
            patch = killed_at(2, monkeypatch)
            with pytest.raises(KeyboardInterrupt):
                make("sft", section, made[name], data=data, base=base)
            patch.undo()
        make("sft", section, made[name], data=data, base=base)
    assert read_json(made["continued"])["files"] == read_json(made["whole"])["files"]
    policy.load_policy(made["whole"], base)


def test_a_network_that_makes_the_prefix_is_trained_and_dropped(data, base, home, monkeypatch):
    """It continues to the same bytes, and what is loaded is the trained policy. Control: its weights are lost."""
    from safetensors.torch import load_file

    section, made = sft(method="prefix", prefix_projection=24, virtual_tokens=8, steps=4, learning_rate=1e-2), {}
    seen, publish = {}, stage.publish

    def published(model, *others):
        with torch.no_grad():
            seen["trained"] = model.eval()(torch.arange(4, 12)[None]).logits
        publish(model, *others)

    monkeypatch.setattr(stage, "publish", published)
    for name in ("whole", "continued", "lost"):
        made[name] = Path(f"results/network-{name}/sft/manifest.json")
        with monkeypatch.context() as patched:
            if name != "whole":
                patch = killed_at(2, monkeypatch)
                with pytest.raises(KeyboardInterrupt):
                    make("sft", section, made[name], data=data, base=base)
                patch.undo()
            if name == "lost":
                patched.setattr("posttrain.training.prefix.Reparametrized.on_train_begin", lambda *_, **__: None)
            make("sft", section, made[name], data=data, base=base)
    files = {name: read_json(manifest)["files"] for name, manifest in made.items()}
    assert files["continued"] == files["whole"]
    weights = "model/adapter_model.safetensors"
    assert files["lost"][weights] != files["whole"][weights], "control"
    assert {name: weight.shape for name, weight in load_file(made["whole"].parent / weights).items()} == {
        "prompt_embeddings": (8, 2 * 64)
    }
    metrics = read_json(made["whole"].parent / "metrics.json")
    assert metrics["summary"]["trainable_parameters"] == 8 * 64 + (64 + 1) * 24 + (24 + 1) * 2 * 64
    loaded, _ = policy.load_policy(made["lost"], base)
    with torch.no_grad():
        assert torch.allclose(loaded(torch.arange(4, 12)[None]).logits, seen["trained"], atol=1e-5)

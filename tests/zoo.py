"""Tiny random models of many architectures, with a tokenizer that speaks ChatML, and rows for every stage."""

import json
import random
from functools import cache
from pathlib import Path

CONTEXT = 256
VOCABULARY = 320
LLAMA = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=CONTEXT, vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
GEMMA = LLAMA | dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=64)
GPT2 = dict(n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT)
SPECIAL = dict(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=1, pad_token_id=0)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=CONTEXT // 4)  # fmt: skip
LONGROPE = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 8, long_factor=[2.0] * 8,
                original_max_position_embeddings=CONTEXT // 4)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=CONTEXT // 4)

# Name -> model type of transformers, and the configuration.
ZOO: dict[str, tuple[str, dict]] = {
    "llama-2": ("llama", LLAMA),
    "llama-3": ("llama", LLAMA | dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "mistral": ("mistral", LLAMA | dict(sliding_window=64)),
    "qwen2": ("qwen2", LLAMA | dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", LLAMA | dict(head_dim=16)),
    "gemma-2": ("gemma2", GEMMA),
    "gemma-3": ("gemma3_text", GEMMA),
    "phi-3": ("phi3", LLAMA | dict(rope_parameters=LONGROPE, original_max_position_embeddings=CONTEXT // 4)),
    "olmo-2": ("olmo2", LLAMA),
    "smollm-3": ("smollm3", LLAMA),
    "granite": ("granite", LLAMA),
    "mixtral": ("mixtral", LLAMA | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16, rope_parameters=YARN)),
    "qwen3-moe": ("qwen3_moe", LLAMA | dict(head_dim=16, num_experts=4, num_experts_per_tok=2,
                                            moe_intermediate_size=64)),
    "gpt-2": ("gpt2", GPT2 | SPECIAL),
    "gpt-neo": ("gpt_neo", dict(hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
                                window_size=64, max_position_embeddings=CONTEXT) | SPECIAL),
    "gpt-j": ("gptj", GPT2 | dict(rotary_dim=8) | SPECIAL),
    "gpt-neox": ("gpt_neox", dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                  max_position_embeddings=CONTEXT) | SPECIAL),
    "opt": ("opt", dict(hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
                        max_position_embeddings=CONTEXT) | SPECIAL),
    "bloom": ("bloom", dict(hidden_size=64, n_layer=2, n_head=4) | SPECIAL),
    "mpt": ("mpt", dict(d_model=64, n_layers=2, n_heads=4, max_seq_len=CONTEXT) | SPECIAL),
    "falcon": ("falcon", dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bias=False,
                              max_position_embeddings=CONTEXT) | SPECIAL),
    "phi": ("phi", LLAMA | dict(num_key_value_heads=4)),
    "stablelm": ("stablelm", LLAMA),
    "gpt-oss": ("gpt_oss", LLAMA | dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=64)),
}  # fmt: skip

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WHO, HOW = ("dog", "cat", "bird", "fox", "hen"), ("red", "big", "old", "sad", "small")
WHERE = ("park", "house", "shop", "lake", "road")


def sentence(numbers: random.Random) -> str:
    """A sentence of few words."""
    who, how, where = (numbers.choice(words) for words in (WHO, HOW, WHERE))
    return f"The {how} {who} went to the {where}."


@cache
def tokenizer():
    """A byte-level BPE tokenizer of `VOCABULARY` tokens with ChatML's turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    numbers = random.Random(0)
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    bpe.train_from_iterator([sentence(numbers) + " user\nassistant\n" for _ in range(200)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML,
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def configuration(name: str, **changes):
    """The configuration of a model of the zoo."""
    from transformers import AutoConfig

    kind, settings = ZOO[name]
    return AutoConfig.for_model(kind, **settings | changes)


def write_model(name: str, folder: Path, **changes) -> Path:
    """A random model of the zoo as its makers would publish it: weights, configuration and tokenizer.

    Norms, biases and heads are random too, so that an operation that leaves one out changes the logits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(name, **changes), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_rows(folder: Path) -> dict[str, Path]:
    """Rows by the key of `prepare`: conversations, preference pairs and long documents."""
    numbers = random.Random(1)

    def turn(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    def question(number: int) -> list[dict]:
        return turn("user", f"Item {number}: where did they go?")

    rows = {
        "sft": [
            {"messages": question(n) + turn("assistant", " ".join(sentence(numbers) for _ in range(1 + n % 3)))}
            for n in range(48)
        ],
        "preference": [
            {"prompt": question(n), "chosen": turn("assistant", sentence(numbers)),
             "rejected": turn("assistant", f"No {n}.")}
            for n in range(48)
        ],
        "long": [{"text": f"Tale {n}. " + " ".join(sentence(numbers) for _ in range(60))} for n in range(24)],
    }  # fmt: skip
    files = {key: folder / f"{key}.jsonl" for key in rows}
    for key, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[key]), encoding="utf-8")
    return files


# What is tried on each model, by the name of its column: the experiment that it extends, and its own sections.
SHORT = "steps: 2, batch_size: 4, log_steps: 1, warmup_steps: 0"
JUDGED = "compare: {{prompts: 3, max_new_tokens: 8, best_of: 2}}"
TRIED: dict[str, tuple[str, str]] = {
    "base": ("", "base: {{path: {model}}}\nevaluate: {{limit: 3}}\nlengths: {{tokens: [64, 128], documents: 2}}\n"
                 "prepare: {{max_tokens: 192, sft: [{{path: {sft}}}], preference: [{{path: {preference}}}], "
                 "long: [{{path: {long}}}]}}"),
    **{method: ("base", f"sft: {{{{method: {method}, {SHORT}}}}}") for method in ("full", "lora", "qlora")},
    **{method: ("base", f"sft: {{{{method: {method}, virtual_tokens: 4, {SHORT}}}}}")
       for method in ("prefix", "prompt")},
    "reward": ("qlora", f"reward: {{{{{SHORT}}}}}\n{JUDGED}"),
    "ppo": ("reward", "ppo: {{steps: 2, value_warmup: 1, batch_size: 4, epochs: 1, max_new_tokens: 8, warmup_steps: 0, "
                      "rails: {{min_eos_rate: 0.0}}}}"),
    "dpo": ("qlora", f"dpo: {{{{{SHORT}}}}}\n{JUDGED}"),
    "kto": ("qlora", f"kto: {{{{rows: preference, {SHORT}}}}}\n{JUDGED}"),
    "linear": ("base", f"longctx: {{{{method: linear, factor: 2.0, {SHORT}}}}}"),
    "none": ("base", f"longctx: {{{{method: none, factor: 2.0, {SHORT}}}}}"),
    "micro-batch": ("base", f"sft: {{{{method: lora, micro_batch_size: 1, {SHORT}}}}}"),
}  # fmt: skip
EXPORTED = ("full", "lora", "qlora", "dpo", "ppo")


def write_campaign(columns: list[str], model: Path, rows: dict[str, Path], folder: Path) -> Path:
    """A campaign with an experiment for each column."""
    experiments = folder / "experiments"
    experiments.mkdir(parents=True, exist_ok=True)
    for column in columns:
        parent, sections = TRIED[column]
        extends = f"extends: {parent}\n" if parent else ""
        text = f"question: does it work?\n{extends}{sections.format(model=model, **rows)}\n"
        (experiments / f"{column}.yaml").write_text(text, encoding="utf-8")
    file = folder / "config.yaml"
    file.write_text(f"experiments: [{', '.join(columns)}]\n", encoding="utf-8")
    return file


def allowed(model: Path, rows: dict[str, Path], folder: Path) -> tuple:
    """The plan of all that is allowed for a model, and column -> reason for what is refused before any job starts."""
    from posttrain.dag import campaign
    from posttrain.ground.errors import UserError

    columns, refused = list(TRIED), {}
    while True:
        try:
            return campaign.load(write_campaign(columns, model, rows, folder)), refused
        except UserError as error:
            for problem in error.problems:
                place, _, reason = problem.partition(": ")
                refused.setdefault(Path(place.partition(":")[0]).stem, reason)
        assert set(refused) & set(columns), refused
        for column in columns:  # what extends a refused experiment cannot be tried
            if TRIED[column][0] in refused:
                refused.setdefault(column, refused[TRIED[column][0]])
        columns = [column for column in columns if column not in refused]


def made_by(artifact, plan, broken: dict[str, str]) -> str:
    """Make an artifact of a plan; returns why it could not be made, or "". broken: folder -> reason, of others."""
    from tiny import make

    from posttrain.config.stages import STAGES

    roles = {role: Path(file) for role, file in plan.inputs(*artifact).items() if role not in ("files", "fetched")}
    for file in roles.values():
        if str(file.parent) in broken:
            return broken[str(file.parent)]
    section = STAGES[artifact.stage].section.model_validate_json(plan.section(artifact.experiment, artifact.stage))
    try:
        make(artifact.stage, section, Path(artifact.manifest), **roles)
    except Exception as error:  # whatever ends a stage is its outcome
        return f"{artifact.stage}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
    return ""


def outcomes(name: str, folder: Path) -> tuple[dict[str, str], object]:
    """Column -> "works", "refused: REASON" (before any job starts) or "fails: STAGE: ERROR", for a model; and the
    plan of what is allowed. Artifacts are written into results/ of the working directory.

    folder: where models, rows and configs are written.
    """
    from posttrain.dag.artifacts import REPORT
    from posttrain.tools.export import export

    plan, refused = allowed(write_model(name, folder / "models" / name), write_rows(folder), folder / "config" / name)
    broken: dict[str, str] = {}
    for artifact in plan.artifacts():
        if artifact != REPORT and (reason := made_by(artifact, plan, broken)):
            broken[artifact.folder] = reason
    result = {column: f"refused: {reason}" for column, reason in refused.items()}
    for column in plan.names:
        ended = [broken[artifact.folder] for artifact in plan.of(column) if artifact.folder in broken]
        result[column] = f"fails: {ended[0]}" if ended else "works"
    for column in (column for column in EXPORTED if result[column] == "works"):
        policy = plan.artifact(column, column if column in ("dpo", "ppo") else "sft")
        try:
            export(Path(policy.manifest), folder / "exported" / name / column)
        except Exception as error:
            result[column] = f"fails: export: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
    return {column: result[column] for column in TRIED}, plan


def table(rows: dict[str, dict[str, str]]) -> str:
    """The outcomes of each model as a page: a table, and the reasons."""
    reasons: dict[str, int] = {}
    lines = [f"| model | {' | '.join(TRIED)} |", "|---|" + "---|" * len(TRIED)]
    for name, result in rows.items():
        cells = ["yes" if text == "works" else f"no [{number(text, reasons)}]" for text in result.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{place}. {reason}" for reason, place in reasons.items())]) + "\n"


def number(reason: str, reasons: dict[str, int]) -> int:
    """The number of a reason, counted in the order in which they come."""
    return reasons.setdefault(reason, len(reasons) + 1)

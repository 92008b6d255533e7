"""Valid campaigns, which together have most keys of the reference, and a folder with the files that they name."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# File -> its settings.
SCRATCH = """
config.yaml:
  title: Mutations
  experiments: [one, two]
  keep_gb: 5.0
  strict: false
  wandb: {mode: offline, project: mine}
experiments/one.yaml:
  question: Does it?
  seed: 1
  prepare:
    seed: 3
    world: {documents: 500, questions: 200, test_questions: 50, pairs: 80, long: {context: 64, factor: 4}}
    sft: [{path: sft.jsonl, format: messages, use: train}]
    preference: [{path: preference.jsonl, separator: ' '}]
    test_fraction: 0.2
    group_key: id
    tokenizer: {vocab_size: 400}
    chat_template: default
    date: '2024-07-26'
    max_tokens: 60
    long_rows: cut
    max_line_mb: 4.0
    allow_empty_user: true
  base:
    scratch:
      positions: rope
      hidden_size: 128
      layers: 2
      heads: 4
      intermediate_size: 128
      rope_theta: 100.0
      context: 64
      locality: 1.5
      optimizer: muon
      learned: 0.4
      learning_rate: 0.006
      schedule: cosine
      warmup_steps: 40
      beta2: 0.95
      steps: 500
      batch_size: 16
      micro_batch_size: 8
    dtype: float32
  sft:
    method: qlora
    rank: 8
    alpha: 16.0
    dropout: 0.1
    target_modules: [q_proj, k_proj]
    double_quantization: false
    compute: float32
    packing: true
    max_length: 60
    steps: 30
    warmup_steps: 3
    gradient_checkpointing: true
    log_steps: 5
  reward: {rank: 16, centering: 0.02, labels: chosen, steps: 20, warmup_steps: 2, target_modules: all-linear}
  reference: {batch_size: 32, precision: float32}
  ppo:
    rank: 8
    kl_target: 2.0
    kl_horizon: 5000
    kl_coefficient: 0.1
    minibatches: 2
    batch_size: 32
    steps: 20
    snapshot_steps: 4
    value_warmup: 1
    rails: {max_kl: 30.0, min_eos_rate: 0.2}
    prompts: preference
  dpo: {loss: [sigmoid, sft], loss_weights: [1.0, 0.5], beta: 0.2, steps: 15, warmup_steps: 1}
  kto: {rows: preference, loss: kto, desirable_weight: 1.5, steps: 15}
  longctx: {method: linear, factor: 4.0, tuning: lora, rank: 4, steps: 20, policy: base}
  evaluate: {tasks: [{task: world}, {task: passkey_64, shots: 2}], batch_size: auto, limit: 50}
  compare: {prompts: 40, max_new_tokens: 20, best_of: 4}
  lengths: {tokens: [32, 64], documents: 8, stride: 0.5}
experiments/two.yaml:
  question: And that?
  extends: one
  grid: {seed: [0, 1], dpo.beta: [0.1, 0.3]}
  sft: {rank: 4, warmup_steps: 2}
  ppo: {steps: 10}
  claims:
    closer:
      sentence: A larger beta keeps closer.
      paper: arXiv 2305.18290
      table: equation 3
      measured: {of: compare/dpo, value: answers kl_to_sft, slope: dpo.beta, cluster: prompt}
      expected: {at_most: -0.1, batches: {32: [0.1, 0.2]}, date: '2026-11-30', protocol: {shots: 0, items: 4}}
      tolerance: {value: 0.1, basis: algebra}
      control: {of: compare/sft}
      scope: training
      scale: toy
      family: dpo
    fewer:
      sentence: It trains less.
      paper: arXiv 2106.09685
      measured: {of: sft, value: summary.trainable_parameters, minus: {of: one/sft}, over: {of: base}}
      expected: {about: 0.1, spread: 0.1, version: 2, date: '2026-11-30'}
      tolerance: {basis: algebra}
      control: {of: base, minus: {of: one/base}}
"""
GIVEN = f"""
config.yaml:
  experiments: [given, small]
  grid: {{seed: [0, 1, 2]}}
experiments/given.yaml:
  question: Of a model that was made elsewhere?
  prepare:
    sft: [{{path: sft.jsonl}}, {{dataset: some/rows, revision: {COMMIT}, subset: main, rows: train}}]
    kto: [{{path: kto.jsonl, format: kto}}]
    choices: [{{path: choices.jsonl}}]
    test_fraction: 0.1
    chat_template: tokenizer
    end_of_turn: <end>
    conversations: split
  base: {{path: model}}
  sft: {{method: lora, target_modules: [q_proj], steps: 20, eval_steps: 5, checkpoint_steps: 5}}
  kto: {{steps: 10, undesirable_weight: 2.0}}
  evaluate:
    tasks:
      - {{task: choices}}
      - {{task: gsm8k, revision: {COMMIT}}}
      - {{task: mine, metrics: [bleu, rouge_l], generation: {{num_beams: 4, length_penalty: 0.9, max_gen_toks: 20}}}}
      - {{task: yours, generation: {{do_sample: true, temperature: 0.7, top_p: 0.9, no_repeat_ngram_size: 3}}}}
    task_files: [mine.yaml, yours.yaml]
    task_functions: ['score.py:score']
    batch_size: 8
    max_length: 64
    merge: true
experiments/small.yaml:
  question: Of its prefix?
  extends: given
  sft: {{method: prefix, virtual_tokens: 8}}
  kto: null
"""
HUB = f"""
config.yaml:
  experiments: [hub]
experiments/hub.yaml:
  prepare:
    preference: [{{path: preference.jsonl}}]
    sft: [{{path: sft.jsonl, use: split}}]
    tokenizer: {{hub: {{id: some/tokenizer, revision: {COMMIT}}}}}
  base: {{hub: {{id: some/model, revision: main, allow_floating: true}}}}
  sft: {{method: full, steps: 10, batch_size: 4, max_grad_norm: 0.5}}
  ppo: {{reward_function: 'score.py:score', steps: 8, value_warmup: 2, temperature: 0.7}}
site.yaml:
  partition: gpu
  gpu_memory_gb: 40.0
  modules: [cuda]
  max_runtime: 600
  jobs: 8
  cpu_only: false
  stages: {{sft: {{gpu: 4, nodes: 2, mem_mb: 8000, runtime: 60, shard: true}}}}
"""
SITUATIONS = [yaml.safe_load(text) for text in (SCRATCH, GIVEN, HUB)]

ROWS = {  # of the files that they name
    "sft": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "kto": {"prompt": "a", "completion": "b", "label": True},
    "choices": {"question": "a", "choices": ["b", "c"], "answer": 0},
}


@contextlib.contextmanager
def project(folder: Path) -> Iterator[Path]:
    """A working directory with the files that the situations name."""
    (folder / "folder").mkdir()
    (folder / "model").mkdir()
    for kind, row in ROWS.items():
        (folder / f"{kind}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "score.py").write_text("def score(prompt, reply, answer):\n    return 0.0\n")
    (folder / "model/config.json").write_text('{"model_type": "llama", "max_position_embeddings": 512}')
    (folder / "model/tokenizer.json").write_text("{}")
    (folder / "model/model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    task = "dataset_path: json\ndataset_kwargs: {data_files: {test: kto.jsonl}}\ntest_split: test\ndoc_to_target: b\n"
    for name, text in {"mine": "'{{question}}'", "yours": "!function score.score"}.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{task}doc_to_text: {text}\n")
    with contextlib.chdir(folder):
        yield folder

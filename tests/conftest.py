"""What the tests share: where real data may lie, and a tiny chain of artifacts that is made once."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[key] = "1"
os.environ.update(
    TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", DISABLE_MULTIPROC="1"
)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a real small model: `POSTTRAIN_SHARED`, or `shared` beside the project."""
    folder = Path(os.environ.get("POSTTRAIN_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data at {folder}: set POSTTRAIN_SHARED")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache of data sets that does not outlive the tests."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def home(tmp_path_factory, cache) -> Path:
    """A working directory for the tiny chain."""
    folder = tmp_path_factory.mktemp("chain")
    previous = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(previous)


def make(stage: str, section, output: Path, **inputs) -> Path:
    """Run a stage as the command line does, in this process; returns its manifest."""
    import importlib

    import torch

    from posttrain import artifact

    torch.set_num_threads(1)
    run = getattr(importlib.import_module(f"posttrain.stages.{stage}"), stage)
    artifact.make(stage, run, section, inputs, output)
    return output


@pytest.fixture(scope="session")
def data(home) -> Path:
    """A small prepared world."""
    from posttrain.config import Prepare, Tokenizer, World

    section = Prepare(
        world=World(documents=300, questions=160, test_questions=33, pairs=96),
        tokenizer=Tokenizer(vocab_size=512),
        max_tokens=128,
    )
    return make("prepare", section, Path("results/tiny/prepare/manifest.json"))


@pytest.fixture(scope="session")
def base(data) -> Path:
    """A base of one layer that has learned a little."""
    from posttrain.config import Base

    return make("base", Base(scratch=scratch()), Path("results/tiny/base/manifest.json"), data=data)


def scratch(**changes):
    """A base of one narrow layer, trained for a moment."""
    from posttrain.config import Scratch

    settings = dict(hidden_size=64, layers=1, heads=2, intermediate_size=64, steps=30, learned=0.99, warmup_steps=3,
                    log_steps=10, learning_rate=5e-3, seed=0, batch_size=8)  # fmt: skip
    return Scratch(**settings | changes)


def sft(**changes):
    """A short fine-tuning."""
    from posttrain.config import Sft

    settings = dict(steps=6, batch_size=4, log_steps=2, warmup_steps=1, checkpoint_steps=2, seed=0, max_length=128,
                    learning_rate=5e-3)  # fmt: skip
    return Sft(**settings | changes)


@pytest.fixture(scope="session")
def tuned_policy(data, base) -> Path:
    """A QLoRA policy, from which alignment begins."""
    return make("sft", sft(method="qlora", steps=20), Path("results/tiny/sft/manifest.json"), data=data, base=base)


@pytest.fixture(scope="session")
def rewarded(data, base, tuned_policy) -> Path:
    """A reward model that has learned a little."""
    output = Path("results/tiny/reward/manifest.json")
    return make("reward", reward(steps=40), output, data=data, base=base, sft=tuned_policy)


@pytest.fixture(scope="session")
def referenced(data, base, tuned_policy) -> Path:
    """Reference log-probabilities of the pairs."""
    from posttrain.config import Reference

    output = Path("results/tiny/reference/manifest.json")
    return make("reference", Reference(), output, data=data, base=base, sft=tuned_policy)


def reward(**changes):
    """A short reward model."""
    from posttrain.config import Reward

    settings = dict(steps=6, batch_size=8, log_steps=2, warmup_steps=1, checkpoint_steps=2, seed=0, max_length=128,
                    learning_rate=5e-3, target_modules="all-linear")  # fmt: skip
    return Reward(**settings | changes)


def dpo(**changes):
    """A short DPO."""
    from posttrain.config import Dpo

    settings = dict(steps=6, batch_size=4, log_steps=2, warmup_steps=1, checkpoint_steps=2, seed=0, max_length=128,
                    learning_rate=3e-4)  # fmt: skip
    return Dpo(**settings | changes)


def ppo(**changes):
    """A short PPO."""
    from posttrain.config import Ppo, Rails

    settings = dict(rails=Rails(min_eos_rate=0.0), steps=4, value_warmup=1,
                    batch_size=6, epochs=2, warmup_steps=0, checkpoint_steps=1, snapshot_steps=2, seed=0,
                    max_new_tokens=12, learning_rate=1e-3)  # fmt: skip
    return Ppo(**settings | changes)


def first_gradient(stage: str, section, **inputs):
    """The gradient of a trainer's first optimiser step, before it is clipped; the run ends there."""
    import torch

    kept, patch = [], pytest.MonkeyPatch()

    def keep(self, weights, *_):
        kept.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]))
        raise KeyboardInterrupt

    patch.setattr("accelerate.Accelerator.clip_grad_norm_", keep)
    with pytest.raises(KeyboardInterrupt):
        make(stage, section, Path(f"results/first-gradient-{stage}/{stage}/manifest.json"), **inputs)
    patch.undo()
    return kept[0]

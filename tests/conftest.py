"""What the tests share: where real data may lie, and a tiny chain of artifacts that is made once."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
from tiny import ROOT, make, reward, scratch, sft

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

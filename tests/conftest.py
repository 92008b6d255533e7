"""What the tests share: where real data may lie, and a tiny chain of artifacts that is made once."""

import contextlib
import fcntl
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
from tiny import READ_BY, ROOT, chain, make, trainers

for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[key] = "1"
os.environ.update(
    TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", DISABLE_MULTIPROC="1"
)
os.environ["OMP_NUM_THREADS"] = "1"  # xdist's processes share the cores; a stage sets its own number of threads

# Begun first, so that no core is idle at the end: each takes minutes, and is run by one process of xdist.
LONGEST = ("test_slurm.py", "test_workflow.py", "test_zoo.py", "test_dvc.py", "test_interruption.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def progress_name(monkeypatch):
    """The name on progress lines, which an attempt sets, as it is when a process starts."""
    from posttrain.ground import progress

    monkeypatch.setattr(progress, "name", "posttrain")


@pytest.fixture(autouse=True)
def limits_of_the_command_line():
    """What a command sets for its process, here that of all tests, ends with the test."""
    yield
    if parallel := sys.modules.get("posttrain.training.parallel"):
        parallel.fits, parallel.sharded = None, False


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
def common(tmp_path_factory) -> Path:
    """A folder of all processes of xdist: what several of them need is made there, by the first that does."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "common"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def home(tmp_path_factory, cache) -> Path:
    """A working directory for the tiny chain."""
    folder = tmp_path_factory.mktemp("chain")
    previous = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(previous)


def once(common: Path, stage: str, section, output: Path, **inputs: Path) -> Path:
    """An artifact in the working directory, copied from where it is made once; what it reads was made there before."""
    with open(common / f"{stage}-{output.parts[1]}.lock", "w") as lock, contextlib.chdir(common):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            make(stage, section, output, **inputs)
    shutil.copytree(common / output.parent, output.parent)
    return output


@pytest.fixture(scope="session")
def chained(home, common):
    """Gives an artifact of the tiny chain by its name in `tiny.chain`, and by what it reads."""

    def give(name: str, **inputs: Path) -> Path:
        stage, section, _ = chain()[name]
        folder = "long" if name.startswith("long") else "tiny"
        return once(common, stage, section, Path(f"results/{folder}/{stage}/manifest.json"), **inputs)

    return give


@pytest.fixture(scope="session")
def data(chained) -> Path:
    """A small prepared world."""
    return chained("data")


@pytest.fixture(scope="session")
def base(chained, data) -> Path:
    """A base of one layer that has learned a little."""
    return chained("base", data=data)


@pytest.fixture(scope="session")
def tuned_policy(chained, data, base) -> Path:
    """A QLoRA policy, from which alignment begins."""
    return chained("tuned_policy", data=data, base=base)


@pytest.fixture(scope="session")
def rewarded(chained, data, base, tuned_policy) -> Path:
    """A reward model that has learned a little."""
    return chained("rewarded", data=data, base=base, sft=tuned_policy)


@pytest.fixture(scope="session")
def referenced(chained, data, base, tuned_policy) -> Path:
    """Reference log-probabilities of the pairs."""
    return chained("referenced", data=data, base=base, sft=tuned_policy)


@pytest.fixture(scope="session")
def long_data(chained) -> Path:
    """A small world of long documents."""
    return chained("long_data")


@pytest.fixture(scope="session")
def long_base(chained, long_data) -> Path:
    """A base of that world."""
    return chained("long_base", data=long_data)


@pytest.fixture(scope="session")
def read_by(request) -> dict[str, dict[str, Path]]:
    """The inputs of every trainer."""
    return {
        stage: {role: request.getfixturevalue(name) for role, name in roles.items()} for stage, roles in READ_BY.items()
    }


@pytest.fixture(scope="session")
def uninterrupted(common, read_by) -> dict[str, Path]:
    """The artifact of every trainer's section in `tiny.trainers`, made in one go."""
    return {
        stage: once(common, stage, section, Path(f"results/uninterrupted/{stage}/manifest.json"), **read_by[stage])
        for stage, section in trainers().items()
    }

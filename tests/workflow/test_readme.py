"""What README says is there, is there."""

import re
import subprocess
import sys
import tomllib


def named(line: str) -> list[str]:
    """The files and folders that a line of README's tree names, before its words on them."""
    names = re.match(r"\s{0,2}((?:[\w./-]+ {1,2})+)\s", line + " ")
    return names.group(1).split() if names else []


def test_the_tree_names_what_is_there(root):
    """All of it exists, and no room of the package is left out; rooms stand in the order of the import contracts."""
    tree = (root / "README.md").read_text().split("<!-- tree -->")[1].split("```")[1]
    package, rooms = root / "workflow/posttrain", []
    for line in tree.strip().splitlines():
        for name in named(line):
            folder = package if line.startswith(" ") else root
            assert name.startswith("results") or (folder / name).exists(), f"README's tree names {name}"
            rooms += [name.rstrip("/")] if folder == package and name.endswith("/") else []
    layers = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    assert [*rooms, "__main__"] == layers[::-1]
    assert set(rooms) == {folder.parent.name for folder in package.glob("*/__init__.py")}
    assert named("workflow/Snakefile         contents page") == ["workflow/Snakefile"]
    assert named("dvc.yaml  .dvc/            DVC's ledger") == ["dvc.yaml", ".dvc/"]
    assert named("  maths/                   PPO, likelihoods") == ["maths/"]
    assert named("                           (ppo: snapshots/ too") == []


def test_the_commands_exist(root):
    text = (root / "README.md").read_text()
    targets = re.findall(r"^make (\w+)", text, re.M)
    assert {"run", "test"} <= set(targets)
    makefile = (root / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    for command in re.findall(r"^posttrain (\S+)", text, re.M):
        done = subprocess.run([sys.executable, "-m", "posttrain", command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, command


def test_versions_are_pinned_in_one_place(root):
    """Exactly, in the two lists of envs/ (`tests/unit/test_pins.py` says what stands in which) and nowhere else."""
    for name, least in (("requirements", 100), ("tests", 20)):
        lines = (root / f"envs/{name}.txt").read_text().splitlines()
        pins = [line for line in lines if line and not line.startswith(("#", "-r "))]
        assert len(pins) > least and all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    for other in ("envs/environment.yaml", "envs/posttrain.def"):
        text = (root / other).read_text()
        assert "requirements.txt" in text and not re.search(r"[a-z]==\d", text)
    assert "dependencies" not in (root / "pyproject.toml").read_text().split("[tool")[0].lower().replace(
        "# dependencies", ""
    )


def test_no_large_file_is_committed(root):
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True).stdout.split()
    assert all((root / name).stat().st_size < 5_000_000 for name in listed if (root / name).is_file())

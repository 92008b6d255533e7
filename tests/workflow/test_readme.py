"""What README says is there, is there."""

import re
import subprocess
import sys


def test_the_tree_names_what_is_there(root):
    tree = (root / "README.md").read_text().split("<!-- tree -->")[1].split("```")[1]
    folder = root
    for line in tree.strip().splitlines():
        first = line.split()[0]
        names = re.findall(r"[\w./-]+\.py|^[\w./-]+/?", line.strip()) if line.startswith(" ") else [first]
        for name in names:
            if name.startswith("results"):
                continue  # made by the first run
            place = root / "workflow/posttrain" / name if line.startswith(" ") else root / name
            assert place.exists() or (folder / name).exists(), f"README's tree names {name}"


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
    pins = [line for line in (root / "envs/requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert len(pins) > 100 and all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert "torch==2.13.0" in pins
    for other in ("envs/environment.yaml", "envs/posttrain.def"):
        text = (root / other).read_text()
        assert "requirements.txt" in text and not re.search(r"[a-z]==\d", text)
    assert "dependencies" not in (root / "pyproject.toml").read_text().split("[tool")[0].lower().replace(
        "# dependencies", ""
    )


def test_no_large_file_is_committed(root):
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True).stdout.split()
    assert all((root / name).stat().st_size < 5_000_000 for name in listed if (root / name).is_file())

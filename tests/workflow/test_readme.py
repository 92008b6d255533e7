"""What README and the pages say is there, is there."""

import re
import runpy
import subprocess
import tomllib

from posttrain import __main__
from posttrain.config.stages import STAGES


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
    assert named("                           (ppo, grpo: snapshots/ too") == []


def pages(root) -> dict[str, str]:
    """The text of every page by its place."""
    files = [*root.glob("*.md"), *root.glob("docs/*.md"), root / "config/README.md"]
    return {str(file.relative_to(root)): file.read_text() for file in files}


def test_the_pages_name_commands_that_exist(root):
    """As `posttrain COMMAND` or `make TARGET` at a line's beginning, or in backticks."""
    commands = set(__main__.parser()._subparsers._group_actions[0].choices)
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), re.M))
    for page, text in pages(root).items():
        named = set(re.findall(r"(?:^ {0,4}|`)posttrain ([a-z][a-z-]*)", text, re.M))
        assert named <= commands, f"{page}: {named - commands}"
        named = set(re.findall(r"(?:^ {0,4}|`)make ([a-z][a-z-]*)", text, re.M))
        assert named <= targets, f"{page}: {named - targets}"
    for number in ("run", "test"):
        assert f"\nmake {number} " in pages(root)["README.md"]


def test_every_command_has_a_line(root):
    text = (root / "docs/commands.md").read_text()
    commands = set(__main__.parser()._subparsers._group_actions[0].choices) - {*STAGES, "fetch"}
    assert [name for name in sorted(commands) if f"| `posttrain {name}" not in text] == []
    targets = re.findall(r"^([a-z][\w-]*):", (root / "Makefile").read_text(), re.M)
    assert [name for name in targets if f"`make {name}`" not in text] == []


def test_links_lead_somewhere(root):
    for page, text in pages(root).items():
        for link in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", text):
            assert (root / page).parent.joinpath("".join(link)).exists(), f"{page}: {''.join(link)}"
    assert len(re.findall(r"\]\(docs/", pages(root)["README.md"])) > 8, "control: links are found"


def test_the_picture_is_that_of_the_table(root):
    drawn = runpy.run_path(str(root / "docs/draw.py"))["picture"]()
    assert (root / "docs/stages.svg").read_text() == drawn, "run: python docs/draw.py"
    assert all(f">{stage}<" in drawn for stage in [*STAGES, "fetch", "report"])


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

"""Published files follow the umask and the group of their folder, and links in their way are replaced."""

import os
import stat

import pytest

from posttrain.ground import files
from posttrain.jobs.publishing import publish


def written(home):
    """A finished artifact beside its place, with a file that its owner alone may read, as safetensors writes it."""
    work = home / ".making-x"
    (work / "model").mkdir(parents=True)
    for name in ("manifest.json", "model/model.safetensors"):
        (work / name).write_text(name)
    (work / "model/model.safetensors").chmod(0o600)
    return work


def permissions(path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o002, "0o2775", "0o664"), (0o077, "0o2700", "0o600"),
                                                       (0o022, "0o2755", "0o644")])  # fmt: skip
def test_permissions_are_those_of_the_umask_and_the_group_that_of_the_folder(
    tmp_path, monkeypatch, umask, folder, file
):
    before = os.umask(umask)
    monkeypatch.setattr(files, "UMASK", umask)
    try:
        home, group = tmp_path / "home", os.getgid() if os.getuid() else 12345  # any, for root
        home.mkdir()
        os.chown(home, -1, group)
        home.chmod(0o2775)
        publish(written(home), home)
    finally:
        os.umask(before)
    assert permissions(home / "model") == folder
    assert permissions(home / "model/model.safetensors") == permissions(home / "manifest.json") == file
    assert {path.stat().st_gid for path in home.rglob("*")} == {group}


def test_a_file_with_another_name_keeps_its_permissions(tmp_path):
    """It is the same file as in DVC's cache, which protects it."""
    cached = tmp_path / "cached"
    cached.write_text("bytes")
    cached.chmod(0o444)
    work = written(tmp_path / "home")
    os.link(cached, work / "model/shared")
    publish(work, tmp_path / "home")
    assert permissions(cached) == permissions(tmp_path / "home/model/shared") == "0o444"
    assert permissions(tmp_path / "home/model/model.safetensors") != "0o600", "control"


def test_a_link_in_the_place_of_a_folder_is_replaced(tmp_path):
    """Someone moved `model/` to scratch and linked it back."""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    (scratch / "model").mkdir(parents=True)
    (scratch / "model/old").touch()
    home.mkdir()
    (home / "model").symlink_to(scratch / "model")
    publish(written(home), home)
    assert not (home / "model").is_symlink() and (home / "model/model.safetensors").is_file()
    assert (scratch / "model/old").is_file(), "what is linked to is not ours"


def test_the_whole_artifact_may_lie_behind_a_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "scratch")
    assert publish(written(tmp_path / "home"), tmp_path / "home") == ["manifest.json", "model"]
    assert (tmp_path / "scratch/model/model.safetensors").is_file()

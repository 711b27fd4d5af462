"""Writing data sets: atomic, described by a manifest, never overwriting other data unasked."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from hpo_plugin import files
from hpo_plugin.files import atomic_write, check_output, publish, sha256

FILES = {"train": b"one", "test": b"two"}
MANIFEST = {"parameters": {"seed": 0}}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_manifest_describes_the_files_next_to_it(tmp_path: Path) -> None:
    done = publish(tmp_path, FILES, MANIFEST)
    assert done.written == ("train", "test", "manifest.json")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["parameters"] == {"seed": 0}
    assert manifest["files"]["train"] == {"bytes": 3, "sha256": sha256(b"one")}
    assert names(tmp_path) == ["manifest.json", "test", "train"]


def test_identical_data_is_left_alone(tmp_path: Path) -> None:
    publish(tmp_path, FILES, MANIFEST)
    before = [(tmp_path / name).stat().st_mtime_ns for name in names(tmp_path)]
    done = publish(tmp_path, FILES, MANIFEST)
    assert done.written == ()
    assert [(tmp_path / name).stat().st_mtime_ns for name in names(tmp_path)] == before


def test_other_data_is_not_overwritten_unless_forced(tmp_path: Path) -> None:
    publish(tmp_path, FILES, MANIFEST)
    other = {"train": b"one", "test": b"changed"}
    with pytest.raises(FileExistsError, match="test would change"):
        publish(tmp_path, other, MANIFEST)
    assert (tmp_path / "test").read_bytes() == b"two"
    assert (tmp_path / "manifest.json").exists()
    assert publish(tmp_path, other, MANIFEST, force=True).written == ("test", "manifest.json")
    assert (tmp_path / "test").read_bytes() == b"changed"


def test_an_interrupted_publication_is_completed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.atomic_write

    def interrupted(path: Path, data: bytes) -> None:
        if path.name == "test":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(files, "atomic_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, FILES, MANIFEST)
    # Without a manifest nothing claims to be complete.
    assert names(tmp_path) == ["train"]
    monkeypatch.undo()
    assert publish(tmp_path, FILES, MANIFEST).written == ("test", "manifest.json")


def test_a_forced_replacement_that_is_interrupted_leaves_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, FILES, MANIFEST)

    def interrupted(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "atomic_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, {"train": b"new", "test": b"new"}, MANIFEST, force=True)
    assert names(tmp_path) == ["test", "train"]


def test_a_write_that_fails_leaves_the_old_content_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_files_have_the_permissions_of_any_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "atomic", b"")
    (tmp_path / "plain").write_bytes(b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("atomic", "plain")}
    assert len(modes) == 1


def test_other_parameters_are_refused_before_any_work_naming_the_difference(tmp_path: Path) -> None:
    publish(tmp_path, FILES, MANIFEST)
    check_output(tmp_path, {"seed": 0})
    with pytest.raises(FileExistsError, match="seed: found 0, requested 1"):
        check_output(tmp_path, {"seed": 1})
    check_output(tmp_path, {"seed": 1}, force=True)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"parameters": 3}'])
def test_a_foreign_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(FileExistsError, match="not a manifest of hpo-plugin"):
        check_output(tmp_path, {"seed": 0})


def test_an_unusable_directory_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        check_output(tmp_path / "file" / "data", {})


def test_force_removes_the_files_of_the_data_that_it_replaces_and_no_others(tmp_path: Path) -> None:
    publish(tmp_path, {"a": b"1", "old": b"2"}, {"parameters": {"x": 1}})
    (tmp_path / "mine").write_bytes(b"3")
    publish(tmp_path, {"a": b"4"}, {"parameters": {"x": 2}}, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "manifest.json", "mine"]


def test_force_removes_nothing_outside_of_the_directory(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"1")
    (tmp_path / "data").mkdir()
    manifest = {"parameters": {}, "files": {"../outside": {}, str(outside): {}}}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    publish(tmp_path / "data", {"a": b"1"}, {"parameters": {"x": 1}}, force=True)
    assert outside.exists()

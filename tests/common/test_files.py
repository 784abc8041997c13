"""A file or a directory is whole or not there at all, whatever ends its build."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.common.files import building, replace_file
from pipeline.common.paths import MANIFEST


def test_a_failed_build_leaves_the_old_artifact(tmp_path):
    """An error in the middle of a rebuild changes nothing and leaves no temporary data."""

    def write(build, content):
        (build / "a.bin").write_text(content)
        (build / MANIFEST).write_text(content)
        if content == "other":
            raise OSError("the disk is full")

    with building(tmp_path / "v") as build:
        write(build, "first")
    with pytest.raises(OSError, match="the disk is full"), building(tmp_path / "v") as build:
        write(build, "other")
    assert {path.name: path.read_text() for path in (tmp_path / "v").iterdir()} == {"a.bin": "first", MANIFEST: "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_a_killed_build_is_swept_or_resumed(tmp_path):
    """The next build removes what a killed build left behind, or receives it if it can continue."""
    (tmp_path / ".v.partial").mkdir()
    (tmp_path / ".v.partial/shard").touch()
    with building(tmp_path / "v", resume=True) as build:
        assert [path.name for path in build.iterdir()] == ["shard"]
        (build / MANIFEST).touch()
    (tmp_path / ".v.partial").mkdir()
    (tmp_path / ".v.partial/shard").touch()
    with building(tmp_path / "v") as build:
        assert list(build.iterdir()) == []
        (build / MANIFEST).touch()


@pytest.fixture
def scanner(monkeypatch):
    """How often Windows still refuses to rename a directory, in a list of one number, and the waits in between."""
    left, waits, rename = [0], [], Path.rename

    def refuse(path, target):
        if left[0]:
            left[0] -= 1
            raise PermissionError("a virus scanner has a file open")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr("time.sleep", waits.append)
    return left, waits


@pytest.mark.parametrize("refusals", [2, 5])
def test_a_virus_scanner_reads_what_was_built(scanner, tmp_path, refusals):
    """A build that Windows does not rename at first gets its name some tenths of a second later, or some seconds."""
    scanner[0][0] = refusals
    with building(tmp_path / "v") as build:
        (build / MANIFEST).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["v", MANIFEST]
    assert scanner == ([0], [0.1, 0.2, 0.4, 0.8, 1.6][:refusals])


def test_a_directory_that_stays_open(scanner, tmp_path):
    """When Windows still refuses after three seconds, the build fails and leaves nothing."""
    scanner[0][0] = 6
    with pytest.raises(PermissionError, match="a virus scanner has a file open"), building(tmp_path / "v") as build:
        (build / MANIFEST).touch()
    assert (list(tmp_path.iterdir()), scanner) == ([], ([0], [0.1, 0.2, 0.4, 0.8, 1.6]))


def test_a_flush_on_windows(tmp_path, monkeypatch):
    """Windows opens a file that it flushes in binary mode, so that it cuts no byte off, and opens no directory."""
    opened = []

    def open_(path, flags):
        opened.append((path.name, flags))
        return os.open(path, os.O_RDWR)

    windows = SimpleNamespace(name="nt", O_RDWR=2, O_BINARY=0x8000, open=open_, fsync=os.fsync, close=os.close)
    monkeypatch.setattr("pipeline.common.files.os", windows)
    replace_file(tmp_path / "x", "{}")
    assert opened == [(".x.partial", 0x8002)]


def test_a_new_folder(tmp_path):
    """A file's folders are made if they are not there."""
    replace_file(tmp_path / "a/b/x", "{}")
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["x"]


def test_line_endings(tmp_path, monkeypatch):
    """A file has the same encoding and line endings on every system."""
    written, write_text = [], Path.write_text

    def write(path, text, encoding, newline=None):
        written.append((encoding, newline))
        return write_text(path, text, encoding, newline=newline)

    monkeypatch.setattr(Path, "write_text", write)
    replace_file(tmp_path / "x", "{}")
    assert written == [("utf-8", "\n")]

"""A registry in a directory: what is particular to it."""

import errno
import io
import os
import shutil
import time
from pathlib import Path

import pytest

from pipeline.common.errors import PipelineError
from pipeline.common.files import digest
from pipeline.release.pull import verify_release
from pipeline.release.registry import directory, open_registry
from pipeline.release.registry.directory import DirectoryRegistry
from tests.release_project import NAME, build, publish_version, pull_latest

pytestmark = pytest.mark.usefixtures("release_folder")
HOUR = 3600  # seconds


@pytest.mark.parametrize(
    "ask",
    [
        DirectoryRegistry.entries,
        lambda registry: registry.resolve(NAME, "latest"),
        lambda registry: registry.read(NAME, "1.0.0"),
    ],
)
def test_a_directory_that_is_not_there(tmp_path, ask):
    """A misspelt path, or a share that is not mounted, is no empty registry."""
    with pytest.raises(PipelineError, match=f"^dir:{tmp_path}/modles is not there: is the share mounted"):
        ask(open_registry("dir:modles"))
    assert not Path("modles").exists()


@pytest.mark.parametrize(
    "ask",
    [
        lambda registry, release: registry.entries(),
        lambda registry, release: registry.resolve(NAME, "latest"),
        lambda registry, release: registry.read(NAME, "1.0.0"),
        lambda registry, release: list(registry.download(release, "LICENSE", offset=0)),
    ],
    ids=["entries", "resolve", "read", "download"],
)
def test_a_share_that_was_disconnected(ask, tmp_path, monkeypatch):
    """Whatever the system says of a share that no longer answers, reading from it is refused with one sentence."""
    release = publish_version()

    def fail(path, mode):
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(PipelineError) as refused:
        ask(open_registry("dir:registry"), release)
    assert str(refused.value) == (
        f"dir:{tmp_path}/registry cannot be read (Stale file handle): check its disk, or the connection to its share."
    )


def test_a_virus_scanner_reads_what_is_published(monkeypatch):
    """A version that Windows does not rename at first is published some tenths of a second later."""
    waits, rename = [], Path.rename

    def refuse(path, target):
        if len(waits) < 2:
            raise PermissionError("a virus scanner has a file open")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr("time.sleep", waits.append)
    release = publish_version()
    assert (open_registry("dir:registry").read(NAME, "1.0.0"), waits) == ((release.content(), None), [0.1, 0.2])


def test_a_folder_that_is_no_version():
    """A folder in the registry whose name is no version, such as a copy made by hand, is not listed."""
    publish_version()
    versions = Path("registry/releases", NAME)
    shutil.copytree(versions / "1.0.0", versions / "1.0.0-rc1")
    assert [entry.version for entry in open_registry("dir:registry").entries()] == ["1.0.0"]


@pytest.fixture
def left(release_folder):
    """A folder of the registry with two contents that were not written to their end, an hour ago and a day ago."""
    publish_version()
    contents = Path("registry/blobs/sha256/00")
    contents.mkdir(exist_ok=True)
    for name, hours in ((".put-dead", 25), (".put-live", 1)):
        (contents / name).write_bytes(b"a part")
        os.utime(contents / name, (time.time() - hours * HOUR,) * 2)
    return contents


def test_what_killed_publishers_left(left):
    """The next publication removes a file that nobody has written to for a day, and leaves one that may be written."""
    publish_version("1.0.1")
    assert [path.name for path in left.glob(".put-*")] == [".put-live"]


def test_a_file_that_cannot_be_removed(left, monkeypatch):
    """Another user's file that was left is no reason not to publish."""

    def refuse(path, missing_ok=False):
        raise PermissionError(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        DirectoryRegistry(Path("registry")).prepare(NAME)
    assert sorted(path.name for path in left.glob(".put-*")) == [".put-dead", ".put-live"]


def test_a_failed_upload_leaves_nothing(tmp_path):
    """When a content cannot be read to its end, its temporary file is removed."""

    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise OSError("the disk is broken")

    with pytest.raises(OSError, match="the disk is broken"):
        directory._put(tmp_path / "contents/x", Broken())
    assert list((tmp_path / "contents").iterdir()) == []


def test_publishing_again_repairs():
    """A content that was damaged in the registry is uploaded again by the next publication."""
    sha256 = publish_version().files["openvino_model.bin"].sha256
    Path("registry/blobs/sha256", sha256[:2], sha256).write_bytes(b"Weights")
    publish_version("1.0.1")
    verify_release(pull_latest(to=Path("model")))


def test_contents_are_stored_once():
    """Two releases with the same tokenizer store it once."""
    first = publish_version("1.0.0").files
    build(b"newer")
    second = publish_version("2.0.0").files
    stored = [path for path in Path("registry/blobs").rglob("*") if path.is_file()]
    assert {digest(path) for path in stored} == {*first.values(), *second.values()}
    assert len(stored) == len({*first.values(), *second.values()})

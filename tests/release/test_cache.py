"""The cache of pulled releases: contents are stored once, damage is repaired, and it serves without a network."""

import errno
from pathlib import Path

import pytest
from platformdirs.windows import Windows

from pipeline.common.errors import PipelineError
from pipeline.release import pull
from pipeline.release.pull import verify_release
from pipeline.release.registry import open_registry
from tests.release_project import NAME, build, exit_codes, publish_version, pull_latest

pytestmark = pytest.mark.usefixtures("release_folder")


def resolve_often():
    """Ask what an alias stands for again and again, as many pulls would."""
    for _ in range(50):
        pull._resolve(open_registry("dir:registry"), NAME, "latest")


def test_an_alias_resolved_at_once():
    """Processes that record what an alias stands for at the same time do not disturb each other."""
    publish_version()
    assert exit_codes(resolve_often, processes=4) == [0] * 4


def test_contents_are_shared():
    """Two releases with the same tokenizer store it once on the consumer's disk."""
    publish_version("1.0.0")
    first = pull_latest()
    build(b"newer")
    publish_version("2.0.0")
    second = pull_latest()
    assert first != second
    assert (first / "tokenizer.json").stat().st_ino == (second / "tokenizer.json").stat().st_ino


def test_the_cache(monkeypatch, tmp_path):
    """Without PHI3_CACHE the cache is this user's, on Windows with one folder for the project's name."""
    monkeypatch.delenv("PHI3_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pull.cache() == tmp_path / "phi3-pipeline"
    monkeypatch.setattr("platformdirs.windows.get_win_folder", {"CSIDL_LOCAL_APPDATA": "local"}.__getitem__)
    monkeypatch.setattr(pull, "user_cache_path", lambda *name, **options: Windows(*name, **options).user_cache_path)
    assert pull.cache() == Path("local/phi3-pipeline/Cache")


def test_the_place_in_the_cache(tmp_path):
    """Without `to` the directory is in the cache, and says name and version."""
    publish_version()
    directory = pull_latest()
    assert directory.is_relative_to(tmp_path / "cache/releases")
    assert directory.parts[-3:] == (*NAME.split("/"), "1.0.0")


def test_a_corrupt_file_in_the_cache():
    """A changed file in the cache is found before it is used, and downloaded again."""
    publish_version()
    file = pull_latest() / "openvino_model.bin"
    file.chmod(0o644)
    file.write_bytes(b"wEights")
    for directory in (pull_latest(to=Path("model")), pull_latest()):
        verify_release(directory)
        assert (directory / "openvino_model.bin").read_bytes() == b"weights"


def test_a_stray_file_in_the_cache():
    """A directory of the cache in which some program left a file is installed again."""
    publish_version()
    directory = pull_latest()
    (directory / "stray").touch()
    assert pull_latest() == directory
    verify_release(directory)


def test_offline(caplog):
    """When the registry is out of reach, what was pulled is still found by version and by alias, and verified."""
    publish_version()
    directory = pull_latest()
    Path("registry").rename("gone")
    assert pull_latest(version="1.0.0") == directory
    assert caplog.text == ""
    assert pull_latest() == directory
    assert "is not there: is the share mounted? Taking tiny/openvino-int4 latest as it was: 1.0.0." in caplog.text
    with pytest.raises(PipelineError, match="is not there"):
        pull_latest(version="stage")


def test_a_share_that_was_disconnected(tmp_path, monkeypatch, caplog):
    """When the share of a registry no longer answers, what was pulled is taken, too."""
    publish_version()
    directory = pull_latest()

    def fail(path):
        raise OSError(errno.EHOSTDOWN, "Host is down", path)

    monkeypatch.setattr("pipeline.release.registry.directory._small", fail)
    assert pull_latest() == directory
    assert caplog.messages == [
        f"dir:{tmp_path}/registry cannot be read (Host is down): check its disk, or the connection to its share. "
        f"Taking {NAME} latest as it was: 1.0.0."
    ]


def test_registries_do_not_mix():
    """The same name and version in another registry are a different release."""
    publish_version()
    first = pull_latest()
    build(b"another's")
    publish_version(registry=open_registry("dir:other"))
    second = pull.pull(open_registry("dir:other"), NAME)
    assert [(path / "openvino_model.bin").read_bytes() for path in (first, second)] == [b"weights", b"another's"]

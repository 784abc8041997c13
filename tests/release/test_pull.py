"""Pulling: every byte is checked, an interrupted pull continues, and nothing wrong is installed."""

import random
import re
import shutil
import sys
from pathlib import Path

import pytest

from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.common.files import digest
from pipeline.common.manifest import read_manifest, seal
from pipeline.release import publish, pull
from pipeline.release.pull import verify_release
from pipeline.release.registry import open_registry
from pipeline.release.registry.directory import DirectoryRegistry
from tests.helpers import ROOT, edit, phi3, run
from tests.release_project import MODEL, NAME, VARIANT, build, exit_codes, publish_version, pull_latest, quiet

pytestmark = pytest.mark.usefixtures("release_folder")


def test_two_pulls_at_once():
    """Pulls of the same release at the same time all succeed, and fetch each content once."""
    publish_version()
    assert exit_codes(pull_latest, processes=4) == [0] * 4
    verify_release(pull_latest())


class Recorded(DirectoryRegistry):
    """A registry that records path and offset of each download; with `cut` the first one of the weights has 3 bytes."""

    def __init__(self, *, cut=False):
        super().__init__(Path("registry"))
        self.asked, self._cut = [], cut

    def download(self, release, path, *, offset):
        self.asked.append((path, offset))
        for chunk in super().download(release, path, offset=offset):
            if self._cut and path == "openvino_model.bin" and not offset:
                yield chunk[:3]
                raise OSError("the network is down")
            yield chunk

    def offsets(self):
        """Return the bytes from which on the weights were asked for."""
        return [offset for path, offset in self.asked if path == "openvino_model.bin"]


def test_a_pull_continues():
    """An interrupted download continues at the byte where it stopped."""
    publish_version()
    registry = Recorded(cut=True)
    with pytest.raises(OSError, match="the network is down"):
        pull.pull(registry, NAME, to=Path("model"))
    assert not Path("model").exists()
    pull.pull(registry, NAME, to=Path("model"))
    assert registry.offsets() == [0, 3]
    verify_release(Path("model"))


def test_what_a_killed_pull_left():
    """What a killed pull had put together is removed by the next one."""
    publish_version()
    Path(".model.partial").mkdir()
    Path(".model.partial/stray").touch()
    pull_latest(to=Path("model"))
    verify_release(Path("model"))
    assert not Path(".model.partial").exists()


def test_progress():
    """The caller is told, after each piece, how many bytes of all files are there, and which file is coming."""
    release = publish_version()
    told = []
    pull.pull(open_registry("dir:registry"), NAME, to=Path("model"), progress=lambda *figures: told.append(figures))
    done, expected = 0, []
    for path, file in release.files.items():
        done += file.size
        expected.append((done, release.size, path))
    assert told == expected


@pytest.mark.parametrize(
    ("left", "offsets", "needed"), [(b"weights", [], 0), (b"weights and more", [0], 7), (b"wei", [3], 4)]
)
def test_what_an_interrupted_pull_left(left, offsets, needed, monkeypatch):
    """A complete content is not asked for again, a part is continued, and what is too long is fetched anew.

    Only what is missing must have room.
    """
    sha256 = publish_version().files["openvino_model.bin"].sha256
    part = pull.cache() / "blobs" / sha256[:2] / f".{sha256}.partial"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    room, registry = [], Recorded()
    monkeypatch.setattr(pull, "_require_space", lambda directory, needed: room.append((directory, needed)))
    pull.pull(registry, NAME, to=Path("model"))
    assert registry.offsets() == offsets
    assert (part.parent, needed) in room
    assert Path("model/openvino_model.bin").read_bytes() == b"weights"


@pytest.mark.parametrize("name", ["tiny", "tiny/", "/openvino-int4", "tiny/../x", "../x/openvino-int4", "tiny/a/b"])
def test_a_name_that_is_none(name):
    """A name is a model and a variant, so it never leads out of the cache."""
    with pytest.raises(PipelineError, match=f"^'{re.escape(name)}' is no name: give MODEL/VARIANT"):
        pull.pull(open_registry("dir:registry"), name)


def test_a_version_that_is_not_there():
    """A version that was not published is named, with the command that lists the others."""
    publish_version()
    with pytest.raises(PipelineError, match=r"registry has no tiny/openvino-int4 2\.0\.0: see `phi3 list dir:"):
        pull_latest(version="2.0.0")


def test_another_version_is_installed():
    """A directory with another version is left as it is, with the remedy."""
    publish_version("1.0.0")
    pull_latest(to=Path("model"))
    publish_version("1.1.0")
    sentence = f"model has {NAME} 1.0.0, not {NAME} 1.1.0: remove it or give another directory."
    with pytest.raises(PipelineError, match=f"^{re.escape(sentence)}$"):
        pull_latest(to=Path("model"))
    assert verify_release(Path("model")).version == "1.0.0"


def test_another_version_was_installed_meanwhile(monkeypatch):
    """What another process installs in the same place at the same time must be the same release."""
    publish_version("1.0.0")
    pull_latest(to=Path("first"))
    publish_version("1.1.0")
    read = DirectoryRegistry.read

    def read_slowly(registry, name, version):
        shutil.copytree("first", "model")
        return read(registry, name, version)

    monkeypatch.setattr(DirectoryRegistry, "read", read_slowly)
    with pytest.raises(PipelineError, match=f"^model has {NAME} 1.0.0, not {NAME} 1.1.0: remove it or give another"):
        pull_latest(to=Path("model"))


@pytest.fixture
def suggest(release_folder, monkeypatch):
    """A function that suggests a release for the CPU, and the list of what it says."""
    monkeypatch.setattr("pipeline.release.device.missing", lambda release: [])
    publish_version()
    registry, said = open_registry("dir:registry"), []

    def suggest(model, version="latest"):
        return pull.suggest(registry, model, version=version, target="cpu", say=said.append)

    suggest.said = said
    return suggest


@pytest.mark.parametrize("model", ["tiny", ""])
def test_suggest(suggest, model):
    """The variant for a device is chosen among the releases of one model, and the choice is explained."""
    assert suggest(model) == NAME
    assert suggest.said == [f"{NAME}: asked for"]


@pytest.mark.parametrize(
    ("model", "version", "what"), [("other", "latest", "other latest"), ("", "stage", "release stage")]
)
def test_nothing_to_suggest(suggest, model, version, what):
    """What the registry lacks is named, with the command that lists the others."""
    with pytest.raises(PipelineError, match=f"registry has no {what}: see `phi3 list dir:"):
        suggest(model, version)


def test_suggest_among_models(suggest):
    """A registry with several models wants the name of one."""
    shutil.copytree("artifacts/tiny", "artifacts/tinier")
    manifest = read_manifest(paths.variant("tinier", VARIANT))
    (paths.variant("tinier", VARIANT) / "manifest.json").unlink()
    seal(
        paths.variant("tinier", VARIANT),
        manifest.model_copy(update={"name": f"tinier/{VARIANT}", "model": "tinier"}),
    )
    before, after = (digest(paths.variant(model, VARIANT) / "manifest.json").sha256 for model in (MODEL, "tinier"))
    edit(paths.validation("tinier", VARIANT), before, after)
    registry = open_registry("dir:registry")
    publish.publish("tinier", VARIANT, registry=registry, version="1.0.0", aliases=("latest",), progress=quiet)
    assert suggest("tiny") == NAME
    with pytest.raises(PipelineError, match="registry has tinier, tiny: name the one you want"):
        suggest("")


def test_a_download_without_an_end():
    """A download ends as soon as it is longer than release.json says, and nothing is installed."""
    publish_version()
    sent = []

    class Endless(DirectoryRegistry):
        def download(self, release, path, *, offset):
            while len(sent) < 1000:
                sent.append(path)
                yield b"x"

    with pytest.raises(PipelineError, match=r"gave other bytes for LICENSE than release\.json says"):
        pull.pull(Endless(Path("registry")), NAME, to=Path("model"))
    assert len(sent) == len("MIT") + 1
    assert not Path("model").exists()


def test_a_damaged_copy_stays():
    """A pulled directory that is not in the cache is never removed, whatever was done to it."""
    publish_version()
    pull_latest(to=Path("model"))
    Path("model/mine").touch()
    with pytest.raises(PipelineError, match=r"^model: mine is not listed\. Remove it and pull it again\.$"):
        pull_latest(to=Path("model"))
    assert Path("model/mine").exists()


def test_what_is_no_longer_the_release():
    """Anything additional, missing, changed or replaced by a link in a pulled directory is found."""
    publish_version()
    directory = pull_latest(to=Path("model"))
    (directory / "extra").write_text("x")
    (directory / "README.md").unlink()
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").symlink_to("LICENSE")
    with pytest.raises(PipelineError) as refused:
        verify_release(directory)
    assert str(refused.value) == (
        "model: README.md is missing; extra is not listed; tokenizer.json has changed. Remove it and pull it again."
    )


def test_nothing_is_left_beside_the_target():
    """Beside the directory that the user names there is nothing after a pull, such as a lock."""
    publish_version()
    pull_latest(to=Path("x/model"))
    assert list(Path("x").iterdir()) == [Path("x/model")]


def test_what_finder_and_explorer_leave():
    """What the file managers leave in a pulled directory does no harm; a release that lists such a file never passes,
    since it would not be hashed."""
    release = publish_version()
    directory = pull_latest(to=Path("model"))
    for name in (".DS_Store", "._README.md"):
        (directory / name).write_text("x")
    assert verify_release(pull_latest(to=directory)) == release
    files = release.files | {".DS_Store": digest(directory / ".DS_Store")}
    (directory / "release.json").write_bytes(release.model_copy(update={"files": files}).content())
    with pytest.raises(PipelineError, match=r"^model: \.DS_Store is missing\. Remove it and pull it again\.$"):
        verify_release(directory)


def test_a_target_that_is_taken(tmp_path):
    """A directory with other files in it is left as it is."""
    publish_version()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    with pytest.raises(PipelineError, match="mine is not empty: give another directory"):
        pull_latest(to=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


def test_an_empty_target():
    """An empty directory is taken."""
    publish_version()
    Path("model").mkdir()
    verify_release(pull_latest(to=Path("model")))


@pytest.fixture
def small_disk(tmp_path, mount):
    """A file system of one megabyte."""
    return mount(tmp_path / "disk", 1.05)


def test_too_little_space(small_disk, monkeypatch):
    """A disk that is too small is an error with figures, before anything is downloaded."""
    build(bytes(2 << 20))
    publish_version()
    monkeypatch.setenv("PHI3_CACHE", str(small_disk / "cache"))
    with pytest.raises(
        PipelineError, match=r"has 0\.0 GB free, 0\.0 GB are needed: free some space, or set PHI3_CACHE"
    ):
        pull_latest(to=Path("model"))
    assert not Path("model").exists()


FILL = """
from pathlib import Path
from pipeline.release import pull
from pipeline.cli import main
def fill(directory, needed):
    Path("disk/filler").write_bytes(bytes(500_000))  # another program's, after the space was checked
    pull._require_space = lambda directory, needed: None
pull._require_space = fill
main()
"""


def test_a_full_disk(small_disk, tmp_path):
    """A disk that fills up during a pull ends it with one sentence, and nothing is installed; once there is space the
    next run continues."""
    build(random.Random(0).randbytes(700_000))
    publish_version()
    cache = {"PHI3_CACHE": str(small_disk / "cache")}
    command = ("pull", "dir:registry", NAME, "--to", "disk/model")
    refused = run(sys.executable, "-c", FILL, *command, cwd=tmp_path, check=False, PYTHONPATH=str(ROOT), **cache)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("Error: the disk is full (")
    assert not (small_disk / "model").exists()
    (small_disk / "filler").unlink()
    phi3(*command, **cache)
    verify_release(small_disk / "model")


def test_a_full_disk_of_the_registry(small_disk):
    """A disk that fills up during a publication ends it with one sentence, and no version is visible."""
    build(random.Random(0).randbytes(1_200_000))
    refused = phi3("publish", NAME, "--to", f"dir:{small_disk}/registry", "--version", "1.0.0", check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: the disk is full (")
    assert open_registry(f"dir:{small_disk}/registry").entries() == []

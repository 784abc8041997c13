"""Pulling: every byte is checked, hostile releases are refused, and nothing wrong is installed."""

import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.common.manifest import digest, read_manifest, seal
from pipeline.release import publish, pull
from pipeline.release.pull import check
from pipeline.release.registry import open_registry
from pipeline.release.registry.directory import DirectoryRegistry
from pipeline.release.release import MAX_RELEASE, RELEASE, read_release, unsafe
from tests.helpers import ROOT, edit, phi3, run
from tests.release_project import MODEL, NAME, VARIANT, build, exit_codes, publish_version, pull_latest, quiet

pytestmark = pytest.mark.usefixtures("release_folder")


def test_two_pulls_at_once():
    """Pulls of the same release at the same time all succeed, and fetch each content once."""
    publish_version()
    assert exit_codes(pull_latest, processes=4) == [0] * 4
    check(pull_latest())


def resolve_often():
    """Ask what an alias stands for again and again, as many pulls would."""
    for _ in range(50):
        pull._resolve(open_registry("dir:registry"), NAME, "latest")


def test_an_alias_resolved_at_once():
    """Processes that record what an alias stands for at the same time do not disturb each other."""
    publish_version()
    assert exit_codes(resolve_often, processes=4) == [0] * 4


def test_contents_are_shared():
    """Two releases with the same tokenizer store it once, in the registry and on the consumer's disk."""
    publish_version("1.0.0")
    first = pull_latest()
    build(b"newer")
    publish_version("2.0.0")
    second = pull_latest()
    assert first != second
    assert (first / "tokenizer.json").stat().st_ino == (second / "tokenizer.json").stat().st_ino


def test_foundry_registers_onnx_models_only():
    """The registration with Foundry Local is not printed for a model that it cannot run."""
    publish_version()
    result = phi3("pull", "dir:registry", NAME, "--for", "foundry", "--to", "model")
    assert (result.stdout, result.stderr, result.returncode) == ("model\n", "", 0)


def test_a_pull_continues():
    """An interrupted download continues at the byte where it stopped."""
    publish_version()
    offsets = []

    class Cut(DirectoryRegistry):
        def download(self, release, path, *, offset):
            offsets.append((path, offset))
            for chunk in super().download(release, path, offset=offset):
                if path == "openvino_model.bin" and not offset:
                    yield chunk[:3]
                    raise OSError("the network is down")
                yield chunk

    registry = Cut(Path("registry"))
    with pytest.raises(OSError, match="the network is down"):
        pull.pull(registry, NAME, version="latest", to=Path("model"), progress=quiet)
    assert not Path("model").exists()
    pull.pull(registry, NAME, version="latest", to=Path("model"), progress=quiet)
    assert [offset for path, offset in offsets if path == "openvino_model.bin"] == [0, 3]
    check(Path("model"))


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


@pytest.mark.parametrize(("left", "offset"), [(b"weights", None), (b"weights and more", 0), (b"wei", 3)])
def test_what_an_interrupted_pull_left(left, offset, monkeypatch):
    """A complete content is not fetched again, a part is continued, and what is too long is fetched anew. Only what is
    missing must have room."""
    publish_version()
    offsets, room = [], []

    class Recorded(DirectoryRegistry):
        def download(self, release, path, *, offset):
            offsets.append((path, offset))
            return super().download(release, path, offset=offset)

    sha256 = digest(paths.variant(MODEL, VARIANT) / "openvino_model.bin").sha256
    part = pull.cache() / "blobs" / sha256[:2] / f".{sha256}.partial"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    monkeypatch.setattr(pull, "_require_space", lambda directory, needed: room.append((directory, needed)))
    pull.pull(Recorded(Path("registry")), NAME, to=Path("model"), progress=quiet)
    assert [found for path, found in offsets if path == "openvino_model.bin"] == [7 if offset is None else offset]
    assert (part.parent, 7 - (7 if offset is None else offset)) in room
    assert Path("model/openvino_model.bin").read_bytes() == b"weights"


def test_the_cache(monkeypatch):
    """Without PHI3_CACHE the cache is this user's."""
    monkeypatch.delenv("PHI3_CACHE")
    assert pull.cache() == user_cache_path("phi3-pipeline")


@pytest.mark.parametrize("name", ["tiny", "tiny/", "/openvino-int4", "tiny/../x", "../x/openvino-int4", "tiny/a/b"])
def test_a_name_that_is_none(name):
    """A name is a model and a variant, so it never leads out of the cache."""
    with pytest.raises(PipelineError, match=f"^'{re.escape(name)}' is no name: give MODEL/VARIANT"):
        pull.pull(open_registry("dir:registry"), name)


def test_another_version_was_installed_meanwhile(monkeypatch):
    """What another process installs in the same place at the same time must be the same release."""
    publish_version("1.0.0")
    pull_latest(to=Path("first"))
    publish_version("1.1.0")
    read = DirectoryRegistry.read

    def read_slowly(registry, name, version):
        if not Path("model").exists():
            shutil.copytree("first", "model")
        return read(registry, name, version)

    monkeypatch.setattr(DirectoryRegistry, "read", read_slowly)
    refused = f"^model has {NAME} 1.0.0, not {NAME} 1.1.0: it is refused"
    for _ in range(2):
        with pytest.raises(PipelineError, match=refused):
            pull_latest(to=Path("model"))


def test_suggest(monkeypatch):
    """The variant for a device is chosen among the releases of one model, and the choice is explained."""
    monkeypatch.setattr("pipeline.release.device.missing", lambda release: [])
    publish_version()
    registry, said = open_registry("dir:registry"), []

    def suggest(model, version="latest"):
        return pull.suggest(registry, model, version=version, target="cpu", say=said.append)

    assert [suggest("tiny"), suggest("")] == [NAME, NAME]
    assert said == [f"{NAME}: asked for"] * 2
    with pytest.raises(PipelineError, match="registry has no other latest: see `phi3 list dir:"):
        suggest("other")
    with pytest.raises(PipelineError, match="registry has no release stage: see `phi3 list dir:"):
        suggest("", "stage")
    shutil.copytree("artifacts/tiny", "artifacts/tinier")
    manifest = read_manifest(paths.variant("tinier", VARIANT))
    changed = manifest.model_copy(update={"name": f"tinier/{VARIANT}", "model": "tinier"})
    (paths.variant("tinier", VARIANT) / "manifest.json").unlink()
    seal(paths.variant("tinier", VARIANT), changed)
    sha256 = digest(paths.variant("tinier", VARIANT) / "manifest.json").sha256
    edit(paths.validation("tinier", VARIANT), digest(paths.variant(MODEL, VARIANT) / "manifest.json").sha256, sha256)
    publish.publish("tinier", VARIANT, registry=registry, version="1.0.0", aliases=("latest",), progress=quiet)
    assert suggest("tiny") == NAME
    with pytest.raises(PipelineError, match="registry has tinier, tiny: name the one you want"):
        suggest("")


def blob_of(path):
    """Return the registry's file with the content of `path`, a file of the artifact."""
    sha256 = digest(paths.variant(MODEL, VARIANT) / path).sha256
    return Path("registry/blobs/sha256") / sha256[:2] / sha256


@pytest.mark.parametrize("content", [b"Weights", b"weights and more", b""])
def test_a_corrupt_content_in_the_registry(content):
    """Bytes that differ from release.json are refused, nothing is installed, and publishing again repairs them."""
    publish_version()
    blob_of("openvino_model.bin").write_bytes(content)
    with pytest.raises(PipelineError, match=r"gave other bytes for openvino_model\.bin than release\.json says"):
        pull_latest(to=Path("model"))
    assert not Path("model").exists()
    publish_version("1.0.1")
    check(pull_latest(to=Path("model")))


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
        pull.pull(Endless(Path("registry")), NAME, to=Path("model"), progress=quiet)
    assert len(sent) == len("MIT") + 1
    assert not Path("model").exists()


def test_a_corrupt_file_in_the_cache():
    """A changed file in the cache is found before it is used, and downloaded again."""
    publish_version()
    directory = pull_latest()
    (directory / "openvino_model.bin").chmod(0o644)
    (directory / "openvino_model.bin").write_bytes(b"wEights")
    with pytest.raises(PipelineError, match=r"openvino_model\.bin has changed\. Remove it and pull it again"):
        pull_latest()
    check(pull_latest(to=Path("model")))


def test_what_is_no_longer_the_release():
    """Anything additional, missing, changed or replaced by a link in a pulled directory is found."""
    publish_version()
    directory = pull_latest(to=Path("model"))
    (directory / "extra").write_text("x")
    (directory / "README.md").unlink()
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").symlink_to("LICENSE")
    with pytest.raises(PipelineError) as refused:
        check(directory)
    assert str(refused.value) == (
        "model: README.md is missing; extra is not listed; tokenizer.json has changed. Remove it and pull it again."
    )


def hostile(**changes):
    """Publish a release.json with `changes`, as a hostile registry would; return the refusal of a pull."""
    release = publish_version()
    content = json.loads(release.content()) | changes
    Path("registry/releases", NAME, "1.0.0", RELEASE).write_text(json.dumps(content))
    with pytest.raises(PipelineError) as refused:
        pull_latest(to=Path("model"))
    assert not Path("model").exists()
    return str(refused.value)


LONG, OUT = "is empty, long or absolute", "leaves the directory"
CHARACTER, DEVICE = "has a character that file names must not have", "is a name that Windows treats specially"
OWN = "is the release's own"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", LONG),
        ("/etc/x", LONG),
        ("x" * 201, LONG),
        ("\u00e9" * 101, LONG),
        ("../x", OUT),
        ("a/../../x", OUT),
        ("a/./x", OUT),
        ("a//x", OUT),
        ("C:/x", CHARACTER),
        ("a\\x", CHARACTER),
        ("x\n", CHARACTER),
        ("x\x7f", CHARACTER),
        ("x\x1f", CHARACTER),
        ("nul", DEVICE),
        ("com1.txt", DEVICE),
        ("CONIN$", DEVICE),
        ("lpt\u00b2", DEVICE),
        ("x.", DEVICE),
        ("x ", DEVICE),
        ("release.json", OWN),
        ("Release.JSON", OWN),
        ("release.json/x", OWN),
        ("release.sig", OWN),
    ],
)
def test_hostile_paths(path, reason):
    """A path that leaves the directory, or that an operating system treats specially, is refused before any write."""
    assert unsafe(path) == reason
    file = {"size": 1, "sha256": "0" * 64}
    assert f"release.json is refused (files: the path {path!r} {reason})"[:99] in hostile(files={path: file})


@pytest.mark.parametrize("path", ["x" * 200, "\u00e9" * 100, "a.b/c d/X", "blobs/4000/x.blob", "X", "a/release.json"])
def test_harmless_paths(path):
    """Other paths are taken, up to 200 bytes long."""
    assert unsafe(path) is None


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (["a", "A"], "two paths differ in upper and lower case or in the form of their letters only"),
        (["\u00e9", "e\u0301"], "two paths differ in upper and lower case or in the form of their letters only"),
        (["a", "A/b/c"], "'a' is a file and a folder"),
        (["a/b", "a/b/c"], "'a/b' is a file and a folder"),
    ],
)
def test_paths_that_are_one_on_some_system(paths, reason):
    """Paths that some system takes for the same file, or for a file and a folder, are refused together."""
    file = {"size": 1, "sha256": "0" * 64}
    assert f"release.json is refused (files: {reason})" in hostile(files=dict.fromkeys(paths, file))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "0.9.0"}, "has tiny/openvino-int4 0.9.0, not tiny/openvino-int4 1.0.0"),
        ({"variant": "openvino-fp16"}, "has tiny/openvino-fp16 1.0.0, not tiny/openvino-int4 1.0.0"),
        ({"schema_version": 2}, "is of another schema; install the phi3-pipeline that published it"),
        ({"files": {}}, "release.json is refused (files: "),
        ({"files": {"x": {"size": 10**13, "sha256": "0" * 64}}}, "the files have 10000 GB"),
        (
            {"files": {"a": {"size": 1, "sha256": "0" * 64}, "A": {"size": 1, "sha256": "0" * 64}}},
            "differ in upper and",
        ),
        ({"surprise": 1}, "release.json is refused (surprise: Extra inputs are not permitted)"),
    ],
)
def test_hostile_releases(changes, reason):
    """An older version under a newer name, another variant or schema, absurd sizes and unknown keys are refused."""
    assert reason in hostile(**changes)


def test_content_that_is_not_json():
    """Rubbish, deep nesting and sheer size end with one sentence."""
    for content in (b"\xff", b"[" * 100_000, b" " * 2_000_000):
        with pytest.raises(PipelineError, match=r"^here: release\.json is "):
            read_release(content, origin="here")
    content = publish_version().content()
    assert read_release(content + b" " * (MAX_RELEASE - len(content)), origin="here").version == "1.0.0"
    with pytest.raises(PipelineError, match=r"^here: release\.json is larger than a megabyte"):
        read_release(content + b" " * (MAX_RELEASE + 1 - len(content)), origin="here")
    newer = content.replace(b'"schema_version": 1', b'"schema_version": 2')
    with pytest.raises(PipelineError) as refused:
        read_release(newer, origin="here")
    why = "is of another schema; install the phi3-pipeline that published it"
    assert str(refused.value) == f"here: release.json is refused (schema_version: {why})."


def test_a_target_that_is_taken(tmp_path):
    """A directory with other files in it is left as it is."""
    publish_version()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    with pytest.raises(PipelineError, match="mine is not empty: give another directory"):
        pull_latest(to=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


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


def test_a_full_disk(small_disk, tmp_path):
    """A disk that fills up during a pull or a publication ends it with one sentence, and nothing is installed or
    visible; once there is space the next run continues."""
    build(random.Random(0).randbytes(700_000))
    publish_version()
    cache = {"PHI3_CACHE": str(small_disk / "cache")}
    program = """
from pathlib import Path
from pipeline.release import pull
from pipeline.cli import main
def fill(directory, needed):
    Path("disk/filler").write_bytes(bytes(500_000))  # another program's, after the space was checked
    pull._require_space = lambda directory, needed: None
pull._require_space = fill
main()
"""
    command = ("pull", "dir:registry", NAME, "--to", "disk/model")
    refused = run(sys.executable, "-c", program, *command, cwd=tmp_path, check=False, PYTHONPATH=str(ROOT), **cache)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("Error: the disk is full (")
    assert not (small_disk / "model").exists()
    (small_disk / "filler").unlink()
    phi3(*command, **cache)
    check(small_disk / "model")

    publish = ("publish", NAME, "--to", f"dir:{small_disk}/registry", "--version", "1.0.0")
    refused = phi3(*publish, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: the disk is full (")
    assert open_registry(f"dir:{small_disk}/registry").entries() == []


@pytest.mark.parametrize("kind", ["link", "device", "pipe", "directory"])
@pytest.mark.parametrize("part", ["content", "release", "alias"])
def test_what_is_no_plain_file(part, kind):
    """Links, devices, pipes and directories in the place of a registry's files are refused without being read."""
    publish_version()
    releases = Path("registry/releases", NAME)
    path = {
        "content": blob_of("openvino_model.bin"),
        "release": releases / "1.0.0" / RELEASE,
        "alias": releases / "aliases/latest",
    }[part]
    path.rename("moved")
    if kind == "link":
        path.symlink_to(Path("moved").absolute())
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    refusal = "is missing, or no plain file" if part == "content" else f"has no {NAME} latest"
    with pytest.raises(PipelineError, match=refusal):
        pull_latest(to=Path("model"))
    assert not Path("model").exists()


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


def test_registries_do_not_mix():
    """The same name and version in another registry are a different release."""
    publish_version()
    first = pull_latest()
    build(b"another's")
    publish_version(registry=open_registry("dir:other"))
    second = pull.pull(open_registry("dir:other"), NAME, progress=quiet)
    assert [(path / "openvino_model.bin").read_bytes() for path in (first, second)] == [b"weights", b"another's"]

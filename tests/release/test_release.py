"""A release.json from a hostile registry is refused before anything is written."""

import os
from pathlib import Path

import pytest

from pipeline.common.errors import PipelineError
from pipeline.release.release import MAX_RELEASE, RELEASE, read_release, unsafe
from tests.helpers import edit_json
from tests.release_project import NAME, publish_version, pull_latest

pytestmark = pytest.mark.usefixtures("release_folder")
RELEASES = Path("registry/releases", NAME)
FILE = {"size": 1, "sha256": "0" * 64}


def hostile(**changes):
    """Publish a release.json with `changes`, as a hostile registry would; return the refusal of a pull."""
    publish_version()
    edit_json(RELEASES / "1.0.0" / RELEASE, **changes)
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
    """A path that leaves the directory, or that an operating system treats specially, is unsafe."""
    assert unsafe(path) == reason


@pytest.mark.parametrize(
    ("path", "reason"), [("/etc/x", LONG), ("../x", OUT), ("C:/x", CHARACTER), ("nul", DEVICE), ("release.sig", OWN)]
)
def test_a_release_with_a_hostile_path(path, reason):
    """A release with an unsafe path is refused before any write."""
    assert f"release.json is refused (files: the path {path!r} {reason})" in hostile(files={path: FILE})


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
    assert f"release.json is refused (files: {reason})" in hostile(files=dict.fromkeys(paths, FILE))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "0.9.0"}, "has tiny/openvino-int4 0.9.0, not tiny/openvino-int4 1.0.0: it is refused"),
        ({"variant": "openvino-fp16"}, "has tiny/openvino-fp16 1.0.0, not tiny/openvino-int4 1.0.0: it is refused"),
        (
            {"schema_version": 2},
            "refused (schema_version: is of another schema; install the phi3-pipeline that published it).",
        ),
        ({"files": {}}, "release.json is refused (files: "),
        ({"files": {"x": {"size": 10**13, "sha256": "0" * 64}}}, "the files have 10000 GB"),
        ({"surprise": 1}, "release.json is refused (surprise: Extra inputs are not permitted)"),
    ],
)
def test_hostile_releases(changes, reason):
    """An older version under a newer name, another variant or schema, absurd sizes and unknown keys are refused."""
    assert reason in hostile(**changes)


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b" " * 2_000_000])
def test_content_that_is_not_json(content):
    """Rubbish, deep nesting and sheer size end with one sentence."""
    with pytest.raises(PipelineError, match=r"^here: release\.json is "):
        read_release(content, origin="here")


def test_the_largest_release():
    """A release.json has up to a megabyte."""
    content = publish_version().content()
    assert read_release(content + b" " * (MAX_RELEASE - len(content)), origin="here").version == "1.0.0"
    with pytest.raises(PipelineError, match=r"^here: release\.json is larger than a megabyte"):
        read_release(content + b" " * (MAX_RELEASE + 1 - len(content)), origin="here")


@pytest.mark.parametrize("kind", ["link", "device", "pipe", "directory"])
@pytest.mark.parametrize("part", ["content", "release", "alias"])
def test_what_is_no_plain_file(part, kind):
    """Links, devices, pipes and directories in the place of a registry's files are refused without being read."""
    sha256 = publish_version().files["openvino_model.bin"].sha256
    path = {
        "content": Path("registry/blobs/sha256", sha256[:2], sha256),
        "release": RELEASES / "1.0.0" / RELEASE,
        "alias": RELEASES / "aliases/latest",
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

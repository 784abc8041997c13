"""Every kind of registry keeps the same promises: a directory, an OCI registry and an emulated Hub, on this machine."""

import sys
from pathlib import Path

import pytest

from pipeline.common.errors import PipelineError
from pipeline.common.files import digest
from pipeline.release import publish, pull
from pipeline.release.registry import open_registry
from pipeline.release.registry.interface import Entry, require_own
from pipeline.release.release import Release
from tests.release_project import KILLED, MODEL, NAME, VARIANT, build, dies, exit_codes, publish_version, quiet

pytestmark = [pytest.mark.usefixtures("release_folder"), pytest.mark.slow, pytest.mark.mutants]
BIG = bytes(range(256)) * 100
REPO = "someone/tiny-openvino-int4"
REFUSED = 3  # exit code


@pytest.fixture(params=["dir", "oci", "hf"])
def url(request, release_folder):
    """The URL of an empty registry of each kind."""
    if request.param == "dir":
        Path("registry").mkdir()
        return "dir:registry"
    if request.param == "oci":
        return request.getfixturevalue("oci").url
    request.getfixturevalue("hub").create(REPO)
    return f"hf:{REPO}"


@pytest.fixture
def registry(url):
    """An empty registry of each kind."""
    return open_registry(url)


def published(registry, version, weights=b"weights", aliases=()):
    """Publish an artifact with these weights; return its release."""
    build(weights)
    return publish_version(version, registry=registry, aliases=aliases)


def pulled(registry, version="latest"):
    """Pull the version, and return its weights."""
    return (pull.pull(registry, NAME, version=version) / "openvino_model.bin").read_bytes()


def test_nothing_is_there(registry):
    """An empty registry has no versions, no aliases and no releases."""
    assert registry.entries() == []
    assert (registry.resolve(NAME, "latest"), registry.resolve(NAME, "1.0.0")) == (None, None)
    assert registry.read(NAME, "1.0.0") is None


@pytest.mark.parametrize("url", ["s3:a/b", "a/b", "hf:a", "hf:a/b/c", "dir:", "oci:host", "oci:host/UPPER", "x:a/b"])
def test_another_kind(url):
    """What is no address of a known kind of registry is refused."""
    with pytest.raises(PipelineError, match=f"^'{url}' is no registry: give dir:PATH, hf:OWNER/REPOSITORY or oci:HOST"):
        open_registry(url)


def test_versions_and_aliases(registry):
    """Versions are sorted by their numbers; an alias stands for one version, and can be moved to another."""
    first = published(registry, "1.10.0", aliases=("latest", "stage"))
    published(registry, "1.9.0", b"older")
    assert registry.entries() == [Entry(NAME, "1.9.0"), Entry(NAME, "1.10.0", ["latest", "stage"])]
    assert (registry.resolve(NAME, "stage"), registry.resolve(NAME, "1.9.0")) == ("1.10.0", "1.9.0")
    assert (registry.resolve(NAME, "production"), registry.resolve(NAME, "1.8.0")) == (None, None)
    assert registry.read(NAME, "1.10.0") == (first.content(), None)
    for _ in range(2):
        registry.point(NAME, "stage", "1.9.0")
    assert registry.entries() == [Entry(NAME, "1.9.0", ["stage"]), Entry(NAME, "1.10.0", ["latest"])]
    assert (pulled(registry), pulled(registry, "stage"), pulled(registry, "1.9.0")) == (b"weights", b"older", b"older")


def test_a_version_never_changes(registry):
    """Other bytes as a version that is there are refused, and the version stays as it was."""
    first = published(registry, "1.0.0")
    build(BIG)
    other = first.model_copy(update={"requires": {"other": "1.0"}})
    registry.prepare(NAME)
    for path, local in documents(other).items():
        registry.upload(NAME, path, local, digest(local))
    with pytest.raises(FileExistsError):
        registry.publish(other, b"signature")
    assert registry.read(NAME, "1.0.0") == (first.content(), None)


def documents(release: Release) -> dict[str, Path]:
    """Return a file with the content of each path of `release`, as far as the folder has it."""
    folder = Path("artifacts") / MODEL / VARIANT
    return {path: folder / path for path in release.files if (folder / path).exists()}


def test_the_same_again(registry):
    """Publishing the same bytes again says so and changes nothing; other bytes as the same version are a conflict."""
    first, said = published(registry, "1.0.0"), []
    options = {"registry": registry, "version": "1.0.0", "aliases": ("latest",), "progress": said.append}
    assert publish.publish(MODEL, VARIANT, **options) == first
    assert said[-1] == f"{NAME} 1.0.0 is there already, with the same bytes"
    build(BIG)
    with pytest.raises(PipelineError, match=r"with other bytes \(manifest\.json, openvino_model\.bin"):
        publish.publish(MODEL, VARIANT, **options)
    assert registry.entries() == [Entry(NAME, "1.0.0", ["latest"])]


def test_a_signature_comes_along(registry):
    """A signature is kept beside the release that it belongs to."""
    release = published(registry, "1.0.0")
    signed = release.model_copy(update={"version": "1.1.0"})
    registry.prepare(NAME)
    for path, local in documents(signed).items():
        registry.upload(NAME, path, local, signed.files[path])
    registry.publish(signed, b"signature")
    assert registry.read(NAME, "1.1.0") == (signed.content(), b"signature")
    assert registry.read(NAME, "1.0.0") == (release.content(), None)


def test_downloads(registry):
    """A content comes whole or from a given byte on; a pull has the bytes that were published."""
    release = published(registry, "1.0.0", BIG)
    for offset in (0, 5, len(BIG) - 1):
        assert b"".join(registry.download(release, "openvino_model.bin", offset=offset)) == BIG[offset:]
    pull.pull(registry, NAME, version="1.0.0", to=Path("model"), progress=quiet)
    assert pull.verify_release(Path("model")) == release
    assert Path("model/openvino_model.bin").read_bytes() == BIG


def test_a_pull_that_was_killed_while_it_hashed(registry):
    """A content that is complete, but was not hashed any more, is not asked for again, and the pull ends."""
    release = published(registry, "1.0.0", BIG)
    sha256 = release.files["openvino_model.bin"].sha256
    left = pull.cache() / "blobs" / sha256[:2] / f".{sha256}.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(BIG)
    assert pulled(registry, "1.0.0") == BIG


@pytest.mark.parametrize("content", [bytes(len(BIG)), BIG + b"and more", b""])
def test_a_corrupt_content(url, registry, content, request):
    """Bytes that differ from release.json are refused, and nothing is installed."""
    sha256 = published(registry, "1.0.0", BIG).files["openvino_model.bin"].sha256
    if url.startswith("hf:"):
        request.getfixturevalue("hub").revision(REPO, "1.0.0")[1]["openvino_model.bin"] = content
    else:
        (stored,) = (path for path in Path().rglob(f"blobs/sha256/{sha256[:2]}/{sha256}"))
        (stored / "data" if stored.is_dir() else stored).write_bytes(content)
    with pytest.raises(PipelineError, match=r"gave other bytes for openvino_model\.bin than release\.json says"):
        pull.pull(registry, NAME, version="1.0.0", to=Path("model"))
    assert not Path("model").exists()


def publish_dying(url, method, calls, after):
    """Publish version 2.0.0, and be killed at, or after, the n-th call of `method`."""
    registry = open_registry(url)  # with connections of its own
    dies(registry, method, calls=calls, after=after)
    publish_version("2.0.0", registry=registry)


@pytest.mark.parametrize(
    ("method", "calls", "after", "visible"),
    [
        ("upload", 1, False, False),
        ("upload", 3, True, False),
        ("publish", 1, False, False),
        ("publish", 1, True, True),
        ("point", 1, False, True),
        ("point", 1, True, True),
    ],
)
def test_a_killed_publisher(url, registry, method, calls, after, visible):
    """When a publisher is killed at any phase, readers see a whole version; a retry uploads only what is missing."""
    first = published(registry, "1.0.0", aliases=("latest",))
    build(BIG)
    assert exit_codes(publish_dying, url, method, calls, after, processes=1) == [KILLED]
    assert [entry.version for entry in registry.entries()] == (["1.0.0", "2.0.0"] if visible else ["1.0.0"])
    assert pulled(registry) == (BIG if method == "point" and after else b"weights")
    sent, upload = [], registry.upload
    registry.upload = lambda name, path, *others: sent.append(path) or upload(name, path, *others)
    second = publish_version("2.0.0", registry=registry)
    if not url.startswith("hf:"):  # the Hub's client itself asks what is there
        new = [path for path, file in second.files.items() if file not in first.files.values()]
        there = len(new) if method != "upload" else calls if after else calls - 1
        assert sent == new[there:]
    assert pulled(registry) == BIG


def publish_or_refuse(url):
    """Publish, and end with REFUSED when that is refused with a sentence."""
    try:
        publish_version(registry=open_registry(url))
    except PipelineError:
        sys.exit(REFUSED)


def test_two_publishers_at_once(url, registry):
    """When several publish the same bytes at once, all succeed, or on the Hub are told to run again, and the release is
    whole."""
    build(BIG)
    codes = exit_codes(publish_or_refuse, url, processes=3)
    assert 0 in codes
    assert set(codes) <= ({0, REFUSED} if url.startswith("hf:") else {0})
    publish_version(registry=registry)
    assert pulled(registry) == BIG


def test_a_registry_of_another_artifact():
    """A registry for one artifact refuses others, while an empty one takes any."""
    release = publish_version().content()
    require_own(None, "tiny/other", url="hf:a/b")
    require_own(release, NAME, url="hf:a/b")
    with pytest.raises(PipelineError, match=f"hf:a/b is the registry of {NAME}: give tiny/other a repository of its"):
        require_own(release, "tiny/other", url="hf:a/b")


@pytest.mark.parametrize("url", ["oci", "hf"], indirect=True)
def test_a_registry_of_one_artifact(registry):
    """A repository that has one artifact refuses another."""
    registry.prepare("tiny/other")
    published(registry, "1.0.0")
    registry.prepare(NAME)
    with pytest.raises(PipelineError, match=f"{registry.url} is the registry of {NAME}: give tiny/other a repository"):
        registry.prepare("tiny/other")

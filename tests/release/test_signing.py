"""Only releases that the owner of the given key signed are accepted, under their own name and version."""

import shutil
from pathlib import Path

import pytest

from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.release.pull import verify_any, verify_release
from pipeline.release.registry.directory import DirectoryRegistry
from tests.helpers import edit_json
from tests.release_project import MODEL, NAME, VARIANT, build, publish_version, pull_latest

pytestmark = pytest.mark.usefixtures("release_folder")
UNSIGNED, OTHERS = "is not signed, and a key was given", r"is not signed by the owner of .*others\.pub: it is refused"
RELEASES = Path("registry/releases", NAME)


@pytest.fixture
def signed(keys, release_folder):
    """A function that publishes with our key."""
    return lambda version="1.0.0": publish_version(version, key=keys / "ours.pem")


@pytest.fixture
def pull_signed(keys):
    """A function that pulls what the owner of a key signed."""
    return lambda key="ours.pub", to=Path("model"): pull_latest(to=to, key=keys / key)


@pytest.mark.parametrize("verifier", [verify_release, verify_any])
def test_signed(signed, pull_signed, keys, verifier):
    """With only the public key a signed release is accepted, and verified again later, offline."""
    signed()
    directory = pull_signed()
    shutil.rmtree("registry")
    assert verifier(directory, key=keys / "ours.pub").version == "1.0.0"
    with pytest.raises(PipelineError, match=f"^model {OTHERS}"):
        verifier(directory, key=keys / "others.pub")


def test_verify_any(keys):
    """Without a key what was pulled and what was built is verified; what was built is never signed."""
    publish_version()
    directory, built = pull_latest(), paths.variant(MODEL, VARIANT)
    assert verify_any(directory) == verify_release(directory)
    assert verify_any(built).name == NAME
    with pytest.raises(PipelineError, match="was not pulled from a registry"):
        verify_any(built, key=keys / "ours.pub")


def test_not_signed(pull_signed):
    """A release without a signature is refused when a key is given, and nothing is installed."""
    publish_version()
    with pytest.raises(PipelineError, match=rf"tiny/openvino-int4 1\.0\.0 {UNSIGNED}"):
        pull_signed()
    assert not Path("model").exists()


def test_a_signature_is_not_added(signed):
    """A version that was published without a signature does not get one."""
    publish_version()
    with pytest.raises(PipelineError, match=r"has tiny/openvino-int4 1\.0\.0 unsigned: sign a new version"):
        signed()


def test_not_signed_by_the_key_that_was_given(signed, pull_signed):
    """A release with another key's signature is refused, and nothing is installed."""
    signed()
    with pytest.raises(PipelineError, match=OTHERS):
        pull_signed("others.pub")
    assert not Path("model").exists()


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda _: b"{}", lambda _: b"[" * 100_000, lambda signature: signature[:-20]],
    ids=["empty", "no signature", "nested", "cut"],
)
def test_a_damaged_signature(signed, pull_signed, damage):
    """A release with a damaged signature is refused, and nothing is installed."""
    signed()
    signature = RELEASES / "1.0.0/release.sig"
    signature.write_bytes(damage(signature.read_bytes()))
    with pytest.raises(PipelineError, match=r"is not signed by the owner of .*ours\.pub"):
        pull_signed()
    assert not Path("model").exists()


@pytest.mark.parametrize("to", [None, Path("model")], ids=["in the cache", "elsewhere"])
@pytest.mark.parametrize(("key", "refusal"), [(None, UNSIGNED), ("ours.pem", OTHERS)], ids=["unsigned", "signed"])
def test_an_installed_copy(keys, pull_signed, to, key, refusal):
    """A copy that is installed already is not trusted for that: with a key, its signature is verified again."""
    publish_version(key=key and keys / key)
    pull_latest(to=to)
    with pytest.raises(PipelineError, match=refusal):
        pull_signed("others.pub", to=to)


def test_a_copy_that_is_installed_meanwhile(signed, pull_signed, monkeypatch):
    """A copy that another process installs during a pull is not trusted, either."""
    signed()
    shutil.copytree(pull_latest(), "copy")
    Path("copy/release.sig").unlink()
    read = DirectoryRegistry.read

    def read_slowly(registry, name, version):
        shutil.copytree("copy", "model")
        return read(registry, name, version)

    monkeypatch.setattr(DirectoryRegistry, "read", read_slowly)
    with pytest.raises(PipelineError, match=f"^model {UNSIGNED}"):
        pull_signed()


@pytest.fixture
def passed_off(signed):
    """Two signed versions, of which the older one lies in the place of the newer one."""
    signed("1.0.0")
    build(b"newer")
    signed("2.0.0")
    for name in ("release.json", "release.sig"):
        shutil.copy(RELEASES / "1.0.0" / name, RELEASES / "2.0.0" / name)


@pytest.mark.usefixtures("passed_off")
def test_a_signed_older_version_under_a_newer_name(pull_signed):
    """An old release cannot be passed off as a new one."""
    with pytest.raises(PipelineError, match=r"has tiny/openvino-int4 1\.0\.0, not tiny/openvino-int4 2\.0\.0"):
        pull_signed()


@pytest.mark.usefixtures("passed_off")
def test_the_signature_binds_the_version(pull_signed):
    """An old release whose version was changed is not what its owner signed."""
    edit_json(RELEASES / "2.0.0/release.json", version="2.0.0")
    with pytest.raises(PipelineError, match=r"is not signed by the owner of .*ours\.pub"):
        pull_signed()


def test_a_file_that_is_no_public_key(signed, pull_signed, tmp_path):
    """A file that is not a public key is refused with one sentence."""
    signed()
    with pytest.raises(PipelineError, match=r"dvc\.lock holds no public EC key in PEM form\.$"):
        pull_signed(tmp_path / "dvc.lock")


@pytest.mark.parametrize("key", ["ours.pub", "rubbish.pem"])
def test_a_file_that_is_no_private_key(keys, tmp_path, key):
    """A file that is not a private key is refused with one sentence, and nothing is published."""
    (tmp_path / "rubbish.pem").write_text("rubbish")
    folder = tmp_path if key == "rubbish.pem" else keys
    with pytest.raises(PipelineError, match=f"{key} holds no private EC key without a password: make one with"):
        publish_version(key=folder / key)
    assert not Path("registry").exists()

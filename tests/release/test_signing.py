"""Only releases that the owner of the given key signed are accepted, under their own name and version."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.release.pull import check, verify_any
from pipeline.release.registry.directory import DirectoryRegistry
from tests.helpers import run
from tests.release_project import MODEL, NAME, VARIANT, build, publish_version, pull_latest

pytestmark = pytest.mark.usefixtures("release_folder")


@pytest.fixture
def keys(tmp_path):
    """Two pairs of EC keys: ours, and somebody else's."""
    for name in ("ours", "others"):
        run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.pem", cwd=tmp_path)
        run("openssl", "ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub", cwd=tmp_path)


def signed(version="1.0.0"):
    """Publish with our key."""
    return publish_version(version, key=Path("ours.pem"))


def pull_signed(key="ours.pub", to=Path("model")):
    """Pull what the owner of `key` signed."""
    return pull_latest(to=to, key=Path(key))


@pytest.mark.usefixtures("keys")
def test_signed():
    """With only the public key a signed release is accepted, and verified again later, offline."""
    signed()
    directory = pull_signed()
    shutil.rmtree("registry")
    assert check(directory, key=Path("ours.pub")).version == "1.0.0"
    for verifier in (check, verify_any):
        assert verifier(directory, key=Path("ours.pub")).version == "1.0.0"
        with pytest.raises(PipelineError, match=r"model is not signed by the owner of others\.pub: it is refused"):
            verifier(directory, key=Path("others.pub"))
    assert verify_any(directory) == check(directory)
    built = paths.variant(MODEL, VARIANT)
    assert verify_any(built).name == NAME
    with pytest.raises(PipelineError, match="was not pulled from a registry"):  # what was built is never signed
        verify_any(built, key=Path("ours.pub"))


@pytest.mark.usefixtures("keys")
def test_not_signed_by_the_key_that_was_given():
    """A release without a signature, with another key's or a damaged one, is refused, and nothing is installed."""
    publish_version("0.9.0")
    with pytest.raises(PipelineError, match=r"tiny/openvino-int4 0\.9\.0 is not signed, and a key was given"):
        pull_signed()
    with pytest.raises(PipelineError, match=r"has tiny/openvino-int4 0\.9\.0 unsigned: sign a new version"):
        signed("0.9.0")
    signed()
    with pytest.raises(PipelineError, match=r"is not signed by the owner of others\.pub"):
        pull_signed("others.pub")
    signature = Path("registry/releases", NAME, "1.0.0/release.sig")
    for content in (b"", b"{}", b"[" * 100_000, signature.read_bytes()[:-20]):
        signature.write_bytes(content)
        with pytest.raises(PipelineError, match=r"is not signed by the owner of ours\.pub"):
            pull_signed()
    assert not Path("model").exists()


@pytest.mark.usefixtures("keys")
def test_an_installed_copy(monkeypatch):
    """A copy that is installed already is not trusted for that: with a key, its signature is verified again."""
    publish_version()
    refused = [r"is not signed, and a key was given", r"is not signed by the owner of others\.pub"]
    for key, why in zip(("ours.pub", "others.pub"), refused, strict=True):
        for to in (None, Path("model")):
            pull_latest(to=to)
            with pytest.raises(PipelineError, match=why):
                pull_signed(key, to=to)
        signed("2.0.0")
        shutil.rmtree("model")
    signed("3.0.0")
    shutil.copytree(pull_latest(), "copy")
    Path("copy/release.sig").unlink()
    read = DirectoryRegistry.read

    def read_slowly(registry, name, version):  # meanwhile another process installs a copy without a signature
        shutil.copytree("copy", "model")
        return read(registry, name, version)

    monkeypatch.setattr(DirectoryRegistry, "read", read_slowly)
    with pytest.raises(PipelineError, match=refused[0]):
        pull_signed()


@pytest.mark.usefixtures("keys")
def test_a_signed_older_version_under_a_newer_name():
    """The signature binds model, variant and version: an old release cannot be passed off as a new one."""
    signed("1.0.0")
    build(b"newer")
    signed("2.0.0")
    releases = Path("registry/releases", NAME)
    for name in ("release.json", "release.sig"):
        shutil.copy(releases / "1.0.0" / name, releases / "2.0.0" / name)
    with pytest.raises(PipelineError, match=r"has tiny/openvino-int4 1\.0\.0, not tiny/openvino-int4 2\.0\.0"):
        pull_signed()
    content = json.loads((releases / "2.0.0/release.json").read_text()) | {"version": "2.0.0"}
    (releases / "2.0.0/release.json").write_text(json.dumps(content))
    with pytest.raises(PipelineError, match=r"is not signed by the owner of ours\.pub"):
        pull_signed()


@pytest.mark.usefixtures("keys")
def test_files_that_are_no_keys():
    """A file that is not a key is refused with one sentence, both in publishing and in pulling."""
    Path("rubbish.pem").write_text("rubbish")
    with pytest.raises(PipelineError, match=r"dvc\.lock holds no public EC key"):
        signed() and pull_signed("dvc.lock")
    for key in ("rubbish.pem", "ours.pub"):
        with pytest.raises(PipelineError, match=f"{key} holds no private EC key"):
            publish_version("3.0.0", aliases=(), key=Path(key))

"""A real OCI client publishes to Debian's docker-registry and pulls from it, on loopback."""

import hashlib
import socket
from pathlib import Path

import pytest
import requests
from urllib3.util import Retry

from pipeline.common.errors import PipelineError
from pipeline.common.files import File
from pipeline.release.registry import open_registry
from pipeline.release.registry.modelpack import FILEPATH, MANIFEST_TYPE
from pipeline.release.registry.oci import OciRegistry
from tests.helpers import phi3
from tests.release_project import NAME, build, publish_version

pytestmark = [pytest.mark.usefixtures("release_folder"), pytest.mark.slow, pytest.mark.mutants]
BIG = bytes(range(256)) * 100
MODELPACK = "application/vnd.cncf.model"


@pytest.fixture
def impatient(monkeypatch):
    """Requests are repeated at once."""
    monkeypatch.setattr(Retry, "sleep", lambda *_: None)


@pytest.fixture
def registry(oci):
    """An empty registry."""
    return open_registry(oci.url)


def manifest_of(oci, version="1.0.0"):
    """Return the registry's manifest of a version."""
    address = f"http://{oci.host}/v2/models/tiny/manifests/{version}"
    return requests.get(address, headers={"Accept": MANIFEST_TYPE}, timeout=9).json()


def test_contents_that_are_there(registry):
    """An OCI registry says which contents it has; only the others are uploaded."""
    release = publish_version(registry=registry)
    assert all(registry.has(NAME, file) for file in release.files.values())
    assert not registry.has(NAME, File(size=1, sha256="0" * 64))


def test_each_file_is_a_layer(oci, registry):
    """The manifest of a version is one of ModelPack, with each file as a layer of its kind."""
    release = publish_version(registry=registry)
    kinds = dict.fromkeys(release.files, "weight.config") | dict.fromkeys(["LICENSE", "README.md"], "doc")
    kinds |= dict.fromkeys(["openvino_model.bin", "openvino_model.onnx"], "weight")
    contents = release.files | {
        "release.json": File(size=len(release.content()), sha256=hashlib.sha256(release.content()).hexdigest())
    }
    manifest = manifest_of(oci)
    assert manifest == {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": f"{MODELPACK}.manifest.v1+json",
        "config": manifest["config"] | {"mediaType": f"{MODELPACK}.config.v1+json"},
        "layers": [
            {
                "mediaType": f"{MODELPACK}.{kinds.get(path, 'weight.config')}.v1.raw",
                "digest": f"sha256:{file.sha256}",
                "size": file.size,
                "annotations": {FILEPATH: path},
            }
            for path, file in contents.items()
        ],
    }
    assert manifest["config"].keys() == {"mediaType", "digest", "size"}


def test_the_config_of_modelpack(oci, registry):
    """The config of a version says what ModelPack's tools show of a model."""
    release = publish_version(registry=registry)
    address = f"http://{oci.host}/v2/models/tiny/blobs/{manifest_of(oci)['config']['digest']}"
    assert requests.get(address, timeout=9).json() == {
        "descriptor": {
            "name": NAME,
            "version": "1.0.0",
            "family": "phi3",
            "licenses": ["MIT"],
            "sourceURL": "https://huggingface.co/microsoft/Phi-3-mini-4k-instruct",
            "revision": "f" * 40,
        },
        "config": {
            "architecture": "transformer",
            "format": "openvino",
            "paramSize": "0.377m",
            "precision": "int4",
            "quantization": "int4-sym-channel",
            "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]},
        },
        "modelfs": {"type": "layers", "diffIds": [f"sha256:{file.sha256}" for file in release.files.values()]},
    }


def test_an_image_that_is_no_release(oci, registry):
    """An image that somebody else put there is refused with a sentence."""
    publish_version(registry=registry)
    manifest = manifest_of(oci)
    manifest["layers"] = manifest["layers"][:1]
    address = f"http://{oci.host}/v2/models/tiny/manifests/2.0.0"
    put = requests.put(address, json=manifest, headers={"Content-Type": MANIFEST_TYPE}, timeout=9)
    put.raise_for_status()
    with pytest.raises(PipelineError, match=r":2\.0\.0 is no model that this pipeline published: it has no release"):
        registry.read(NAME, "2.0.0")


def test_other_bytes_than_the_manifest_says(oci, registry):
    """A release that the registry changed on its disk is refused with a sentence."""
    release = publish_version(registry=registry)
    sha256 = hashlib.sha256(release.content()).hexdigest()
    (stored,) = oci.root.rglob(f"blobs/sha256/*/{sha256}/data")
    stored.write_bytes(release.content()[::-1])
    with pytest.raises(PipelineError, match="gave other bytes than its manifest says: nothing was installed"):
        registry.read(NAME, "1.0.0")


def test_an_alias_of_a_version_that_is_gone(registry):
    """An alias is never said to stand for a version that cannot be read."""
    registry.prepare(NAME)
    with pytest.raises(PipelineError, match=r"has no 1\.0\.0 for latest to stand for: publish it again"):
        registry.point(NAME, "latest", "1.0.0")


def test_a_content_that_is_being_written(oci, registry, monkeypatch):
    """A manifest that the registry refuses, since another publisher is writing one of its contents, is sent again."""
    put, refused = OciRegistry._put, []

    def put_meanwhile(self, manifest, tag):
        sha256 = hashlib.sha256(BIG).hexdigest()
        (link,) = oci.root.rglob(f"_layers/sha256/{sha256}/link")
        content = link.read_bytes()

        def finish(retry, response=None):
            refused.append(response.status)
            link.write_bytes(content)

        monkeypatch.setattr(Retry, "sleep", finish)
        link.write_bytes(b"")  # as docker-registry does before it writes the link
        put(self, manifest, tag)

    monkeypatch.setattr(OciRegistry, "_put", put_meanwhile)
    build(BIG)
    publish_version(registry=registry, aliases=())
    assert refused == [400]
    oci.phi3("pull", oci.url, f"{NAME}@1.0.0", "--to", "model")
    assert Path("model/openvino_model.bin").read_bytes() == BIG


@pytest.mark.usefixtures("impatient")
def test_a_registry_that_went_away(oci, registry):
    """When the registry does not answer, whatever is asked of it ends with a sentence that names it."""
    release = publish_version(registry=registry)
    oci.stop()
    (path, file), *_ = release.files.items()
    for call in (
        registry.entries,
        lambda: registry.resolve(NAME, "latest"),
        lambda: registry.prepare(NAME),
        lambda: registry.has(NAME, file),
        lambda: registry.upload(NAME, path, Path("artifacts/tiny/source/LICENSE"), file),
        lambda: registry.publish(release, None),
        lambda: registry.point(NAME, "stage", "1.0.0"),
        lambda: list(registry.download(release, path, offset=0)),
        lambda: registry._digest("1.0.0"),
        lambda: registry._put({}, "1.0.0"),
        lambda: registry._small({"digest": "sha256:0"}),
    ):
        with pytest.raises(PipelineError, match=f"^{registry.url} failed .*: check the network and `docker login`"):
            call()


@pytest.mark.usefixtures("impatient")
def test_a_registry_that_is_not_there():
    """A host that does not answer ends the command with one sentence."""
    refused = phi3("list", "oci:127.0.0.1:9/models/tiny", check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: oci:127.0.0.1:9/models/tiny failed (")


@pytest.mark.usefixtures("impatient")
def test_a_registry_that_stalls(monkeypatch):
    """A registry that takes requests and never answers ends the command with one sentence."""
    monkeypatch.setattr("pipeline.release.registry.oci.TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"oci:127.0.0.1:{silent.getsockname()[1]}/models/tiny"
        refused = phi3("list", url, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"Error: {url} failed (")


def test_every_request_has_a_timeout(registry, monkeypatch):
    """The requests that oras-py sends end, too, when they are not answered."""
    timeouts = []
    send = requests.adapters.HTTPAdapter.send
    monkeypatch.setattr(
        requests.adapters.HTTPAdapter,
        "send",
        lambda *arguments, **options: timeouts.append(options["timeout"]) or send(*arguments, **options),
    )
    publish_version(registry=registry)
    assert set(timeouts) == {120}

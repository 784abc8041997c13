"""Every kind of registry keeps the same promises: a directory, an OCI registry and an emulated Hub, on this machine."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from huggingface_hub import HfApi
from ruamel.yaml import YAML
from urllib3.util import Retry

from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.common.manifest import File, Recipe, Runtime, Stored, digest
from pipeline.release import publish, pull
from pipeline.release.registry import open_registry
from pipeline.release.registry.interface import Entry
from pipeline.release.registry.oci import _config, _kind
from pipeline.release.release import Release
from tests.helpers import edit
from tests.hub_registry_server import metadata_errors
from tests.manifests import variant_manifest
from tests.release_project import MODEL, NAME, VARIANT, build, publish_version, quiet, validate

pytestmark = [pytest.mark.usefixtures("release_folder"), pytest.mark.slow, pytest.mark.mutants]
BIG = bytes(range(256)) * 100
REPO = "someone/tiny-openvino-int4"


@pytest.fixture(params=["dir", "oci", "hf"])
def registry(request):
    """An empty registry of each kind."""
    if request.param == "dir":
        Path("registry").mkdir()
        return open_registry("dir:registry")
    if request.param == "oci":
        return open_registry(request.getfixturevalue("oci").url)
    request.getfixturevalue("hub")
    return open_registry(f"hf:{REPO}")


def published(registry, version, weights=b"weights", aliases=()):
    """Publish an artifact with these weights; return its release."""
    build(weights)
    return publish_version(version, registry=registry, aliases=aliases)


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
    assert pull.check(Path("model")) == release
    assert Path("model/openvino_model.bin").read_bytes() == BIG


@pytest.mark.parametrize("registry", ["oci", "hf"], indirect=True)
def test_a_registry_of_one_artifact(registry):
    """A repository that has one artifact refuses another."""
    registry.prepare("tiny/other")
    published(registry, "1.0.0")
    registry.prepare(NAME)
    with pytest.raises(PipelineError, match=f"{registry.url} is the registry of {NAME}: give tiny/other a repository"):
        registry.prepare("tiny/other")


def test_contents_that_are_there(oci):
    """An OCI registry says which contents it has; only the others are uploaded."""
    registry = open_registry(oci.url)
    release = published(registry, "1.0.0")
    assert all(registry.has(NAME, file) for file in release.files.values())
    assert not registry.has(NAME, File(size=1, sha256="0" * 64))


def test_the_format_of_modelpack(oci):
    """The manifest and the config of a version are those of ModelPack, and each file is a layer of its kind."""
    release = published(open_registry(oci.url), "1.0.0")
    address, kind = f"http://{oci.host}/v2/models/tiny", "application/vnd.oci.image.manifest.v1+json"
    manifest = requests.get(f"{address}/manifests/1.0.0", headers={"Accept": kind}, timeout=9).json()
    model = "application/vnd.cncf.model"
    kinds = dict.fromkeys(release.files, "weight.config") | dict.fromkeys(["LICENSE", "README.md"], "doc")
    kinds |= dict.fromkeys(["openvino_model.bin", "openvino_model.onnx"], "weight")
    layers = [
        {
            "mediaType": f"{model}.{kinds[path]}.v1.raw",
            "digest": f"sha256:{file.sha256}",
            "size": file.size,
            "annotations": {"org.cncf.model.filepath": path},
        }
        for path, file in release.files.items()
    ]
    content = hashlib.sha256(release.content()).hexdigest()
    layers.append(
        {
            "mediaType": f"{model}.weight.config.v1.raw",
            "digest": f"sha256:{content}",
            "size": len(release.content()),
            "annotations": {"org.cncf.model.filepath": "release.json"},
        }
    )
    config = requests.get(f"{address}/blobs/{manifest['config']['digest']}", timeout=9).json()
    assert manifest == {
        "schemaVersion": 2,
        "mediaType": kind,
        "artifactType": f"{model}.manifest.v1+json",
        "config": manifest["config"] | {"mediaType": f"{model}.config.v1+json"},
        "layers": layers,
    }
    assert manifest["config"].keys() == {"mediaType", "digest", "size"}
    assert config == {
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
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers[:-1]]},
    }


PHI_3_MINI = {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
PHI_3_MINI |= {"num_attention_heads": 32, "num_key_value_heads": 32}


def test_the_config_of_several_formats():
    """All precisions and formats of a model are named; a local checkpoint has no address."""
    stored = Stored(int4_ratio=0.8, formats={"int4-asym-g32": 0.8, "f16": 0.1, "int8-asym-g32": 0.1}, matrices={})
    runtime = Runtime(requires={"onnxruntime-genai": "1"}, devices=["CPU"])
    made = variant_manifest(NAME, runtime=runtime, recipe=Recipe(asked={}, achieved=stored))
    release = publish_version(registry=open_registry("dir:registry"))
    config = _config(release, made, PHI_3_MINI)
    assert config["descriptor"].keys() == {"name", "version", "family", "licenses"}
    assert config["config"]["format"] == "onnx"
    assert config["config"]["paramSize"] == "3.82b"
    assert config["config"]["precision"] == "float16,int4,int8"
    assert config["config"]["quantization"] == "int4-asym-g32,int8-asym-g32"


@pytest.mark.parametrize(
    ("path", "kind"),
    [(f"x.{end}", "weight") for end in ("bin", "data", "onnx", "safetensors", "blob")]
    + [("README.md", "doc"), ("LICENSE", "doc"), ("tokenizer.json", "weight.config"), ("x.xml", "weight.config")],
)
def test_kinds_of_layers(path, kind):
    """Weights, documents and configs are layers of different kinds."""
    assert _kind(path) == kind


def test_a_registry_that_went_away(oci, monkeypatch):
    """When the registry does not answer, whatever is asked of it ends with a sentence that names it."""
    registry = open_registry(oci.url)
    release = published(registry, "1.0.0")
    oci.stop()
    monkeypatch.setattr(Retry, "sleep", lambda *_: None)
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


def test_what_others_put_there(oci, hub):
    """An image that is no release, and aliases that are no JSON, are refused with a sentence."""
    registry = open_registry(oci.url)
    published(registry, "1.0.0")
    address = f"http://{oci.host}/v2/models/tiny/manifests"
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = requests.get(f"{address}/1.0.0", headers={"Accept": kind}, timeout=9).json()
    manifest["layers"] = manifest["layers"][:1]
    requests.put(f"{address}/2.0.0", json=manifest, headers={"Content-Type": kind}, timeout=9).raise_for_status()
    with pytest.raises(PipelineError, match=r":2\.0\.0 is no model that this pipeline published: it has no release"):
        registry.read(NAME, "2.0.0")
    registry = open_registry(f"hf:{REPO}")
    published(registry, "1.0.0")
    for content in (b"[", b"[]", b'{"latest": 1}'):
        hub.commit(REPO, hub.revision(REPO, "main")[1] | {"aliases.json": content})
        with pytest.raises(PipelineError, match=r"aliases\.json is not valid: pull a version by its number"):
            registry.resolve(NAME, "latest")


@pytest.mark.parametrize(
    ("licence", "metadata"),
    [
        ("MIT", {"license": "mit"}),
        ("LicenseRef-Acme", {"license": "other", "license_name": "licenseref-acme", "license_link": "LICENSE"}),
    ],
)
def test_the_card_follows_the_rules_of_the_hub(hub, licence, metadata):
    """The Hub takes the card's metadata, each release has the file by which it counts downloads, and the repository is
    private: a fine-tune must not become public by mistake."""
    manifest = paths.variant(MODEL, VARIANT) / "manifest.json"
    edit(manifest, '"license": "MIT"', f'"license": "{licence}"')
    validate()
    publish_version(registry=open_registry(f"hf:{REPO}"))
    assert hub.private == {REPO}
    files = hub.revision(REPO, "1.0.0")[1]
    card = YAML(typ="safe").load(files["README.md"].decode().split("---\n")[1])
    assert list(metadata_errors(files["README.md"].decode())) == []
    assert card == metadata | {
        "base_model": "microsoft/Phi-3-mini-4k-instruct",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "tags": ["openvino", "openvino-int4", "phi3", "cpu", "gpu"],
    }
    assert ("POST", "/api/validate-yaml") in hub.log
    assert json.loads(files["config.json"])["model_type"] == "phi3"


def test_files_of_an_older_version_go(hub):
    """The main branch of a repository of the Hub has the files of the newest version, and the Hub's own."""
    registry = open_registry(f"hf:{REPO}")
    Path("artifacts/tiny/source/NOTICE").write_text("x")
    published(registry, "1.0.0", aliases=("latest",))
    Path("artifacts/tiny/source/NOTICE").unlink()
    release = published(registry, "1.1.0")
    main = hub.revision(REPO, "main")[1]
    assert main.keys() == {*release.files, "release.json", "aliases.json", ".gitattributes"}
    assert "NOTICE" in hub.revision(REPO, "1.0.0")[1]


def test_somebody_else_commits_meanwhile(hub, monkeypatch):
    """A commit that another publisher makes after the first look is never overwritten: it is looked at again."""
    registry = open_registry(f"hf:{REPO}")
    release = published(registry, "1.0.0")
    look, others = HfApi.repo_info, iter([b"one", b"two"])

    def look_slowly(*arguments, **options):
        found = look(*arguments, **options)
        if (content := next(others, None)) is not None:
            hub.commit(REPO, hub.revision(REPO, "main")[1] | {"other": content})
        return found

    monkeypatch.setattr(HfApi, "repo_info", look_slowly)
    with pytest.raises(FileExistsError):
        registry.publish(release.model_copy(update={"version": "1.1.0"}), None)
    assert hub.revision(REPO, "main")[1]["other"] == b"one"
    assert hub.revision(REPO, "1.1.0") is None
    registry.point(NAME, "stage", "1.0.0")
    assert hub.revision(REPO, "main")[1]["other"] == b"two"
    assert registry.resolve(NAME, "stage") == "1.0.0"


def test_an_alias_that_others_move_all_the_time(hub, monkeypatch):
    """When others commit again and again, the alias is given up with a sentence."""
    registry = open_registry(f"hf:{REPO}")
    published(registry, "1.0.0")
    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: SimpleNamespace(sha="0" * 40, siblings=[]))
    with pytest.raises(PipelineError, match=f"^others publish to hf:{REPO} all the time: run again to move stage"):
        registry.point(NAME, "stage", "1.0.0")


def test_a_server_that_fails(hub):
    """When the Hub fails, the sentence names it and says what to do; no token is shown."""
    registry = open_registry(f"hf:{REPO}")
    published(registry, "1.0.0")
    for part, call in (
        ("/resolve/", lambda: registry.read(NAME, "1.0.0")),
        ("/refs", lambda: registry.entries()),
        ("/commit/", lambda: registry.point(NAME, "stage", "1.0.0")),
    ):
        hub.fail = {part: 403}
        with pytest.raises(
            PipelineError, match=f"^hf:{REPO}: {hub.url} failed .*: check the network and HF_TO"
        ) as said:
            call()
        assert "hf_secret" not in str(said.value)

"""Publishing takes only validated artifacts, and never changes a version."""

import re
import shutil
from pathlib import Path

import pytest

from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.common.files import building
from pipeline.common.manifest import HubOrigin, Recipe, seal
from pipeline.common.params import load_params
from pipeline.convert.variant import _runtime, asked
from pipeline.release import publish
from pipeline.release.pull import verify_release
from pipeline.release.registry import open_registry
from pipeline.release.registry.directory import DirectoryRegistry
from tests.helpers import ROOT, edit
from tests.manifests import recipe, variant_manifest
from tests.release_project import MODEL, NAME, VARIANT, build, make_blob, publish_version, pull_latest, validate

pytestmark = pytest.mark.usefixtures("release_folder")


def test_publish_then_pull():
    """What is pulled is the release that was published."""
    release = publish_version()
    directory = pull_latest()
    assert verify_release(directory) == release
    assert (directory / "openvino_model.bin").read_bytes() == b"weights"


def test_what_finder_leaves_is_not_published():
    """A file that Finder left beside an artifact or its blob is not published."""
    (make_blob("4000") / ".DS_Store").touch()
    (paths.variant(MODEL, VARIANT) / ".DS_Store").touch()
    assert [path for path in publish_version().files if "DS_Store" in path] == []


def test_windows_publishes_the_same_bytes(monkeypatch):
    """Every text of a release is written with the same line endings on every system."""
    written, write_text = {}, Path.write_text

    def write(path, text, encoding=None, newline=None):
        written[path.name] = newline
        return write_text(path, text, encoding, newline=newline)

    monkeypatch.setattr(Path, "write_text", write)
    publish_version()
    documents = ("metrics.json", "provenance.json", "sbom.cdx.json", "reference.json", "README.md", "genai_config.json")
    assert written == dict.fromkeys(documents, "\n")


def test_the_same_again_is_nothing():
    """Publishing the same bytes again writes nothing but the alias."""
    publish_version()
    before = {path: path.stat().st_mtime_ns for path in Path("registry").rglob("*") if "aliases" not in path.parts}
    publish_version()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_bytes_are_a_conflict():
    """Other bytes under the same version are refused and change nothing."""
    publish_version()
    build(b"others")
    with pytest.raises(PipelineError, match=r"1\.0\.0 with other bytes \(manifest\.json, openvino_model\.bin, prov"):
        publish_version()
    assert (pull_latest() / "openvino_model.bin").read_bytes() == b"weights"


def test_another_file_is_a_conflict():
    """A file more than the version has is refused, too."""
    publish_version()
    (paths.source(MODEL) / "NOTICE").write_text("x")
    with pytest.raises(PipelineError, match=r"1\.0\.0 with other bytes \(NOTICE\), and a version never changes"):
        publish_version()


def build_anew():
    """Build other weights, and keep the evidence of the validation."""
    evidence = paths.validation(MODEL, VARIANT).read_text()
    build(b"anew")
    paths.validation(MODEL, VARIANT).write_text(evidence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda: validate(["check 'fidelity' failed"]),
            r"did not pass validation \(check 'fidelity' failed\): it stays here",
        ),
        (
            lambda: paths.validation(MODEL, VARIANT).unlink(),
            "has not been validated: run `dvc repro validate@tiny-openvino-int4` first",
        ),
        (build_anew, "was built anew since it was validated: run `dvc repro validate@tiny-openvino-int4` first"),
        (
            lambda: (paths.variant(MODEL, VARIANT) / "tokenizer.json").write_text("[]"),
            r"openvino-int4: tokenizer\.json has changed",
        ),
    ],
    ids=["failed", "never", "earlier", "changed"],
)
def test_only_what_was_validated(change, sentence):
    """An artifact that failed, was never validated, was rebuilt since, or has changed is not published."""
    change()
    with pytest.raises(PipelineError, match=sentence):
        publish_version()
    assert not Path("registry").exists()


@pytest.mark.parametrize("version", ["1.0", "v1.0.0", "1.0.0\n", "../1.0.0", "01.0.0"])
def test_a_wrong_version(version):
    """A version must be three numbers; anything else is refused."""
    with pytest.raises(PipelineError, match="is no version: give three numbers"):
        publish_version(version)


@pytest.mark.parametrize("alias", ["1.0.0", "Latest", "../latest", ""])
def test_a_wrong_alias(alias):
    """An alias is no path, and no version."""
    with pytest.raises(
        PipelineError, match=f"^'{re.escape(alias)}' is no alias: use small letters, digits and hyphens"
    ):
        publish_version(aliases=("latest", alias))


class Late(DirectoryRegistry):
    """A registry to which another publisher comes after the first look."""

    def read(self, name, version):
        self.read = super().read


class Busy(DirectoryRegistry):
    """A registry in which another publisher has taken the place of a version, but nothing can be read there yet."""

    def read(self, name, version):
        return None


def test_another_publisher_was_faster():
    """Another publisher of the same bytes is no error."""
    first = publish_version()
    assert publish_version(registry=Late(Path("registry"))) == first


def test_another_publisher_was_faster_with_other_bytes():
    """Another publisher of other bytes is a conflict."""
    publish_version()
    build(b"others")
    with pytest.raises(PipelineError, match="with other bytes"):
        publish_version(registry=Late(Path("registry")))


def test_another_publisher_was_faster_and_did_not_sign(keys):
    """A release that another publisher has not signed is not taken for the signed one."""
    publish_version()
    with pytest.raises(PipelineError, match=r"has tiny/openvino-int4 1\.0\.0 unsigned: sign a new version"):
        publish_version(registry=Late(Path("registry")), key=keys / "ours.pem")


def test_another_publisher_is_at_work():
    """When another publisher has not yet ended, the remedy is to run again."""
    publish_version()
    with pytest.raises(PipelineError, match=r"^another publisher is at work on dir:.*: run again when it has ended"):
        publish_version(registry=Busy(Path("registry")))


def test_blobs_come_along():
    """A release has the blobs that were compiled for the platforms of params.yaml; what was not compiled is named."""
    edit(Path("params.yaml"), "npu_platforms: [4000]", "npu_platforms: [3720, 4000, 5010]")
    make_blob("4000")
    make_blob("3720", compiled=False)
    said = []
    registry = open_registry("dir:registry")
    release = publish.publish(MODEL, VARIANT, registry=registry, version="1.0.0", aliases=(), progress=said.append)
    assert [path for path in release.files if "blob" in path] == ["blobs/4000/manifest.json", "blobs/4000/x.blob"]
    assert [line for line in said if "blob for" in line] == [
        "without a blob for NPU 3720: the NPU compiler refused",
    ]


def test_a_blob_that_is_not_built():
    """A variant for NPUs is not published before the stage compile_npu has run for the platforms of params.yaml."""
    edit(paths.variant(MODEL, VARIANT) / "manifest.json", '"CPU"', '"NPU"')
    validate()
    with pytest.raises(PipelineError, match=r"openvino-int4-4000 is not built: run `dvc repro compile_npu` first\.$"):
        publish_version()


@pytest.mark.parametrize("ir", ["weights", "other"])
def test_blobs_of_a_platform_that_was_removed(ir):
    """A blob that is left of a platform which params.yaml no longer names is not published, and is no error."""
    make_blob("5010", ir=ir)
    assert not [path for path in publish_version().files if "blob" in path]


def test_blobs_of_another_variant():
    """A blob of a variant whose name begins with this one's stays out."""
    make_blob("4000").rename("artifacts/tiny/blobs/openvino-int4-128-4000")
    assert not [path for path in publish_version().files if "blob" in path]


def test_a_blob_that_has_changed():
    """A blob whose bytes have changed is refused."""
    (make_blob("4000") / "x.blob").write_text("BLOB for 4000")
    with pytest.raises(PipelineError, match=r"openvino-int4-4000: x\.blob has changed"):
        publish_version()


def test_a_blob_of_another_ir():
    """A blob that was compiled before the IR was built anew is refused."""
    make_blob("4000", ir="other")
    with pytest.raises(PipelineError, match=r"tiny/blobs/openvino-int4-4000 was compiled from another IR"):
        publish_version()


def hub_url(manifest):
    """Return the URL of someone's repository for an artifact with this manifest."""
    with building(paths.variant(MODEL, VARIANT)) as target:
        seal(target, manifest)
    return publish.full_url("hf:someone", model=MODEL, variant=VARIANT)


def test_the_usual_names_on_the_hub():
    """The name tells checkpoint, weights and runtime of each variant of params.yaml, whatever the variant is called.

    docs/registries.md has the same names.
    """
    names = {}
    for variant, block in load_params(ROOT / "params.yaml").variants.items():
        made = Recipe(asked=asked(block, {"tie_word_embeddings": False}), achieved=recipe().achieved)
        source = HubOrigin(hub="microsoft/Phi-3-mini-4k-instruct", revision="f" * 40)
        url = hub_url(variant_manifest(NAME, source=source, recipe=made, runtime=_runtime(block)))
        names[variant] = url.removeprefix("hf:someone/")
    assert names == {
        "openvino-fp16": "Phi-3-mini-4k-instruct-fp16-ov",
        "openvino-int4": "Phi-3-mini-4k-instruct-int4-ov",
        "npu-int4-channelwise": "Phi-3-mini-4k-instruct-int4-cw-ov",
        "npu-int4-group128": "Phi-3-mini-4k-instruct-int4-gq-ov",
        "onnx-directml-int4": "Phi-3-mini-4k-instruct-onnx-directml",
        "onnx-cpu-int4": "Phi-3-mini-4k-instruct-onnx-cpu",
    }
    page = (ROOT / "docs/registries.md").read_text("utf-8")
    assert dict(re.findall(r"^\| `([\w-]+)` \| `(Phi-[\w.-]+)` \|$", page, re.MULTILINE)) == names


def test_the_name_of_a_checkpoint_in_a_directory():
    """Where the checkpoint has no name of its own, the model's takes its place."""
    assert hub_url(variant_manifest(NAME)) == "hf:someone/tiny-int4-cw-ov"


@pytest.mark.parametrize("url", ["hf:someone/tiny", "dir:registry", "hf:a/b/c", "hf:"])
def test_other_urls_stay_as_they_are(url):
    """Only an owner alone is completed."""
    assert publish.full_url(url, model=MODEL, variant=VARIANT) == url


def test_the_name_of_nothing():
    """An artifact that is not there has no name."""
    shutil.rmtree(paths.variant(MODEL, VARIANT))
    with pytest.raises(PipelineError, match=r"^artifacts/tiny/openvino-int4/manifest\.json is missing"):
        publish.full_url("hf:someone", model=MODEL, variant=VARIANT)

"""A release has a model card, metrics, provenance and a bill of materials beside the artifact."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from pipeline.common.errors import PipelineError
from pipeline.common.manifest import Runtime
from pipeline.release.documents import card
from tests.helpers import run
from tests.manifests import variant_manifest
from tests.release_project import MEASURED, METRICS, NAME, publish_version, pull_latest


@pytest.fixture(scope="module")
def pulled(release_template, tmp_path_factory):
    """The directory of a release that was published in a project, and pulled."""
    project = shutil.copytree(release_template, tmp_path_factory.mktemp("documents") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        publish_version()
        return pull_latest(to=project / "model")


def provenance(directory):
    """Return what the provenance in `directory` says of the project's commit."""
    statement = json.loads((directory / "provenance.json").read_text())
    return statement["predicate"]["buildDefinition"]["resolvedDependencies"][1]


def test_the_files_of_a_release(pulled):
    """A release has the artifact, the licence, the source's config, the documents, and what other programs need."""
    assert sorted(path.name for path in pulled.iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        "genai_config.json",
        "generation_config.json",
        "manifest.json",
        "metrics.json",
        "openvino_model.bin",
        "openvino_model.onnx",
        "openvino_model.xml",
        "provenance.json",
        "reference.json",
        "release.json",
        "sbom.cdx.json",
        "tokenizer.json",
    ]


def test_the_card(pulled):
    """The model card has the Hub's metadata, what an IR was judged by, and what was measured on one machine."""
    content = (pulled / "README.md").read_text()
    assert content.startswith("---\nbase_model: microsoft/Phi-3-mini-4k-instruct\nlicense: mit\n")
    assert "\nbase_model_relation: quantized\n---\n" in content
    rule, by = "\n| --- | --- |\n", "on CPU by openvino-genai"
    assert f"| judged in float32 {by} | |{rule}| size | 1e-07 MB |\n| mean KL | 0.1000 nats |" in content
    machine = "with the runtime's defaults, on GPU: a laptop, 4 cores"
    assert f"| {machine} | |{rule}| mean KL here | 0.3000 nats |" in content


def test_the_card_of_an_onnx_model():
    """An ONNX model is judged in the types in which it computes, which is not float32."""
    runtime = Runtime(requires={"onnxruntime-genai": "1"}, devices=["CPU"])
    content = card(variant_manifest(NAME, runtime=runtime), METRICS, {}, version="1.0.0")
    assert "| judged in its own types on CPU by openvino-genai | |" in content


def test_the_metrics(pulled):
    """The metrics have all figures of the validation, and those that were measured on one machine."""
    assert json.loads((pulled / "metrics.json").read_text()) == METRICS | {"measured": MEASURED}


def test_the_provenance(pulled):
    """The provenance names the artifact's files by their hash, and the commit that recorded the build."""
    subjects = json.loads((pulled / "provenance.json").read_text())["subject"]
    assert {"name": "openvino_model.bin", "digest": {"sha256": hashlib.sha256(b"weights").hexdigest()}} in subjects
    head = run("git", "rev-parse", "HEAD", cwd=pulled).stdout.strip()
    assert provenance(pulled) == {"name": "phi3-pipeline", "digest": {"gitCommit": head}, "annotations": {}}


def test_the_bill_of_materials(pulled):
    """The bill of materials names the packages that made the artifact."""
    (package,) = json.loads((pulled / "sbom.cdx.json").read_text())["components"]
    assert package["purl"] == "pkg:pypi/openvino@2026.4.1"


def test_a_build_that_is_not_committed(release_folder):
    """The provenance says that dvc.lock has changed since its commit."""
    (release_folder / "dvc.lock").write_text("changed")
    publish_version()
    assert provenance(pull_latest())["annotations"] == {"uncommitted": True}


def test_a_build_without_a_commit(release_folder, monkeypatch):
    """Without any commit of dvc.lock nothing is published."""
    monkeypatch.setenv("GIT_DIR", str(release_folder / "nowhere"))
    with pytest.raises(PipelineError, match=r"^no git commit has dvc\.lock"):
        publish_version()
    assert not Path("registry").exists()

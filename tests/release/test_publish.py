"""Publishing to a directory is complete, immutable and atomic, and takes only validated artifacts."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.common.manifest import HubOrigin, Recipe, building, read_manifest, seal, verify
from pipeline.common.params import load_params
from pipeline.convert.variant import _runtime, asked
from pipeline.release import publish
from pipeline.release.pull import check
from pipeline.release.registry import open_registry
from pipeline.release.registry.directory import DirectoryRegistry
from pipeline.release.registry.interface import Entry, require_own
from pipeline.run.blobs import choose
from tests.helpers import ROOT, run
from tests.manifests import blob_manifest, recipe, variant_manifest
from tests.release_project import (
    MEASURED,
    METRICS,
    MODEL,
    NAME,
    VARIANT,
    build,
    exit_codes,
    publish_version,
    pull_latest,
    validate,
)

pytestmark = pytest.mark.usefixtures("release_folder")


def blobs():
    """Return the names of the registry's contents and of any files left behind there."""
    return sorted(
        path.name for path in Path("registry").rglob("*") if path.is_file() and path.parent.parent.name == "sha256"
    )


def test_publish_then_pull(tmp_path):
    """A pull returns the artifact with licence, model card, metrics, provenance, bill of materials and reference."""
    release = publish_version()
    directory = pull_latest()
    assert directory.is_relative_to(tmp_path / "cache/releases")
    assert directory.parts[-3:] == (*NAME.split("/"), "1.0.0")
    assert sorted(path.name for path in directory.iterdir()) == [
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
    assert check(directory) == release
    assert (directory / "openvino_model.bin").read_bytes() == b"weights"
    card = (directory / "README.md").read_text()
    assert card.startswith("---\nbase_model: microsoft/Phi-3-mini-4k-instruct\nlicense: mit\n")
    assert "\nbase_model_relation: quantized\n---\n" in card
    rule, by = "\n| --- | --- |\n", "on CPU by openvino-genai"
    assert f"| judged in float32 {by} | |{rule}| size | 1e-07 MB |\n| mean KL | 0.1000 nats |" in card
    assert f"| with the runtime's defaults, on GPU: a laptop, 4 cores | |{rule}| mean KL here | 0.3000 nats |" in card
    assert json.loads((directory / "metrics.json").read_text()) == METRICS | {"measured": MEASURED}
    statement = json.loads((directory / "provenance.json").read_text())
    weights = hashlib.sha256(b"weights").hexdigest()
    assert {"name": "openvino_model.bin", "digest": {"sha256": weights}} in statement["subject"]
    head = run("git", "rev-parse", "HEAD", cwd=tmp_path).stdout.strip()
    assert statement["predicate"]["buildDefinition"]["resolvedDependencies"][1]["digest"] == {"gitCommit": head}
    assert (
        json.loads((directory / "sbom.cdx.json").read_text())["components"][0]["purl"] == "pkg:pypi/openvino@2026.4.1"
    )


def test_provenance_of_what_is_not_committed(tmp_path, monkeypatch):
    """The provenance says that dvc.lock has changed since its commit; without any commit of it nothing is published."""
    (tmp_path / "dvc.lock").write_text("changed")
    publish_version()
    statement = json.loads((pull_latest() / "provenance.json").read_text())
    assert statement["predicate"]["buildDefinition"]["resolvedDependencies"][1]["annotations"] == {"uncommitted": True}
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(PipelineError, match=r"^no git commit has dvc\.lock"):
        publish_version("2.0.0")
    assert not Path("registry/releases", NAME, "2.0.0").exists()


def test_a_folder_that_is_no_version():
    """A folder in the registry whose name is no version, such as a copy made by hand, is not listed."""
    publish_version()
    versions = Path("registry/releases", NAME)
    shutil.copytree(versions / "1.0.0", versions / "1.0.0-rc1")
    assert [entry.version for entry in open_registry("dir:registry").entries()] == ["1.0.0"]


def test_versions_and_aliases():
    """Versions sort by number; aliases move; a version or an alias can be pulled."""
    for number, version in enumerate(("1.9.0", "1.10.0")):
        build(b"weights %d" % number)
        publish_version(version, aliases=("latest", "stage") if version == "1.9.0" else ("latest",))
    assert open_registry("dir:registry").entries() == [
        Entry(NAME, "1.9.0", ["stage"]),
        Entry(NAME, "1.10.0", ["latest"]),
    ]
    assert (pull_latest() / "openvino_model.bin").read_bytes() == b"weights 1"
    assert (pull_latest(version="stage") / "openvino_model.bin").read_bytes() == b"weights 0"
    with pytest.raises(PipelineError, match=r"registry has no tiny/openvino-int4 2\.0\.0: see `phi3 list"):
        pull_latest(version="2.0.0")


def test_the_same_again_is_nothing_and_other_bytes_are_a_conflict():
    """Publishing the same bytes changes nothing; other bytes under the same version are refused and change nothing."""
    publish_version()
    before = {path: path.stat().st_mtime_ns for path in Path("registry").rglob("*") if "aliases" not in path.parts}
    publish_version()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    build(b"others")
    with pytest.raises(PipelineError, match=r"1\.0\.0 with other bytes \(manifest\.json, openvino_model\.bin, prov"):
        publish_version()
    assert (pull_latest() / "openvino_model.bin").read_bytes() == b"weights"
    build()
    Path("artifacts/tiny/source/NOTICE").write_text("x")
    with pytest.raises(PipelineError, match=r"1\.0\.0 with other bytes \(NOTICE\), and a version never changes"):
        publish_version()


def test_only_what_was_validated(tmp_path):
    """An artifact that failed, was never validated, was rebuilt since, or has changed is not published."""
    validate(["check 'fidelity' failed"])
    with pytest.raises(PipelineError, match=r"did not pass validation \(check 'fidelity' failed\): it stays here"):
        publish_version()
    paths.validation(MODEL, VARIANT).unlink()
    with pytest.raises(
        PipelineError, match="has not been validated: run `dvc repro validate@tiny-openvino-int4` first"
    ):
        publish_version()
    validate()
    evidence = paths.validation(MODEL, VARIANT).read_text()
    build(b"anew")
    paths.validation(MODEL, VARIANT).write_text(evidence)
    with pytest.raises(PipelineError, match="was built anew since it was validated"):
        publish_version()
    (paths.variant(MODEL, VARIANT) / "tokenizer.json").write_text("[]")
    with pytest.raises(PipelineError, match=r"tokenizer\.json has changed"):
        publish_version()
    assert not Path("registry").exists()


@pytest.mark.parametrize("version", ["1.0", "v1.0.0", "1.0.0\n", "../1.0.0", "01.0.0"])
def test_a_wrong_version(version):
    """A version must be three numbers; anything else is refused."""
    with pytest.raises(PipelineError, match="is no version: give three numbers"):
        publish_version(version)


class Dies(DirectoryRegistry):
    """A registry whose publisher is killed when it calls `method` for the n-th time."""

    def __init__(self, method, calls, *, after):
        super().__init__(Path("registry"))
        original, left = getattr(self, method), [calls]

        def call(*arguments):
            left[0] -= 1
            if left[0] == 0 and not after:
                os._exit(9)
            result = original(*arguments)
            if left[0] == 0:
                os._exit(9)
            return result

        setattr(self, method, call)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("method", "calls"), [("upload", 1), ("upload", 5), ("publish", 1), ("point", 1)])
def test_a_killed_publisher(method, calls, after):
    """When a publisher is killed at any phase, readers see a whole version; a retry uploads only what is missing."""
    publish_version("1.0.0")
    build(b"newer")
    assert exit_codes(publish_version, "2.0.0", Dies(method, calls, after=after), processes=1) == [9]
    visible = [entry.version for entry in open_registry("dir:registry").entries()]
    assert visible == (["1.0.0", "2.0.0"] if method == "point" or (method == "publish" and after) else ["1.0.0"])
    moved = method == "point" and after
    assert (pull_latest() / "openvino_model.bin").read_bytes() == (b"newer" if moved else b"weights")
    uploaded = set(blobs())
    registry = open_registry("dir:registry")
    sent = []
    original = registry.upload
    registry.upload = lambda name, path, local, file: sent.append(file.sha256) or original(name, path, local, file)
    publish_version("2.0.0", registry)
    assert not set(sent) & uploaded
    assert (pull_latest() / "openvino_model.bin").read_bytes() == b"newer"


def test_two_publishers_at_once():
    """Several publishers of a version succeed if their bytes are the same; one with other bytes is refused."""
    assert exit_codes(publish_version, processes=4) == [0] * 4
    assert check(pull_latest()).version == "1.0.0"
    assert publish_version(registry=Late(Path("registry"))) == check(pull_latest())
    run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem", cwd=Path.cwd())
    with pytest.raises(PipelineError, match=r"has tiny/openvino-int4 1\.0\.0 unsigned: sign a new version"):
        publish_version(registry=Late(Path("registry")), key=Path("key.pem"))
    with pytest.raises(PipelineError, match=r"^another publisher is at work on dir:.*: run again when it has ended"):
        publish_version(registry=Busy(Path("registry")))
    build(b"others")
    with pytest.raises(PipelineError, match="with other bytes"):
        publish_version(registry=Late(Path("registry")))


class Late(DirectoryRegistry):
    """A registry to which another publisher comes after the first look."""

    def read(self, name, version):
        self.read = super().read


class Busy(DirectoryRegistry):
    """A registry in which another publisher has taken the place of a version, but nothing can be read there yet."""

    def read(self, name, version):
        return None


def make_blob(platform, *, compiled=True, ir="weights"):
    """Build a blob's directory for `platform`; by its manifest it was compiled from an IR with the weights `ir`."""
    manifest = read_manifest(paths.variant(MODEL, VARIANT))
    with building(paths.blob(paths.variant(MODEL, VARIANT), platform)) as build_:
        if compiled:
            (build_ / "x.blob").write_text(f"blob for {platform}")
        hashes = {"openvino_model.bin": hashlib.sha256(ir.encode()).hexdigest()}
        reason = None if compiled else "the NPU compiler refused"
        seal(build_, blob_manifest(manifest, platform, hashes=hashes, not_compiled=reason))


def test_blobs_come_along():
    """A release has the compiled blobs of its variant, which an application then finds; a missing one is named, and one
    that has changed or was compiled from another IR is refused."""
    make_blob("4000")
    make_blob("3720", compiled=False)
    said = []
    release = publish.publish(
        MODEL,
        VARIANT,
        registry=open_registry("dir:registry"),
        version="1.0.0",
        aliases=("latest",),
        progress=said.append,
    )
    assert [path for path in release.files if "blob" in path] == ["blobs/4000/manifest.json", "blobs/4000/x.blob"]
    assert "without a blob for NPU 3720: the NPU compiler refused" in said
    directory = pull_latest()
    choice = choose(directory, architecture="4000", openvino="2026.4.1-1")
    assert choice.options == {
        "BLOB_PATH": str(directory / "blobs/4000/x.blob"),
        "WEIGHTS_PATH": str(directory / "openvino_model.bin"),
    }
    shutil.copytree("artifacts/tiny/blobs/openvino-int4-4000", "artifacts/tiny/blobs/openvino-int4-128-4000")
    manifest = read_manifest(Path("artifacts/tiny/blobs/openvino-int4-128-4000"))
    Path("artifacts/tiny/blobs/openvino-int4-128-4000/manifest.json").write_text(
        manifest.model_copy(update={"variant": "openvino-int4-128"}).model_dump_json()
    )
    make_blob("5010")
    more = {"blobs/5010/manifest.json", "blobs/5010/x.blob"}  # the other variant's blob stays out
    assert publish_version("1.1.0").files.keys() == release.files.keys() | more
    blob = paths.blob(paths.variant(MODEL, VARIANT), "4000") / "x.blob"
    blob.write_text("BLOB for 4000")
    with pytest.raises(PipelineError, match=r"openvino-int4-4000: x\.blob has changed"):
        publish_version("2.0.0")
    make_blob("4000", ir="other")
    with pytest.raises(PipelineError, match=r"tiny/blobs/openvino-int4-4000 was compiled from another IR"):
        publish_version("2.0.0")


def test_a_registry_of_another_artifact():
    """A registry for one artifact refuses others, while an empty one takes any."""
    release = publish_version().content()
    require_own(None, "tiny/other", url="hf:a/b")
    require_own(release, NAME, url="hf:a/b")
    with pytest.raises(PipelineError, match=f"hf:a/b is the registry of {NAME}: give tiny/other a repository of its"):
        require_own(release, "tiny/other", url="hf:a/b")


def test_the_usual_names_on_the_hub():
    """The name tells checkpoint, weights and runtime of each variant of params.yaml, whatever the variant is called.

    docs/registries.md has the same names.
    """
    names = {}
    for variant, block in load_params(ROOT / "params.yaml").variants.items():
        made = Recipe(asked=asked(block, {"tie_word_embeddings": False}), achieved=recipe().achieved)
        with building(paths.variant(MODEL, VARIANT)) as target:
            source = HubOrigin(hub="microsoft/Phi-3-mini-4k-instruct", revision="f" * 40)
            seal(target, variant_manifest(NAME, source=source, recipe=made, runtime=_runtime(block)))
        names[variant] = publish.full_url("hf:someone", model=MODEL, variant=VARIANT)
    assert names == {
        "openvino-fp16": "hf:someone/Phi-3-mini-4k-instruct-fp16-ov",
        "openvino-int4": "hf:someone/Phi-3-mini-4k-instruct-int4-ov",
        "npu-int4-channelwise": "hf:someone/Phi-3-mini-4k-instruct-int4-cw-ov",
        "npu-int4-group128": "hf:someone/Phi-3-mini-4k-instruct-int4-gq-ov",
        "onnx-directml-int4": "hf:someone/Phi-3-mini-4k-instruct-onnx-directml",
        "onnx-cpu-int4": "hf:someone/Phi-3-mini-4k-instruct-onnx-cpu",
    }
    page = (ROOT / "docs/registries.md").read_text("utf-8")
    assert dict(re.findall(r"^\| `([\w-]+)` \| `(Phi-[\w.-]+)` \|$", page, re.MULTILINE)) == {
        variant: url.rpartition("/")[2] for variant, url in names.items()
    }
    with building(paths.variant(MODEL, VARIANT)) as target:  # of a checkpoint in a directory
        seal(target, variant_manifest(NAME))
    assert publish.full_url("hf:someone", model=MODEL, variant=VARIANT) == "hf:someone/tiny-int4-cw-ov"
    for url in ("hf:someone/tiny", "dir:registry", "hf:a/b/c", "hf:"):
        assert publish.full_url(url, model=MODEL, variant=VARIANT) == url
    shutil.rmtree("artifacts/tiny/openvino-int4")
    with pytest.raises(PipelineError, match=r"^artifacts/tiny/openvino-int4/manifest\.json is missing"):
        publish.full_url("hf:someone", model=MODEL, variant=VARIANT)


def test_the_commands(tmp_path):
    """publish, list, pull and verify work from the command line; a wrong registry is one sentence."""
    output = run("phi3", "publish", NAME, "--to", "dir:registry", "--version", "1.0.0", cwd=tmp_path).stdout
    assert output.endswith(f"MB, to dir:{tmp_path}/registry as latest\n")
    assert run("phi3", "list", "dir:registry", cwd=tmp_path).stdout == f"{NAME} 1.0.0 latest\n"
    directory = run("phi3", "pull", "dir:registry", NAME, "--to", "model", cwd=tmp_path).stdout.strip()
    assert directory == "model"
    verify(paths.variant(MODEL, VARIANT))
    assert run("phi3", "verify", "model", cwd=tmp_path).stdout.startswith(f"{NAME}: 14 files, 0.0 MB, all as in")
    chosen = run("phi3", "pull", "dir:registry", "--for", "gpu", "--to", "chosen", cwd=tmp_path)
    assert (chosen.stdout, chosen.stderr.splitlines()[0]) == ("chosen\n", f"{NAME}: asked for")
    refused = run("phi3", "pull", "dir:registry", "--for", "npu", cwd=tmp_path, check=False)
    sentence = f"Error: nothing for npu is published there, only {NAME}: name one of them.\n"
    assert (refused.returncode, refused.stderr) == (1, sentence)
    refused = run("phi3", "list", "ftp://x", cwd=tmp_path, check=False)
    assert (refused.returncode, refused.stderr) == (
        1,
        "Error: 'ftp://x' is no registry: give dir:PATH, hf:OWNER/REPOSITORY or oci:HOST/NAME.\n",
    )

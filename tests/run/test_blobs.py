"""An application gets the blob of an NPU variant where one fits, and else its IR, with the reason."""

import pytest

from pipeline.common.errors import PipelineError
from pipeline.common.files import building
from pipeline.common.manifest import BlobManifest, read_manifest, seal
from pipeline.convert.npu.blob import MAGIC
from pipeline.run.blobs import Choice, choose, load_pipeline
from pipeline.run.openvino import STATIC_ON_CPU
from tests.convert.test_npu import VARIANT, manifest
from tests.helpers import QUESTION
from tests.manifests import blob_manifest

LENGTHS = {"MAX_PROMPT_LEN": 256, "MIN_RESPONSE_LEN": 64}


@pytest.fixture
def variant(tmp_path):
    """An NPU variant's directory with a blob for platform 4000 beside it; the files have no real content."""
    with building(tmp_path / VARIANT) as build:
        (build / "openvino_model.bin").write_text("weights")
        seal(build, manifest())
    sha256 = read_manifest(tmp_path / VARIANT).files["openvino_model.bin"].sha256
    with building(tmp_path / "blobs" / f"{VARIANT}-4000") as build:
        (build / "x.blob").write_text("blob")
        seal(build, blob_manifest(manifest(), "4000", hashes={"openvino_model.bin": sha256}))
    return tmp_path / VARIANT


def test_choose_the_blob_that_fits(variant):
    """A blob is chosen on its platform and OpenVINO version, with the weights of its IR."""
    choice = choose(variant, architecture="4000", openvino="2026.4.1-22982-x")
    blob = variant.parent / "blobs" / f"{VARIANT}-4000/x.blob"
    assert choice.device == "NPU"
    assert choice.options == {"BLOB_PATH": str(blob), "WEIGHTS_PATH": str(variant / "openvino_model.bin")}
    assert choice.reason == "the blob is for NPU 4000 and OpenVINO 2026.4.1"
    assert choice.lengths == LENGTHS


def test_choose_a_blob_with_weights(variant):
    """A blob that has its weights inside is loaded without those of the IR, and one that was not compiled is not."""
    directory = variant.parent / "blobs" / f"{VARIANT}-4000"
    made = read_manifest(directory, BlobManifest)
    recipe = made.recipe.model_copy(update={"asked": made.recipe.asked.model_copy(update={"weightless": False})})
    (directory / "manifest.json").write_text(made.model_copy(update={"recipe": recipe}).model_dump_json())
    choice = choose(variant, architecture="4000", openvino="2026.4.1")
    assert choice.options == {"BLOB_PATH": str(directory / "x.blob")}
    hashes = {"openvino_model.bin": read_manifest(variant).files["openvino_model.bin"].sha256}
    with building(directory) as build:
        seal(build, blob_manifest(manifest(), "4000", hashes=hashes, not_compiled="it ran out of patience"))
    choice = choose(variant, architecture="4000", openvino="2026.4.1")
    assert (choice.device, choice.options) == ("NPU", LENGTHS)
    assert "does not fit, it was not compiled (it ran out of patience): the IR is compiled" in choice.reason


def test_a_folder_whose_blobs_windows_does_not_open(variant, monkeypatch):
    """openvino-genai on Windows opens no blob in a folder such as ü: there the IR is chosen, with the remedy."""
    moved = variant.parent.rename(variant.parent.with_name("ü")) / VARIANT
    assert "BLOB_PATH" in choose(moved, architecture="4000", openvino="2026.4.1").options
    monkeypatch.setattr("pipeline.run.blobs.sys.platform", "win32")
    folder = moved.parent / f"blobs/{VARIANT}-4000"
    assert choose(moved, architecture="4000", openvino="2026.4.1") == Choice(
        "NPU",
        LENGTHS,
        f"on Windows openvino-genai cannot open the blob in {folder}, only in a folder of plain letters (set "
        "PHI3_CACHE, or --to of `phi3 pull`, to one): the IR is compiled on loading",
    )


@pytest.mark.parametrize(
    ("architecture", "openvino", "device", "reason"),
    [
        ("", "2026.4.1", "CPU", "this machine has no NPU, or no driver for it: the IR runs on the CPU"),
        ("5010", "2026.4.1", "NPU", "there is no blob for NPU 5010: the IR is compiled on loading"),
        (
            "4000",
            "2026.5.0-1-x",
            "NPU",
            "the blob for NPU 4000 does not fit, it was made by OpenVINO 2026.4.1 and this is 2026.5.0-1-x: the IR is "
            "compiled on loading",
        ),
    ],
)
def test_choose_the_ir_and_say_why(variant, architecture, openvino, device, reason):
    """Without an NPU, for another platform or another OpenVINO, the IR is chosen, with the reason. An NPU compiles it
    for the lengths of params.yaml."""
    choice = choose(variant, architecture=architecture, openvino=openvino)
    options = {} if device == "CPU" else LENGTHS
    assert (choice.device, choice.options, choice.reason) == (device, options, reason)


def test_choose_refuses_a_changed_blob_and_another_ir(variant):
    """A blob of another IR is not used, and one whose bytes have changed is an error."""
    with building(variant) as build:
        (build / "openvino_model.bin").write_text("others")
        seal(build, manifest())
    assert "it belongs to another IR" in choose(variant, architecture="4000", openvino="2026.4.1").reason
    (variant.parent / "blobs" / f"{VARIANT}-4000/x.blob").write_text("BLOB")
    with pytest.raises(PipelineError, match=r"x\.blob has changed"):
        choose(variant, architecture="4000", openvino="2026.4.1")


@pytest.mark.slow
def test_a_blob_that_the_driver_refuses_gives_way_to_the_ir(smol_phi3, tmp_path, monkeypatch):
    """When a blob cannot be imported, `load_pipeline` compiles the IR instead and says why."""
    blob = tmp_path / "damaged.blob"
    blob.write_bytes(MAGIC + bytes(1000))
    choice = Choice("NPU", {"BLOB_PATH": str(blob)}, "it fits", LENGTHS)
    monkeypatch.setattr("pipeline.run.blobs.choose", lambda _: choice)
    pipeline, how = load_pipeline(smol_phi3 / VARIANT, **STATIC_ON_CPU)
    assert how.startswith("the driver refused the blob (")
    assert how.endswith("): the IR was compiled on loading")
    assert "Tokyo" in pipeline.generate(QUESTION, max_new_tokens=40)
    with pytest.raises(RuntimeError, match="256"):
        pipeline.generate("water " * 300, max_new_tokens=1)

"""An application loads the blobs of a release, or its IR."""

from pathlib import Path

import openvino_genai
import pytest

from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.run.blobs import Choice, choose, load_chosen, static_on_cpu
from tests.release_project import MODEL, VARIANT, make_blob, publish_version, pull_latest

pytestmark = pytest.mark.usefixtures("release_folder")
LENGTHS = {"MAX_PROMPT_LEN": 256, "MIN_RESPONSE_LEN": 64}


def test_the_blob_of_a_release():
    """An application chooses the blob that was pulled with its IR."""
    make_blob("4000")
    publish_version()
    directory = pull_latest()
    assert choose(directory, architecture="4000", openvino="2026.4.1-1").options == {
        "BLOB_PATH": str(directory / "blobs/4000/x.blob"),
        "WEIGHTS_PATH": str(directory / "openvino_model.bin"),
    }


def test_what_finder_leaves_among_the_blobs():
    """A file that Finder left beside the folders of a release's blobs is no blob."""
    make_blob("4000")
    publish_version()
    directory = pull_latest(to=Path("model"))
    (directory / "blobs/.DS_Store").touch()
    assert choose(directory, architecture="5010", openvino="2026.4.1").options == LENGTHS


@pytest.mark.parametrize(
    ("ir", "lengths"), [("weights", {"MAX_PROMPT_LEN": 256, "MIN_RESPONSE_LEN": 64}), ("other", {})]
)
def test_lengths_of_an_earlier_build(ir, lengths):
    """The lengths are those of a blob that was compiled from this IR; one that an earlier build left says nothing."""
    make_blob("4000", ir=ir)
    directory = paths.variant(MODEL, VARIANT)
    assert choose(directory, architecture="5010", openvino="2026.4.1").options == lengths
    assert {name: value for name, value in static_on_cpu(directory).options.items() if name in LENGTHS} == lengths


def test_neither_blob_nor_ir(monkeypatch):
    """When the driver refuses the blob, and then the IR cannot be loaded, the refusal is one sentence."""

    def refuse(directory, device, **options):
        raise RuntimeError("no memory for the " + ("blob" if "BLOB_PATH" in options else f"IR, {options}"))

    monkeypatch.setattr(openvino_genai, "LLMPipeline", refuse)
    choice = Choice("NPU", {"BLOB_PATH": "x.blob"}, "it fits", {"MAX_PROMPT_LEN": 256})
    with pytest.raises(
        PipelineError, match=r"^model cannot be loaded on NPU: no memory for the IR, \{'MAX_PROMPT_LEN': 256"
    ):
        load_chosen(Path("model"), choice)

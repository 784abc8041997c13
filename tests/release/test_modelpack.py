"""A model is described as CNCF ModelPack's tools expect it."""

import pytest

from pipeline.common.files import File
from pipeline.common.manifest import Recipe, Runtime, Stored
from pipeline.release.registry.modelpack import kind, make_config
from pipeline.release.release import Release
from tests.manifests import variant_manifest
from tests.release_project import NAME
from tests.test_costs import PHI_3_MINI


@pytest.mark.parametrize(
    ("formats", "precision", "quantization"),
    [
        (["int4-asym-g32", "f16", "int8-asym-g32"], "float16,int4,int8", "int4-asym-g32,int8-asym-g32"),
        (["int4-sym-g32", "f32"], "float32,int4", "int4-sym-g32"),  # the embedding of an untied model for CPUs
    ],
)
def test_the_config_of_several_formats(formats, precision, quantization):
    """All precisions and formats of a model are named; a local checkpoint has no address."""
    stored = Stored(int4_ratio=0.8, formats=dict.fromkeys(formats, 0.1), matrices={})
    runtime = Runtime(requires={"onnxruntime-genai": "1"}, devices=["CPU"])
    made = variant_manifest(NAME, runtime=runtime, recipe=Recipe(asked={}, achieved=stored))
    files = {"x": File(size=1, sha256="0" * 64)}
    release = Release(model="m", variant="v", version="1.0.0", devices=["CPU"], requires={}, files=files)
    config = make_config(release, made, PHI_3_MINI, [])
    assert config["descriptor"].keys() == {"name", "version", "family", "licenses"}
    found = config["config"]
    assert (found["format"], found["paramSize"]) == ("onnx", "3.82b")
    assert (found["precision"], found["quantization"]) == (precision, quantization)


@pytest.mark.parametrize(
    ("path", "expected"),
    [(f"x.{end}", "weight") for end in ("bin", "data", "onnx", "safetensors", "blob")]
    + [("README.md", "doc"), ("LICENSE", "doc"), ("tokenizer.json", "weight.config"), ("x.xml", "weight.config")],
)
def test_kinds_of_layers(path, expected):
    """Weights, documents and configs are layers of different kinds."""
    assert kind(path) == expected

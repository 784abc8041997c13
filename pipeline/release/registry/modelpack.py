"""The format of a model in an OCI registry, CNCF ModelPack: a manifest with a layer for each file, and a config.

Format: https://github.com/modelpack/model-spec/blob/main/docs/spec.md
"""

import math
from typing import Any

from pipeline.common.checkpoint import expected_shapes
from pipeline.common.files import File
from pipeline.common.manifest import HubOrigin, VariantManifest
from pipeline.release.release import Release

TYPE = "application/vnd.cncf.model"
FILEPATH = "org.cncf.model.filepath"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
MANIFEST_SCHEMA = {
    "type": "object",
    "required": ["layers"],
    "properties": {
        "layers": {
            "type": "array",
            "maxItems": 1010,
            "items": {
                "type": "object",
                "required": ["digest"],
                "properties": {
                    "digest": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
                    "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
                },
            },
        }
    },
}


def make_manifest(config: dict[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the manifest of a version with the descriptors of its `config` and its `layers`."""
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": f"{TYPE}.manifest.v1+json",
        "config": config | {"mediaType": f"{TYPE}.config.v1+json"},
        "layers": layers,
    }


def make_config(
    release: Release, manifest: VariantManifest, shape: dict[str, Any], layers: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the config of a version, which ModelPack's tools show.

    The artifact of its `release` has this `manifest`, its source a config.json with the content `shape`, and its files
    are the `layers`.

    Format: https://github.com/modelpack/model-spec/blob/main/docs/config.md
    """
    formats = manifest.recipe.achieved.formats
    parameters = sum(math.prod(tensor) for _, tensor in expected_shapes(shape))
    precisions = {name.split("-")[0].replace("f", "float") for name in formats}  # of f16, f32 and int4-sym-channel
    hub = manifest.source if isinstance(manifest.source, HubOrigin) else None
    return {
        "descriptor": {
            "name": release.name,
            "version": release.version,
            "family": "phi3",
            "licenses": [manifest.license],
        }
        | ({"sourceURL": f"https://huggingface.co/{hub.hub}", "revision": hub.revision} if hub else {}),
        "config": {
            "architecture": "transformer",
            "format": "openvino" if manifest.runtime.openvino else "onnx",
            "paramSize": f"{parameters / 1e9:.3g}b" if parameters >= 1e9 else f"{parameters / 1e6:.3g}m",
            "precision": ",".join(sorted(precisions)),
            "quantization": ",".join(sorted(name for name in formats if name.startswith("int"))),
            "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]},
        },
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
    }


def describe(file: File, path: str) -> dict[str, Any]:
    """Return the descriptor of a file as a layer, with its `path` in the release, if it is not empty."""
    descriptor: dict[str, Any] = {
        "mediaType": f"{TYPE}.{kind(path)}.v1.raw",
        "digest": f"sha256:{file.sha256}",
        "size": file.size,
    }
    return descriptor | ({"annotations": {FILEPATH: path}} if path else {})


def kind(path: str) -> str:
    """Return what ModelPack calls the kind of the file at `path`: weight, weight.config or doc."""
    if path.endswith((".bin", ".data", ".onnx", ".safetensors", ".blob")):
        return "weight"
    return "doc" if path.endswith((".md", "LICENSE")) else "weight.config"

"""Manifests of small artifacts, of the kinds that the stages write."""

from pipeline.common.manifest import (
    BlobManifest,
    BlobRecipe,
    BlobRuntime,
    Compiled,
    IrOrigin,
    Nothing,
    PathOrigin,
    Recipe,
    Runtime,
    Shapes,
    Stored,
    VariantManifest,
)

ASKED = {"stage": "quantize_openvino", "symmetric": True, "group_size": -1, "ratio": 1.0}


def recipe(asked=ASKED, int4_ratio=1.0):
    """Return the recipe of a variant."""
    return Recipe(asked=asked, achieved=Stored(int4_ratio=int4_ratio, formats={"int4-sym-channel": 1.0}, matrices={}))


def variant_manifest(name, **fields):
    """Return the manifest of the variant `name`, such as `tiny/openvino-int4`, with some fields changed."""
    model, variant = name.split("/")
    given = {
        "source": PathOrigin(path="x"),
        "license": "MIT",
        "recipe": recipe(),
        "eos_token_ids": [1],
        "context": {"max_position_embeddings": 512},
        "runtime": Runtime(requires={"openvino-genai": "2026.4.1.0"}, devices=["CPU", "GPU"]),
        "tools": {"openvino": "2026.4.1"},
    }
    return VariantManifest(name=name, model=model, variant=variant, **given | fields)


def blob_manifest(ir, platform, *, hashes, not_compiled=None):
    """Return the manifest of a blob of the variant with manifest `ir`, compiled from files with these hashes."""
    compiled = Compiled(openvino="2026.4.1", compiler="8.4", platform=platform, compatibility="x", images=2)
    return BlobManifest(
        **dict(ir)
        | {
            "name": f"{ir.name}-{platform}",
            "source": IrOrigin(variant=ir.name, files=hashes, checkpoint=ir.source),
            "recipe": BlobRecipe(
                asked=Shapes(max_prompt_len=256, min_response_len=64, weightless=True, hints={}),
                achieved=Nothing() if not_compiled else compiled,
            ),
            "runtime": BlobRuntime(requires=ir.runtime.requires, devices=["NPU"], platform=platform),
            "not_compiled": not_compiled,
            "files": {},
        }
    )

"""Build the directory of a variant beside its final place, and seal it with a manifest.

The manifest states the recipe that was asked for and what the built files hold.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.common import paths
from pipeline.common.checkpoint import read_json
from pipeline.common.context import limits
from pipeline.common.files import building
from pipeline.common.manifest import (
    CheckpointManifest,
    Recipe,
    Runtime,
    VariantManifest,
    read_manifest,
    seal,
    tool_versions,
)
from pipeline.common.matrices import Matrix, summary
from pipeline.common.params import OnnxInt4, Params, Variant
from pipeline.convert.rotation import can_rotate

TOOLS = {
    "openvino": ("openvino", "openvino-tokenizers", "nncf", "optimum-intel", "torch", "transformers"),
    "onnx": ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers"),
}
WINDOWSML = "1.30.0.202609102321"  # ONNX Runtime and DirectML for Windows applications, and for pipeline/check/directml


@contextmanager
def building_variant(
    params: Params, *, model: str, name: str, read_matrices: Callable[[Path], list[Matrix]]
) -> Iterator[Path]:
    """Yield a directory in which to build variant `name` of `model`, and finish it when the block ends.

    Finishing writes the manifest and gives the directory its final name. `read_matrices` returns the weight matrices
    that the built files hold.
    """
    variant, source = params.get_variant(name), paths.source(model)
    origin, config = read_manifest(source, CheckpointManifest), read_json(source / "config.json")
    with building(paths.variant(model, name)) as build:
        yield build
        seal(
            build,
            VariantManifest(
                name=f"{model}/{name}",
                model=model,
                variant=name,
                source=origin.source,
                license=origin.license,
                recipe=Recipe(asked=asked(variant, config), achieved=summary(read_matrices(build))),
                eos_token_ids=origin.eos_token_ids,
                context=limits(config, directml=variant.directml),
                runtime=_runtime(variant),
                tools=tool_versions(*TOOLS["onnx" if isinstance(variant, OnnxInt4) else "openvino"]),
            ),
        )


def asked(variant: Variant, config: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of `variant` as its manifest states it for a model with `config`.

    Limits and settings that concern only NPU blobs are left out. `rotated` is false when the model cannot be rotated.
    """
    recipe = variant.model_dump(exclude_none=True, exclude={"npu", "limits"})
    return recipe | ({"rotated": can_rotate(config)} if recipe.get("rotated") else {})


def _runtime(variant: Variant) -> Runtime:
    if isinstance(variant, OnnxInt4):
        genai = tool_versions("onnxruntime-genai")
        if not variant.directml:
            return Runtime(requires=genai, devices=["CPU"])
        # The first package gets ONNX Runtime from the second, but does not declare it as a dependency.
        requires = {"onnxruntime-genai-winml": genai["onnxruntime-genai"], "onnxruntime-windowsml": WINDOWSML}
        return Runtime(requires=requires, devices=["GPU"])
    return Runtime(requires=tool_versions("openvino-genai"), devices=["NPU"] if variant.npu else ["CPU", "GPU"])

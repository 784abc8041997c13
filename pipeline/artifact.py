"""A variant's directory: built aside, sealed with a manifest of what was asked and what the built files hold."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.checkpoint import read_json
from pipeline.context import limits
from pipeline.manifest import Manifest, building, read_manifest, seal, tool_versions
from pipeline.params import OnnxInt4, OpenvinoInt4, Params, Variant
from pipeline.recipe import Matrix, summary
from pipeline.rotation import can_rotate

TOOLS = {
    "openvino": ("openvino", "openvino-tokenizers", "nncf", "optimum-intel", "torch", "transformers"),
    "onnx": ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers"),
}
WINDOWSML = "1.30.0.202609102321"  # ONNX Runtime and DirectML for Windows applications, and for pipeline/directml


@contextmanager
def building_variant(
    params: Params, *, model: str, name: str, read_matrices: Callable[[Path], list[Matrix]]
) -> Iterator[Path]:
    """Yield the directory to build variant `name` of `model` in; when the block ends it gets its manifest and name.

    `read_matrices` reads back what the built files hold.
    """
    variant, source = params.get_variant(name), paths.source(model)
    origin, config = read_manifest(source), read_json(source / "config.json")
    directml = isinstance(variant, OnnxInt4) and variant.execution_provider == "dml"
    with building(paths.variant(model, name)) as build:
        yield build
        seal(
            build,
            Manifest(
                name=f"{model}/{name}",
                model=model,
                variant=name,
                source=origin.source,
                license=origin.license,
                recipe={"asked": asked(variant, config), "achieved": summary(read_matrices(build))},
                eos_token_ids=origin.eos_token_ids,
                context=limits(config, directml=directml),
                runtime=_runtime(variant),
                tools=tool_versions(*TOOLS["onnx" if isinstance(variant, OnnxInt4) else "openvino"]),
            ),
        )


def asked(variant: Variant, config: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of `variant` as its manifest states it for a model with `config`.

    What concerns only NPU blobs is left out, and a rotation that the model cannot have is false.
    """
    recipe = variant.model_dump(exclude_none=True, exclude={"npu"})
    return recipe | ({"rotated": can_rotate(config)} if recipe.get("rotated") else {})


def _runtime(variant: Variant) -> dict[str, Any]:
    if isinstance(variant, OnnxInt4):
        genai = tool_versions("onnxruntime-genai")
        if variant.execution_provider == "cpu":
            return {"requires": genai, "devices": ["CPU"]}
        # Without the second package the first finds no ONNX Runtime, and does not ask for it.
        requires = {"onnxruntime-genai-winml": genai["onnxruntime-genai"], "onnxruntime-windowsml": WINDOWSML}
        return {"requires": requires, "devices": ["GPU"]}
    npu = isinstance(variant, OpenvinoInt4) and variant.npu
    return {"requires": tool_versions("openvino-genai"), "devices": ["NPU"] if npu else ["CPU", "GPU"]}

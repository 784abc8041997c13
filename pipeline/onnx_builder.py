"""onnxruntime-genai's builder with less memory: `python -m pipeline.onnx_builder`, with the builder's own arguments.

The builder copies all weights into one message before it quantizes the first, 12 to 22 GB at 3.8 billion parameters.
Here each matrix goes through the builder's own quantization alone, straight from the mapped checkpoint to a file in the
builder's cache folder, so that no two are in memory for long; the bytes that come out are the same.
"""

import copy
import os
import runpy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BUILDER = "onnxruntime_genai.models.builder"


def one_by_one(quantize: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a method of the builder's Model that does what `quantize`, its to_nbits, does, node by node.

    Its result, an onnx_ir.Model, has the same nodes and initializers in another order.
    """
    import onnx_ir
    from onnx.external_data_helper import set_external_data

    def to_nbits(self: Any) -> Any:
        kinds, excluded = self.quant_attrs["op_types_to_quantize"], set(self.quant_attrs["nodes_to_exclude"])
        weights = {}
        for value in self.model.graph.initializers.values():
            users = [use.node for use in value.uses()]
            if users and all(user.op_type in kinds and user.name not in excluded for user in users):
                weights[value.name] = value.const_value
                value.const_value = onnx_ir.ExternalTensor("", 0, 0, value.dtype, shape=value.shape, name=value.name)
        model = onnx_ir.to_proto(self.model)
        nodes, initializers = list(model.graph.node), list(model.graph.initializer)
        del model.graph.node[:], model.graph.initializer[:]

        def quantized(node: Any) -> Any:
            names = [name for name in node.input if name in weights]
            if not names:
                return None
            alone = copy.copy(self)
            alone.model = onnx_ir.from_proto(_only(node, [weights[name] for name in names], model))
            return onnx_ir.to_proto(quantize(alone))

        found = {tensor.name: tensor for tensor in initializers if tensor.name not in weights}
        path = Path(self.cache_dir, "quantized.data").absolute()
        with path.open("wb") as data, ThreadPoolExecutor(os.cpu_count()) as pool:
            for number, (node, part) in enumerate(zip(nodes, pool.map(quantized, nodes), strict=True), start=1):
                if part is None:
                    model.graph.node.append(node)
                    continue
                print(f"Quantized node {number} of {len(nodes)}", flush=True)
                model.graph.node.extend(part.graph.node)
                for tensor in part.graph.initializer:
                    set_external_data(tensor, str(path), offset=data.tell(), length=data.write(tensor.raw_data))
                    tensor.ClearField("raw_data")
                    found[tensor.name] = tensor
                versions = {opset.domain: opset for opset in [*model.opset_import, *part.opset_import]}
                del model.opset_import[:]
                model.opset_import.extend(versions.values())
        model.graph.initializer.extend(found.values())
        return onnx_ir.from_proto(model)

    return to_nbits


def _only(node: Any, weights: list[Any], model: Any) -> Any:
    # A model of `node` alone, with its weights; types of its other inputs and outputs do not matter.
    import onnx
    import onnx_ir

    tensors = [onnx_ir.to_proto(weight) for weight in weights]
    known = {tensor.name for tensor in tensors}
    inputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.input if name and name not in known]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = onnx.helper.make_graph([node], "node", inputs, outputs, initializer=tensors)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def main() -> None:
    """Run the builder."""
    import onnxruntime_genai.models  # noqa: F401  puts the builder's folder on the path
    from builders.base import Model

    Model.to_nbits = one_by_one(Model.to_nbits)
    runpy.run_module(BUILDER, run_name="__main__")


if __name__ == "__main__":
    main()

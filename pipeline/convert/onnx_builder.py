"""onnxruntime-genai's builder with less memory: `python -m pipeline.convert.onnx_builder` with the builder's arguments.

The builder copies all weights into one protobuf message before it quantizes the first, which takes 12 to 22 GB at 3.8
billion parameters. This module passes each matrix by itself through the builder's own quantization, from the mapped
checkpoint to a file in the builder's cache folder. So only one matrix is in memory at a time, and the resulting bytes
are the same.

For DirectML the residual stream is divided by RESIDUAL_SCALE, because DirectML's float16 RMS norms overflow where
mean(x²) exceeds 65,504. The division does not change the results of the norms, and dividing by a power of two is exact
in float16 until values fall below 6e-5.
"""

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BUILDER = "onnxruntime_genai.models.builder"
DIRECTML = "dml"
# smol-phi3's stream peaks at 4.1 times the limit; a larger factor would cost small activations their precision.
RESIDUAL_SCALE = 8
WRITERS = ("o_proj", "down_proj")  # the matrices whose outputs are added to the residual stream


def one_by_one(quantize: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a method for the builder's Model that does node by node what `quantize`, its own to_nbits, does at once.

    The method returns an onnx_ir.Model with the same nodes and initializers in another order.
    """
    import numpy as np
    import onnx
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

        found = {tensor.name: tensor for tensor in initializers if tensor.name not in weights}
        path = Path(self.cache_dir, "quantized.data").absolute()
        with path.open("wb") as data:
            done, total = 0, sum(bool(weights.keys() & set(node.input)) for node in nodes)
            for node, own in zip(nodes, self.model.graph, strict=True):
                if not weights.keys() & set(node.input):
                    model.graph.node.append(node)
                    continue
                alone = copy.copy(self)
                alone.model = _only(own, weights, self.model)
                part = onnx_ir.to_proto(quantize(alone))
                done += 1
                print(f"Quantized matrix {done} of {total}", flush=True)
                model.graph.node.extend(part.graph.node)
                for tensor in part.graph.initializer:
                    if (
                        self.ep == DIRECTML
                        and "_scale" in tensor.name
                        and any(f".{w}." in tensor.name for w in WRITERS)
                    ):
                        tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float16) / RESIDUAL_SCALE).tobytes()
                    # A new message, since data stay in memory as long as any part of their message does.
                    stored = onnx.TensorProto(
                        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=b""
                    )
                    set_external_data(stored, str(path), offset=data.tell(), length=data.write(tensor.raw_data))
                    stored.ClearField("raw_data")
                    found[stored.name] = stored
                versions = {opset.domain: opset for opset in [*model.opset_import, *part.opset_import]}
                del model.opset_import[:]
                model.opset_import.extend(versions.values())
        model.graph.initializer.extend(found.values())
        return onnx_ir.from_proto(model)

    return to_nbits


def _only(node: Any, weights: dict[str, Any], model: Any) -> Any:
    # A model with only a copy of `node` and its weights; the types of its other inputs and outputs do not matter.
    import onnx_ir

    values = [value and onnx_ir.Value(name=value.name, const_value=weights.get(value.name)) for value in node.inputs]
    outputs = [onnx_ir.Value(name=value.name) for value in node.outputs]
    attributes = node.attributes.values()
    alone = onnx_ir.Node(node.domain, node.op_type, values, attributes, name=node.name, outputs=outputs)
    known = [value for value in values if value is not None]
    graph = onnx_ir.Graph(
        [value for value in known if value.const_value is None],
        outputs,
        nodes=[alone],
        initializers=[value for value in known if value.const_value is not None],
        opset_imports=model.opset_imports,
        name="node",
    )
    return onnx_ir.Model(graph, ir_version=model.ir_version)


def joined(q: Any, k: Any, v: Any) -> Any:
    """Return Phi-3's own fused matrix when the weights `q`, `k` and `v` are its consecutive parts, else None."""
    places = [weight.data_ptr() - q.data_ptr() for weight in (q, k, v)]
    storages = {weight.untyped_storage().data_ptr() for weight in (q, k, v)}
    if len(storages) != 1 or places != [0, q.nbytes, q.nbytes + k.nbytes]:
        return None
    return q.as_strided((len(q) + len(k) + len(v), q.shape[1]), q.stride())


def with_layer_types(config: Any) -> Any:
    """Return the checkpoint's `config` with the attention type of each layer, as the builder needs it.

    Phi-3's config has a window but no `layer_types`. The builder would then apply the window to the cache and not to
    the attention, which attends to everything until it fails where the cache ends. A window that the context never
    reaches, as in the models for 128k, is removed.
    """
    if config.sliding_window and config.sliding_window >= config.max_position_embeddings:
        config.sliding_window = None
    if config.sliding_window:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    return config


def main() -> None:
    """Run the builder."""
    import onnxruntime_genai.models  # noqa: F401  puts the builder's folder on the path
    import torch
    from builders.base import Model

    made = Model.__init__

    def init(self: Any, config: Any, *arguments: Any) -> None:
        made(self, with_layer_types(config), *arguments)

    Model.__init__ = init
    # Skip the random initialization of layers, since the builder replaces their weights anyway.
    torch.nn.Linear.reset_parameters = lambda layer: None
    copied = Model.make_packed_matmul_float_class

    def packed(self: Any, q: Any, k: Any, v: Any) -> Any:
        weight = joined(q.weight, k.weight, v.weight)
        return copied(self, q, k, v) if weight is None else SimpleNamespace(weight=weight)

    embed = Model.make_embedding

    def scaled(self: Any, embedding: Any) -> None:
        if self.ep == DIRECTML:
            self.embed_attrs["scale"] /= RESIDUAL_SCALE
            self.layernorm_attrs["epsilon"] /= RESIDUAL_SCALE**2
        embed(self, embedding)

    Model.make_packed_matmul_float_class = packed
    Model.make_embedding = scaled
    Model.to_nbits = one_by_one(Model.to_nbits)
    runpy.run_module(BUILDER, run_name="__main__")


if __name__ == "__main__":
    main()

"""The two files with which ONNX Runtime's OpenVINO execution provider, and so Windows ML, loads an IR as it is."""

import json
from pathlib import Path
from typing import Any

from pipeline.common.checkpoint import head_size, read_json
from pipeline.common.context import NPU_PROMPT
from pipeline.common.manifest import VariantManifest

IR, MODEL, CONFIG = "openvino_model.xml", "openvino_model.onnx", "genai_config.json"
NPU_LENGTHS = {"MAX_PROMPT_LEN": NPU_PROMPT, "MIN_RESPONSE_LEN": 128}  # tokens; OpenVINO's defaults
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")  # of a generation_config.json


def write_openvino_ep(target: Path, ir: Path, manifest: VariantManifest, *, npu_lengths: dict[str, int]) -> None:
    """Write openvino_model.onnx and genai_config.json for the IR in the directory `ir` into `target`.

    `npu_lengths` are MAX_PROMPT_LEN and MIN_RESPONSE_LEN of an NPU variant; if it is empty they are OpenVINO's own. The
    same IR gives the same bytes.
    """
    import openvino

    network = openvino.Core().read_model(ir / IR)
    model = _context_model(network, manifest.tools["openvino"])
    (target / MODEL).write_bytes(model.SerializeToString(deterministic=True))
    inputs, outputs = ([port.any_name for port in ports] for ports in (network.inputs, network.outputs))
    config = _genai_config(ir, manifest, inputs=inputs, outputs=outputs, npu_lengths=npu_lengths or NPU_LENGTHS)
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8", newline="\n")


def _context_model(network: Any, sdk_version: str) -> Any:
    # One node that stands for the whole IR: https://onnxruntime.ai/docs/execution-providers/EP-Context-Design.html
    from onnx import helper

    inputs, outputs = ([_value(port) for port in ports] for ports in (network.inputs, network.outputs))
    node = helper.make_node(
        "EPContext",
        [value.name for value in inputs],
        [value.name for value in outputs],
        name="ContextNode",
        domain="com.microsoft",
        embed_mode=0,  # ep_cache_context is a path, relative to the model
        ep_cache_context=IR,
        ep_sdk_version=sdk_version,
        main_context=1,
        max_size=0,
        source="OpenVINOExecutionProvider",
    )
    graph = helper.make_graph([node], "EP_Context_Model", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _value(port: Any) -> Any:
    # An input or output of the IR as one of ONNX; dimensions of any size have names.
    from onnx import helper

    name, kind = port.any_name, helper.np_dtype_to_tensor_dtype(port.element_type.to_dtype())
    shape = [size.get_length() if size.is_static else f"{name}_{axis}" for axis, size in enumerate(port.partial_shape)]
    return helper.make_tensor_value_info(name, kind, shape)


def _genai_config(
    ir: Path, manifest: VariantManifest, *, inputs: list[str], outputs: list[str], npu_lengths: dict[str, int]
) -> dict[str, Any]:
    # Format: https://onnxruntime.ai/docs/genai/reference/config.html
    config, generation = read_json(ir / "config.json"), read_json(ir / "generation_config.json")
    device, longest = manifest.runtime.devices[0], manifest.context["max_position_embeddings"]
    options = {"device_type": device, "enable_causallm": "True"}  # the IR keeps the keys and values itself
    if device == "NPU":
        longest = min(longest, sum(npu_lengths.values()))
        options["load_config"] = json.dumps({device: {name: str(length) for name, length in npu_lengths.items()}})
    return {
        "model": {
            "type": config["model_type"],
            "vocab_size": config["vocab_size"],
            "context_length": longest,
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": manifest.eos_token_ids,
            "pad_token_id": generation.get("pad_token_id", manifest.eos_token_ids[0]),
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": [{"OpenVINO": options}]},
                "filename": MODEL,
                "hidden_size": config["hidden_size"],
                "head_size": head_size(config),
                "num_attention_heads": config["num_attention_heads"],
                "num_key_value_heads": config["num_key_value_heads"],
                "num_hidden_layers": config["num_hidden_layers"],
                # With enable_causallm the provider itself feeds beam_idx.
                "inputs": {name: name for name in inputs if name != "beam_idx"},
                "outputs": {name: name for name in outputs},
            },
        },
        "search": {
            "max_length": longest,
            **{name: generation[name] for name in SAMPLING if name in generation},
        },
    }

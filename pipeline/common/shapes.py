"""The weight matrices of a Phi-3 checkpoint, as they follow from its config alone."""

from typing import Any


def tensors(config: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of every weight matrix of a Phi-3 checkpoint with this config, as in its headers."""
    hidden, width, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = hidden // config["num_attention_heads"]
    attention, values = config["num_attention_heads"] * head, 2 * config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden]}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.self_attn.qkv_proj.weight": [attention + values, hidden],
            f"{block}.self_attn.o_proj.weight": [hidden, attention],
            f"{block}.mlp.gate_up_proj.weight": [2 * width, hidden],
            f"{block}.mlp.down_proj.weight": [hidden, width],
        }
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = [vocabulary, hidden]
    return {name: (dtype(config), shape) for name, shape in shapes.items()}


def dtype(config: dict[str, Any]) -> str:
    """Return the type in which a checkpoint with this config stores its weights, such as bfloat16."""
    # Transformers 5 writes `dtype`, earlier versions write `torch_dtype`.
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")

"""Make twins of `smol-phi3`: checkpoints that compute the same function with other weights.

They show how far the model's figures depend on its particular weights.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.common.checkpoint import CONFIG_FILES, open_weights, read_json, tensor_shapes

Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def write_twin(checkpoint: Path, target: Path, change: Change) -> None:
    """Apply `change` to the float32 weights and the config of `checkpoint`, and write the result to `target`."""
    read, config = open_weights(checkpoint), read_json(checkpoint / "config.json")
    weights = {name: read(name).clone() for name in tensor_shapes(checkpoint)}
    change(weights, config)
    target.mkdir(parents=True)
    for name in CONFIG_FILES:
        if (checkpoint / name).exists():
            (target / name).write_bytes((checkpoint / name).read_bytes())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2), "utf-8")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def untie(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Give the model a head of its own, as Phi-3 has, so that it can be rotated."""
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    config["tie_word_embeddings"] = False


def leave_the_grid(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Move the layers' weights off the 4-bit grid on which they were published, with seeded random factors.

    The norms' weights are multiplied into the matrices that read them. Values and neurons are multiplied by factors,
    and the next matrix is divided by them.
    """
    generator = torch.Generator().manual_seed(0)
    head = config["hidden_size"] // config["num_attention_heads"]
    values = head * config["num_key_value_heads"]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        qkv, gate_up = weights[f"{block}.self_attn.qkv_proj.weight"], weights[f"{block}.mlp.gate_up_proj.weight"]
        for matrix, norm in ((qkv, "input_layernorm"), (gate_up, "post_attention_layernorm")):
            matrix *= weights[f"{block}.{norm}.weight"]
            weights[f"{block}.{norm}.weight"].fill_(1)
        factors = torch.rand(values, generator=generator) + 0.5
        qkv[-values:] *= factors[:, None]
        groups = config["num_attention_heads"] // config["num_key_value_heads"]
        weights[f"{block}.self_attn.o_proj.weight"] /= factors.view(-1, head).repeat_interleave(groups, 0).flatten()
        factors = torch.rand(config["intermediate_size"], generator=generator) + 0.5
        gate_up[config["intermediate_size"] :] *= factors[:, None]
        weights[f"{block}.mlp.down_proj.weight"] /= factors

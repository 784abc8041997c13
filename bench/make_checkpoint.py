"""Make a checkpoint of exactly Phi-3-mini-4k's shape with seeded random weights, to measure builds at full size."""

import json
import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from transformers import Phi3Config

SHAPE = Phi3Config(
    architectures=["Phi3ForCausalLM"],
    dtype="bfloat16",
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32064,
    max_position_embeddings=4096,
    original_max_position_embeddings=4096,
    sliding_window=2047,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=32000,
    pad_token_id=32000,
)


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("artifacts/smol-phi3/source"),
    show_default=True,
    help="Checkpoint whose tokenizer files are copied.",
)
@click.option("--layers", default=32, show_default=True, help="Fewer make a quicker trial.")
def main(target: Path, tokenizer: Path, layers: int) -> None:
    """Write a bf16 checkpoint of 3.8 billion random weights, in two shards, to the directory TARGET.

    Example: python bench/make_checkpoint.py ../random-phi-3-mini
    """
    target.mkdir(parents=True)
    config = SHAPE.to_dict() | {"num_hidden_layers": layers}
    (target / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": 32000}), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer / name, target / name)

    hidden, width, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden]}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.input_layernorm.weight": [hidden],
            f"{block}.self_attn.qkv_proj.weight": [3 * hidden, hidden],
            f"{block}.self_attn.o_proj.weight": [hidden, hidden],
            f"{block}.post_attention_layernorm.weight": [hidden],
            f"{block}.mlp.gate_up_proj.weight": [2 * width, hidden],
            f"{block}.mlp.down_proj.weight": [hidden, width],
        }
    shapes |= {"model.norm.weight": [hidden], "lm_head.weight": [vocabulary, hidden]}

    generator = torch.Generator().manual_seed(0)
    names = list(shapes)
    halves = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, part in halves.items():
        click.echo(f"{target / file}: {len(part)} tensors")
        weights = {
            name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            if len(shapes[name]) == 2
            else torch.ones(shapes[name], dtype=torch.bfloat16)
            for name in part
        }
        save_file(weights, target / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in halves.items() for name in part}
    (target / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8"
    )


if __name__ == "__main__":
    main()

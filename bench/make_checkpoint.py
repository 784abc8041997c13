"""Make a checkpoint of Phi-3-mini's shape that answers real questions: widen `smol-phi3`.

The result computes the same function as `smol-phi3`, up to the rounding to bfloat16. So its answers are real,
and every stage can be run at full size. Its matrices have the rank of the small model's, so what it loses by
quantization says that the machinery works, and not what Phi-3-mini loses.

The residual stream x of the small model becomes x P, where the rows of P are orthonormal. A matrix that writes to the
stream is multiplied by P, and one that reads from it by P' and by the factor that an RMS norm over more dimensions asks
for. Heads and neurons are copied, and their outputs have shares that add up to one.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from pipeline.common import paths
from pipeline.common.checkpoint import CONFIG_FILES, INDEX, LICENCE_FILES, open_weights, read_json

# Phi-3-mini-4k's config, but for the vocabulary, which is the small model's:
# https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/blob/main/config.json
SHAPE: dict[str, Any] = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
HEAD = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
SMOL_PHI3 = Path(__file__).parents[1] / paths.source("smol-phi3")
SHARD = 1.5e9  # bytes of a file, at most
NOISE = 1e-3  # standard deviation of weights that would be zero, as a part of the matrix's own
ECHO = 1e-4  # factor of what the layers add that the small model does not have
NORMS = {"self_attn.qkv_proj": "input_layernorm", "mlp.gate_up_proj": "post_attention_layernorm"}


class Widening:
    """The weights of the small `checkpoint` in the shape SHAPE, with `layers` layers; the same seed gives the same."""

    def __init__(self, checkpoint: Path, *, layers: int) -> None:
        self._read, self.small = open_weights(checkpoint), read_json(checkpoint / "config.json")
        self._random = torch.Generator().manual_seed(0)
        self._layers = layers
        hidden, wide = self.small["hidden_size"], SHAPE["hidden_size"]
        self._rows = torch.linalg.qr(torch.randn(wide, hidden, generator=self._random))[0].T  # (hidden, wide)
        self._factor = math.sqrt(hidden / wide)
        self._heads = self._copies(self.small["num_attention_heads"], SHAPE["num_attention_heads"])
        self._neurons = self._copies(self.small["intermediate_size"], SHAPE["intermediate_size"])
        # A rotary embedding turns dimension i of a head together with dimension i + half.
        narrow = self.small["hidden_size"] // self.small["num_attention_heads"]
        half = torch.arange(narrow // 2)
        self._dims = torch.cat([half, half + HEAD // 2])

    def config(self) -> dict[str, Any]:
        """Return the config of the widened model."""
        rotary = dict(self.small["rope_parameters"])
        narrow = self.small["hidden_size"] // self.small["num_attention_heads"]
        rotary["rope_theta"] **= HEAD / narrow  # so that the first dimensions turn as fast as in the small model
        changed = {"num_hidden_layers": self._layers, "rope_parameters": rotary}
        changed["rms_norm_eps"] = self.small["rms_norm_eps"] * self._factor**2
        return self.small | SHAPE | changed

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight with its name, in bfloat16."""
        yield "model.embed_tokens.weight", self._read("model.embed_tokens.weight") @ self._rows
        for layer in range(self._layers):
            source = f"model.layers.{layer % self.small['num_hidden_layers']}"
            share = 1.0 if layer < self.small["num_hidden_layers"] else ECHO
            block = f"model.layers.{layer}"
            for norm in NORMS.values():
                yield f"{block}.{norm}.weight", torch.ones(self._rows.shape[1])
            yield f"{block}.self_attn.qkv_proj.weight", self._qkv(source)
            yield f"{block}.self_attn.o_proj.weight", self._o(source) * share
            gate, up = self._reader(source, "mlp.gate_up_proj").chunk(2)
            yield f"{block}.mlp.gate_up_proj.weight", torch.cat([gate[self._neurons], up[self._neurons]])
            down = self._rows.T @ self._read(f"{source}.mlp.down_proj.weight")
            yield f"{block}.mlp.down_proj.weight", down[:, self._neurons] * self._shares(self._neurons) * share
        yield "model.norm.weight", torch.ones(self._rows.shape[1])
        head = self._read("lm_head.weight") * self._read("model.norm.weight")
        yield "lm_head.weight", head * self._factor @ self._rows

    def _reader(self, source: str, name: str) -> torch.Tensor:
        folded = self._read(f"{source}.{name}.weight") * self._read(f"{source}.{NORMS[name]}.weight")
        return folded * self._factor @ self._rows

    def _qkv(self, source: str) -> torch.Tensor:
        heads, groups = self.small["num_attention_heads"], self.small["num_key_value_heads"]
        narrow = self.small["hidden_size"] // heads
        fused = self._reader(source, "self_attn.qkv_proj").view(heads + 2 * groups, narrow, -1)
        query, key, value = fused.split([heads, groups, groups])
        group = self._heads // (heads // groups)
        # The attention divides its scores by the root of a head's dimensions.
        parts = (query[self._heads] * math.sqrt(HEAD / narrow), key[group], value[group])
        return torch.cat([self._spread(part, dim=1).flatten(0, 1) for part in parts])

    def _o(self, source: str) -> torch.Tensor:
        heads = self.small["num_attention_heads"]
        written = (self._rows.T @ self._read(f"{source}.self_attn.o_proj.weight")).view(len(self._rows.T), heads, -1)
        return self._spread(written[:, self._heads] * self._shares(self._heads)[:, None], dim=2).flatten(1, 2)

    def _spread(self, weights: torch.Tensor, *, dim: int) -> torch.Tensor:
        # Give the dimensions of the small heads their places in the wide ones, and noise to the others.
        shape = list(weights.shape)
        shape[dim] = HEAD
        wide = torch.randn(shape, generator=self._random) * (NOISE * weights.std())
        return wide.index_copy_(dim, self._dims, weights)

    def _copies(self, count: int, wanted: int) -> torch.Tensor:
        # For each of the `wanted` heads or neurons, the one of the small model that it is a copy of, in random order.
        return (torch.arange(wanted) % count)[torch.randperm(wanted, generator=self._random)]

    def _shares(self, copies: torch.Tensor) -> torch.Tensor:
        # Random shares which add up to one for all copies of the same head or neuron.
        shares = torch.rand(len(copies), generator=self._random) + 0.5
        return shares / torch.zeros(int(copies.max()) + 1).index_add_(0, copies, shares)[copies]


def widen(checkpoint: Path, target: Path, *, layers: int) -> None:
    """Write the widened `checkpoint` to the new directory `target`, in shards of at most SHARD bytes."""
    target.mkdir(parents=True)
    for name in (*CONFIG_FILES, *LICENCE_FILES):
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, target / name)
    widening = Widening(checkpoint, layers=layers)
    (target / "config.json").write_text(json.dumps(widening.config(), indent=2), "utf-8")
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def write() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        click.echo(f"{target / file}: {len(shard)} tensors")
        save_file(shard, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, weight in widening.weights():
        if shard and sum(tensor.nbytes for tensor in shard.values()) + weight.numel() * 2 > SHARD:
            write()
        shard[name] = weight.bfloat16().contiguous()
    write()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=SMOL_PHI3,
    show_default="artifacts/smol-phi3/source",
    help="The checkpoint of smol-phi3.",
)
@click.option("--layers", default=SHAPE["num_hidden_layers"], show_default=True, help="Fewer make a quicker trial.")
def main(target: Path, source: Path, layers: int) -> None:
    """Write a bfloat16 checkpoint of 3.9 billion weights, 7.9 GB, to the directory TARGET.

    Example: python -m bench.make_checkpoint ../full-size
    """
    widen(source, target, layers=layers)


if __name__ == "__main__":
    main()

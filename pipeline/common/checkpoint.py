"""A checkpoint on disk in Hugging Face's layout: its config, its tensors' shapes, its conversion to float16."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.common.errors import PipelineError
from pipeline.common.progress import Bar

CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE.md", "NOTICE", "NOTICE.txt")
INDEX = "model.safetensors.index.json"


def is_wanted(name: str, *, code: bool = False) -> bool:
    """Return whether a file belongs to a checkpoint: weights as safetensors, configs, tokenizer, licence.

    `code` also admits the repository's Python modules. Only files of the top folder are wanted.
    """
    return (
        name in (*CONFIG_FILES, *LICENCE_FILES, INDEX)
        or (name.endswith(".safetensors") and "/" not in name and name.startswith("model"))
        or (code and name.endswith(".py") and "/" not in name)
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raise PipelineError when it is missing or not a JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise PipelineError(f"{path} is missing: build or download again what it belongs to.") from error
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path} is not valid JSON ({error}): build or download it again.") from error
    if not isinstance(content, dict):
        raise PipelineError(f"{path} does not hold a JSON object: build or download it again.")
    return content


def shards(checkpoint: Path) -> list[Path]:
    """Return the safetensors files of `checkpoint`; raise PipelineError when there is none or one is missing."""
    if (checkpoint / INDEX).exists():
        names = sorted(set(read_json(checkpoint / INDEX).get("weight_map", {}).values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not is_wanted(str(name)) or not (checkpoint / name).is_file()]
    if missing or not names:
        raise PipelineError(
            f"{checkpoint} lacks {missing[0] if missing else 'its weights'}: a checkpoint needs model.safetensors, or "
            "an index with all its shards; pickle weights (.bin, .pt) are refused."
        )
    return [checkpoint / name for name in names]


def tensor_shapes(checkpoint: Path) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of every tensor of `checkpoint` by name, from the shards' headers alone.

    Raises PipelineError when a shard is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, tuple[str, list[int]]] = {}
    for shard in shards(checkpoint):
        try:
            with safe_open(shard, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  it is no dictionary
                    entry = file.get_slice(name)
                    tensors[name] = (entry.get_dtype(), entry.get_shape())
        except SafetensorError as error:
            raise PipelineError(f"{shard} is damaged ({error}): download it again.") from error
    return tensors


def open_weights(checkpoint: Path) -> Callable[[str], Any]:
    """Return a function that reads a weight of `checkpoint` by its name, in float32.

    For `lm_head.weight` of a checkpoint without a head of its own, it returns the embedding, which is then the head.
    """
    from safetensors import safe_open

    files: list[Any] = [safe_open(shard, framework="pt") for shard in shards(checkpoint)]
    places = {name: file for file in files for name in file.keys()}  # noqa: SIM118  `file` is not a dictionary

    def read(name: str) -> Any:
        if name == "lm_head.weight" and name not in places:
            name = "model.embed_tokens.weight"
        return places[name].get_tensor(name).float()

    return read


def check(checkpoint: Path) -> None:
    """Raise PipelineError unless `checkpoint` is a complete checkpoint of the Phi-3 architecture with a tokenizer."""
    config = read_json(checkpoint / "config.json")
    if config.get("architectures") != ["Phi3ForCausalLM"]:
        raise PipelineError(
            f"{checkpoint / 'config.json'} says architectures {config.get('architectures')}: this pipeline builds "
            "Phi3ForCausalLM only."
        )
    tensor_shapes(checkpoint)
    if not (checkpoint / "tokenizer.json").is_file():
        raise PipelineError(f"{checkpoint / 'tokenizer.json'} is missing: the runtimes need the fast tokenizer's file.")


def eos_token_ids(checkpoint: Path) -> list[int]:
    """Return all token ids that end generation: those of generation_config.json, else of config.json, sorted."""
    generation = checkpoint / "generation_config.json"
    for content in (read_json(generation) if generation.exists() else {}, read_json(checkpoint / "config.json")):
        if (eos := content.get("eos_token_id")) is not None:
            return sorted({eos} if isinstance(eos, int) else set(eos))
    raise PipelineError(f"{checkpoint} names no eos_token_id: generation would never stop; add it to config.json.")


def to_float16(checkpoint: Path, target: Path, *, weight: Callable[[str], Any] | None = None) -> None:
    """Write `checkpoint` to the directory `target` with all weights in float16, one at a time in memory.

    `weight`, when given, returns the weight to write for a name, in place of the checkpoint's own.

    Raises PipelineError when a weight does not fit into float16.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    half = torch.empty(0, dtype=torch.float16)  # reused for all weights, so the kernel clears its pages once
    for shard in shards(checkpoint):
        with safe_open(shard, framework="pt") as tensors:
            for name in Bar(tensors.keys(), desc=f"{shard.name} to float16"):
                tensor = weight(name) if weight else tensors.get_tensor(name)
                half.resize_(tensor.shape).copy_(tensor)
                if not torch.isfinite(torch.stack(torch.aminmax(half))).all():
                    raise PipelineError(f"{shard}: {name} has values beyond float16 (±65504): it has no FP16 form.")
                weight_map[name] = f"model-{len(weight_map) + 1:05d}.safetensors"
                save_file({name: half}, target / weight_map[name], metadata={"format": "pt"})
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
    for path in checkpoint.iterdir():
        if path.name in CONFIG_FILES or path.suffix == ".py":
            (target / path.name).write_bytes(path.read_bytes())
    config = read_json(target / "config.json") | {"dtype": "float16"}
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(config, indent=2), "utf-8")

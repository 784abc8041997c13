"""A checkpoint on disk in Hugging Face's layout: its config, its tensors' shapes, its conversion to float16."""

import json
from collections.abc import Callable, Iterator
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
ROWS = 4096  # of an embedding, compared at a time


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


def tensor_shapes(checkpoint: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor in the files of `checkpoint` by name, from the shards' headers alone.

    Raises PipelineError when a shard is missing, truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for shard in shards(checkpoint):
        try:
            with safe_open(shard, framework="np") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  no dictionary
        except SafetensorError as error:
            raise PipelineError(f"{shard} is damaged ({error}): download it again.") from error
    return shapes


def expected_shapes(config: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Yield name and shape of every tensor that a Phi-3 checkpoint with this config needs.

    A checkpoint whose embedding is also its head needs no head of its own.
    """
    hidden, width, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, key_value_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = head_size(config)
    yield "model.embed_tokens.weight", [vocabulary, hidden]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", [hidden]
        yield f"{block}.self_attn.qkv_proj.weight", [(heads + 2 * key_value_heads) * head, hidden]
        yield f"{block}.self_attn.o_proj.weight", [hidden, heads * head]
        yield f"{block}.post_attention_layernorm.weight", [hidden]
        yield f"{block}.mlp.gate_up_proj.weight", [2 * width, hidden]
        yield f"{block}.mlp.down_proj.weight", [hidden, width]
    yield "model.norm.weight", [hidden]
    if not config.get("tie_word_embeddings", False):
        yield "lm_head.weight", [vocabulary, hidden]


def head_size(config: dict[str, Any]) -> int:
    """Return the width of an attention head of a model with `config`."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def weights_dtype(config: dict[str, Any]) -> str:
    """Return the type in which a checkpoint with this config stores its weights, such as bfloat16."""
    # Transformers 5 writes `dtype`, earlier versions write `torch_dtype`.
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def open_weights(checkpoint: Path) -> Callable[[str], Any]:
    """Return a function that reads a weight of `checkpoint` by its name, in float32.

    For `lm_head.weight` of a checkpoint without a head of its own, it returns the embedding, which is then the head.
    """
    places = _places(checkpoint)

    def read(name: str) -> Any:
        if name == "lm_head.weight" and name not in places:
            name = "model.embed_tokens.weight"
        return places[name].get_tensor(name).float()

    return read


def _places(checkpoint: Path) -> dict[str, Any]:
    # Return the open file that has each tensor, by the tensor's name.
    from safetensors import safe_open

    files: list[Any] = [safe_open(shard, framework="pt") for shard in shards(checkpoint)]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118  `file` is not a dictionary


def check(checkpoint: Path) -> None:
    """Raise PipelineError unless `checkpoint` is a complete checkpoint of the Phi-3 architecture with a tokenizer.

    Tensors beyond those that the architecture needs are ignored, as transformers ignores them.
    """
    check_architecture(checkpoint)
    _check_tensors(checkpoint)
    _check_head(checkpoint)
    if not (checkpoint / "tokenizer.json").is_file():
        raise PipelineError(f"{checkpoint / 'tokenizer.json'} is missing: the runtimes need the fast tokenizer's file.")


def check_architecture(checkpoint: Path) -> None:
    """Raise PipelineError unless the config of `checkpoint` says Phi3ForCausalLM."""
    config = read_json(checkpoint / "config.json")
    if config.get("architectures") != ["Phi3ForCausalLM"]:
        raise PipelineError(
            f"{checkpoint / 'config.json'} says architectures {config.get('architectures')}: this pipeline builds "
            "Phi3ForCausalLM only."
        )
    rope = config.get("rope_scaling")
    if isinstance(rope, dict) and rope.get("type") == "su":
        raise PipelineError(
            f"{checkpoint / 'config.json'} says rope_scaling of type su, which transformers 5 cannot load: write "
            "longrope, its newer name."
        )


def _check_tensors(checkpoint: Path) -> None:
    # Transformers loads a checkpoint without a norm, too: it takes one of ones, which is another model.
    config, found = checkpoint / "config.json", tensor_shapes(checkpoint)
    try:
        for name, shape in expected_shapes(read_json(config)):
            if found.get(name) != shape:
                weights = INDEX if (checkpoint / INDEX).exists() else "model.safetensors"
                fault = f"has it with the shape {found[name]}" if name in found else "lacks it"
                raise PipelineError(
                    f"{config} asks for the tensor {name} of the shape {shape}, and {weights} {fault}: export or "
                    "download the checkpoint again."
                )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise PipelineError(f"{config} does not describe a Phi-3 model ({error!r}): download it again.") from error


def _check_head(checkpoint: Path) -> None:
    # A head that differs from the embedding is used by transformers 5, whatever the config says, and dropped by
    # onnxruntime-genai's builder.
    config = read_json(checkpoint / "config.json")
    if not config.get("tie_word_embeddings", False) or "lm_head.weight" not in tensor_shapes(checkpoint):
        return
    places = _places(checkpoint)
    head, embedding = (places[name].get_slice(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    rows = [slice(start, start + ROWS) for start in range(0, config["vocab_size"], ROWS)]
    if not all((head[part] == embedding[part]).all() for part in rows):
        raise PipelineError(
            f"{checkpoint / 'config.json'} says tie_word_embeddings, but lm_head.weight differs from the embedding: "
            "write false there, or remove the head."
        )


def eos_token_ids(checkpoint: Path) -> list[int]:
    """Return all token ids that end generation: those of generation_config.json, else of config.json, sorted.

    Raises PipelineError when neither names any.
    """
    generation = checkpoint / "generation_config.json"
    for content in (read_json(generation) if generation.exists() else {}, read_json(checkpoint / "config.json")):
        if (eos := content.get("eos_token_id")) is not None:
            return as_list(eos)
    raise PipelineError(f"{checkpoint} names no eos_token_id: generation would never stop; add it to config.json.")


def as_list(eos: int | list[int]) -> list[int]:
    """Return the ids of an `eos_token_id`, which configs have as one id or as a list, sorted."""
    return sorted({eos} if isinstance(eos, int) else set(eos))


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
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8", newline="\n")
    for path in checkpoint.iterdir():
        if path.name in CONFIG_FILES or path.suffix == ".py":
            (target / path.name).write_bytes(path.read_bytes())
    config = read_json(target / "config.json") | {"dtype": "float16"}
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(config, indent=2), "utf-8", newline="\n")

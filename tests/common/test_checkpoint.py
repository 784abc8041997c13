"""Checkpoints are read without trusting their files."""

import json
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.common import checkpoint
from pipeline.common.errors import PipelineError
from pipeline.common.matrices import Matrix, matrices
from tests.checkpoints import STYLES, make_checkpoint
from tests.helpers import edit_json


def test_shapes_of_a_real_checkpoint(tiny_checkpoint):
    """The shards' headers give every tensor's shape, and from these the weight matrices and their roles."""
    shapes = checkpoint.tensor_shapes(tiny_checkpoint)
    assert shapes["model.layers.1.mlp.gate_up_proj.weight"] == [512, 128]
    assert matrices(shapes)[0] == Matrix("lm_head.weight", "head", 320, 128)
    assert [matrix.role for matrix in matrices(shapes)].count("layer") == 8


@pytest.mark.parametrize(("more", "size"), [({}, 96), ({"head_dim": None}, 96), ({"head_dim": 128}, 128)])
def test_head_size(more, size):
    """Heads share the hidden size, unless the config gives them a width of their own, as transformers reads it."""
    assert checkpoint.head_size({"hidden_size": 3072, "num_attention_heads": 32} | more) == size


@pytest.mark.parametrize("style", STYLES)
def test_shapes_follow_from_the_config(tmp_path, style):
    """The config of every Phi model gives exactly the tensors that are in its checkpoint, which is complete."""
    folder = make_checkpoint(tmp_path / "checkpoint", style)
    expected = checkpoint.expected_shapes(checkpoint.read_json(folder / "config.json"))
    assert dict(expected) == checkpoint.tensor_shapes(folder)
    checkpoint.check(folder)


def changed_checkpoint(source, folder, *, config=None, **changes):
    """Write to `folder` the checkpoint `source` with changes of its config, and of its tensors: None removes one."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    edit_json(folder / "config.json", **config or {})
    weights = load_file(folder / "model.safetensors") | changes
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("config", "changes", "fault"),
    [
        ({}, {"model.norm.weight": None}, "model.norm.weight of the shape [128], and model.safetensors lacks it"),
        ({}, {"lm_head.weight": None}, "lm_head.weight of the shape [320, 128], and model.safetensors lacks it"),
        (
            {"num_hidden_layers": 10**9},
            {},
            "model.layers.2.input_layernorm.weight of the shape [128], and model.safetensors lacks it",
        ),
        (
            {},
            {"model.norm.weight": torch.ones(64)},
            "model.norm.weight of the shape [128], and model.safetensors has it with the shape [64]",
        ),
    ],
)
def test_an_incomplete_checkpoint(tiny_checkpoint, tmp_path, config, changes, fault):
    """A tensor that is missing or has another shape than the config's is named: transformers would make one up."""
    changed_checkpoint(tiny_checkpoint, tmp_path, config=config, **changes)
    with pytest.raises(PipelineError) as refused:
        checkpoint.check(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path / 'config.json'} asks for the tensor {fault}: export or download the checkpoint again."
    )


def test_more_tensors_than_needed(tiny_checkpoint, tmp_path):
    """Tensors that the model does not load, such as the rotary frequencies of older checkpoints, are no fault."""
    changed_checkpoint(tiny_checkpoint, tmp_path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    checkpoint.check(tmp_path)


def test_a_head_beside_a_tied_embedding(tiny_checkpoint, tmp_path, monkeypatch):
    """A checkpoint that is tied may store its head, too, but not one that differs from its embedding in any row."""
    monkeypatch.setattr(checkpoint, "ROWS", 100)
    tied = {"tie_word_embeddings": True}
    head = load_file(tiny_checkpoint / "model.safetensors")["model.embed_tokens.weight"].clone()
    changed_checkpoint(tiny_checkpoint, tmp_path, config=tied, **{"lm_head.weight": head})
    checkpoint.check(tmp_path)
    head[-1, -1] += 1
    changed_checkpoint(tiny_checkpoint, tmp_path, config=tied, **{"lm_head.weight": head})
    with pytest.raises(
        PipelineError, match=r"says tie_word_embeddings, but lm_head\.weight differs from the embedding"
    ):
        checkpoint.check(tmp_path)


def test_an_older_name_of_longrope(tiny_checkpoint, tmp_path):
    """A checkpoint with rope_scaling of type su, which transformers 5 cannot load, is refused with the newer name."""
    changed_checkpoint(tiny_checkpoint, tmp_path, config={"rope_scaling": {"type": "su"}})
    with pytest.raises(PipelineError, match=r"rope_scaling of type su, .*: write longrope, its newer name\.$"):
        checkpoint.check(tmp_path)


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_hidden_layers": None}])
def test_a_config_of_nothing(tiny_checkpoint, tmp_path, change):
    """A config that describes no model is refused by its name."""
    changed_checkpoint(tiny_checkpoint, tmp_path, config=change)
    with pytest.raises(
        PipelineError, match=r"config\.json does not describe a Phi-3 model \(.*\): download it again\."
    ):
        checkpoint.check(tmp_path)


def test_to_float16_streams_every_tensor(tiny_checkpoint, tmp_path):
    """The float16 copy has all tensors, and its config names float16."""
    checkpoint.to_float16(tiny_checkpoint, tmp_path)
    written = {name: tensor for shard in checkpoint.shards(tmp_path) for name, tensor in load_file(shard).items()}
    source = load_file(tiny_checkpoint / "model.safetensors")
    assert {name: tensor.half().tolist() for name, tensor in source.items()} == {
        name: tensor.tolist() for name, tensor in written.items()
    }
    assert checkpoint.read_json(tmp_path / "config.json")["dtype"] == "float16"


@pytest.mark.parametrize("value", [70000.0, -70000.0, float("nan")])
def test_values_beyond_float16(tmp_path, value):
    """A weight that float16 cannot hold is refused by name instead of becoming infinite."""
    (tmp_path / "half").mkdir()
    save_file({"w": torch.tensor([[1.0, value, 2.0]])}, tmp_path / "model.safetensors")
    with pytest.raises(PipelineError, match=r"w has values beyond float16 \(±65504\)"):
        checkpoint.to_float16(tmp_path, tmp_path / "half")


HEADER = json.dumps({"w": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\0\0",
        struct.pack("<Q", 2**63) + HEADER,
        struct.pack("<Q", len(HEADER)) + HEADER + b"1234567",
        struct.pack("<Q", len(HEADER)) + HEADER + b"123456789",
        struct.pack("<Q", 4) + b"[[[[",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 7) + b'{"w":1}',
    ],
)
def test_a_damaged_shard(tmp_path, content):
    """Truncated, oversized and malformed shards are refused with a sentence, from their headers alone."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(PipelineError, match=r"model\.safetensors is damaged \(.*\): download it again\."):
        checkpoint.tensor_shapes(tmp_path)


def test_pickle_weights_are_no_weights(tmp_path):
    """A checkpoint with only pickle weights is refused, and so is an index that names them or leads out."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "pytorch_model.bin").touch()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(PipelineError, match=r"lacks model\.safetensors: .* pickle weights \(\.bin, \.pt\) are refused"):
        checkpoint.shards(folder)
    for name in ("../model.safetensors", "pytorch_model.bin"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(PipelineError, match=f"lacks {re.escape(name)}"):
            checkpoint.shards(folder)


def test_another_architecture(tiny_checkpoint, tmp_path):
    """A checkpoint of another architecture is refused before any work."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(PipelineError, match=r"says architectures \['LlamaForCausalLM'\]: this pipeline builds Phi3"):
        checkpoint.check(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [([32007, 32000], 2, [32000, 32007]), (7, 2, [7]), (None, 2, [2])],
)
def test_eos_token_ids(tmp_path, generation, config, ids):
    """All eos ids of generation_config.json count; without them the one of config.json does."""
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    assert checkpoint.eos_token_ids(tmp_path) == ids


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is missing: build or download again what it belongs to."),
        ("{", "is not valid JSON (Expecting property name"),
        ("[1]", "does not hold a JSON object: build or download it again."),
    ],
)
def test_a_json_file_that_cannot_be_read(tmp_path, content, reason):
    """A file that is missing or holds no JSON object is refused by its name."""
    path = tmp_path / "config.json"
    if content:
        path.write_text(content)
    with pytest.raises(PipelineError) as refused:
        checkpoint.read_json(path)
    assert str(refused.value).startswith(f"{path} {reason}")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("tokenizer.json", True),
        ("LICENSE", True),
        ("pytorch_model.bin", False),
        ("model.pt", False),
        ("modeling_phi3.py", False),
        ("onnx/model.safetensors", False),
        ("adapter.safetensors", False),
        ("README.md", False),
    ],
)
def test_wanted_files(name, wanted):
    """Only weights as safetensors, configs, tokenizer and licence belong to a checkpoint."""
    assert checkpoint.is_wanted(name) is wanted

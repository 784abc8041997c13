"""The checkpoint at full size, on which the benches run, says what the small model says."""

import torch
from transformers import AutoModelForCausalLM

from bench import make_checkpoint
from pipeline.common.checkpoint import check, tensor_shapes
from tests.checkpoints import make_checkpoint as tiny

WIDE = {"hidden_size": 384, "intermediate_size": 700, "num_attention_heads": 8, "num_key_value_heads": 8}
WIDE |= {"num_hidden_layers": 4, "max_position_embeddings": 512, "original_max_position_embeddings": 512}


def test_the_widened_model_computes_the_same(tmp_path, monkeypatch):
    """With more and wider heads, neurons and layers the checkpoint is whole, and its logits differ by rounding."""
    small = tiny(tmp_path / "small", on_grid=True, num_key_value_heads=2, sliding_window=None, tie_word_embeddings=True)
    monkeypatch.setattr(make_checkpoint, "SHAPE", make_checkpoint.SHAPE | WIDE)
    monkeypatch.setattr(make_checkpoint, "HEAD", 48)
    monkeypatch.setattr(make_checkpoint, "SHARD", 1e6)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    for name, parameter in model.named_parameters():  # norms that do something
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(small)
    make_checkpoint.widen(small, tmp_path / "wide", layers=4)
    check(tmp_path / "wide")
    assert len(list((tmp_path / "wide").glob("model-*.safetensors"))) > 1
    assert tensor_shapes(tmp_path / "wide")["model.layers.3.self_attn.qkv_proj.weight"] == [3 * 8 * 48, 384]
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)
    ids = torch.arange(20, 120)[None]
    with torch.inference_mode():
        expected, found = (torch.log_softmax(model(ids).logits[0], dim=1) for model in (model, wide))
    divergence = (expected.exp() * (expected - found)).sum(dim=1)
    assert divergence.mean() < 0.01

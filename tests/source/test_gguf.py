"""A Llama in GGUF becomes a Phi-3 checkpoint with the same mathematics and the same tokenizer, or is refused."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.common.checkpoint import check, eos_token_ids
from pipeline.common.errors import PipelineError
from pipeline.source.gguf import convert_gguf
from tests.checkpoints import make_tokenizer

HEADS, KEY_VALUE_HEADS = 4, 2


def interleave(weight, heads):
    """Return a query or key projection as llama.cpp stores it: rotary pairs side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny random Llama, and the same model as a GGUF file in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    model = LlamaForCausalLM(config).eval()
    tokenizer = make_tokenizer("the capital of France is Paris " * 9)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model, tokenizer)
    return model, path


def write_gguf(path, model, tokenizer, *, more=()):
    """Write `model` with `tokenizer` the way llama.cpp's converter does, and the tensors `more`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(300)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(300 - len(tokens))]
    special = set(tokenizer.all_special_tokens) | {"<|user|>", "<|assistant|>", "<|system|>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template(tokenizer.chat_template)
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(2) for ours, theirs in parts.items()}
    for ours, theirs in names.items():
        weight = weights[f"{ours}.weight"]
        if theirs.endswith(("attn_q", "attn_k")):
            weight = interleave(weight, HEADS if theirs.endswith("q") else KEY_VALUE_HEADS)
        writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(weight))
    for name in more:
        writer.add_tensor(name, np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_same_logits(llama, tmp_path):
    """The Phi-3 form's logits equal the Llama original's to the last bit."""
    model, path = llama
    convert_gguf(path, tmp_path)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        assert torch.equal(converted(ids).logits, model(ids).logits)


def test_a_complete_checkpoint(llama, tmp_path):
    """The Phi-3 form is a complete checkpoint with the special tokens that the file names."""
    convert_gguf(llama[1], tmp_path)
    check(tmp_path)
    assert eos_token_ids(tmp_path) == [1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)


def test_tokenizer(llama, tmp_path):
    """The tokenizer splits digits, keeps special tokens whole, round-trips, and renders chats."""
    convert_gguf(llama[1], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("<|user|>Paris 42é<|end|>")
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<|user|>"
    assert {"4", "2"} <= set(tokenizer.convert_ids_to_tokens(ids))
    assert tokenizer.decode(ids) == "<|user|>Paris 42é<|end|>"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|user|>\nHi<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_a_truncated_file(llama, tmp_path, size):
    """A GGUF file that was cut off is refused with a sentence."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(llama[1].read_bytes()[:size])
    with pytest.raises(PipelineError, match=r"cut\.gguf is not a complete GGUF file"):
        convert_gguf(cut, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("general.architecture", "mamba", "llama"),
        ("tokenizer.ggml.model", "llama", "gpt2"),
        ("tokenizer.ggml.pre", "llama-bpe", "smollm"),
        ("llama.rope.scaling.type", "linear", "none"),
    ],
)
def test_another_kind_of_model(tmp_path, key, value, supported):
    """A GGUF whose architecture, tokenizer, way to split text or rotary embedding differs is refused by its name."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", value if key == "general.architecture" else "llama")
    if key != "general.architecture":
        writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(PipelineError) as refused:
        convert_gguf(tmp_path / "x.gguf", tmp_path)
    assert str(refused.value) == f"x.gguf has {value!r} as {key}: only {supported!r} can be rewritten as Phi-3."


@pytest.mark.parametrize("name", ["output.weight", "rope_freqs.weight", "blk.1.attn_q.bias"])
def test_a_tensor_without_a_place(llama, tmp_path, name):
    """A Llama with a head of its own, rotary factors or biases is refused: without them it would be another model."""
    write_gguf(tmp_path / "x.gguf", llama[0], make_tokenizer(), more=[name])
    with pytest.raises(PipelineError) as refused:
        convert_gguf(tmp_path / "x.gguf", tmp_path)
    assert str(refused.value) == (
        f"x.gguf has the tensor {name}, for which the Phi-3 form has no place: only a model whose head is its "
        "embedding, without biases and rotary factors, can be rewritten."
    )

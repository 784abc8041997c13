"""Rewrite a Llama checkpoint in GGUF as a Phi-3 checkpoint that computes the same.

GGUF format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from pathlib import Path
from typing import Any

from pipeline.common.errors import PipelineError, full_disk

CONTROL_TOKEN = 3  # a value of tokenizer.ggml.token_type
# What can be rewritten. A file that lacks one of these keys is taken to have its value.
SUPPORTED = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",  # byte-level BPE
    "tokenizer.ggml.pre": "smollm",  # digits are tokens of their own
    "llama.rope.scaling.type": "none",
}


def convert_gguf(gguf_file: Path, target: Path) -> None:
    """Write `gguf_file` into the directory `target` as a float32 Phi-3 checkpoint with its tokenizer.

    The logits of the result equal the Llama original's: q, k, v become `qkv_proj` and gate, up become
    `gate_up_proj`, concatenated on the output dimension.

    Raises PipelineError when the file is not a complete GGUF, or holds what the result would not have: another
    architecture or tokenizer than SmolLM's, a head of its own, biases, or scaled rotary embeddings.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(gguf_file)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        for key, supported in SUPPORTED.items():
            if metadata.get(key, supported) != supported:
                raise PipelineError(
                    f"{gguf_file.name} has {metadata[key]!r} as {key}: only {supported!r} can be rewritten as Phi-3."
                )
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        _write_weights(tensors, metadata, target)
        if tensors:
            raise PipelineError(
                f"{gguf_file.name} has the tensor {min(tensors)}, for which the Phi-3 form has no place: only a model "
                "whose head is its embedding, without biases and rotary factors, can be rewritten."
            )
        _write_config(metadata, target)
        _write_tokenizer(metadata, target)
    except (PipelineError, MemoryError):
        raise
    except Exception as error:  # hostile bytes can make the reader and the tokenizer raise anything
        if full_disk(error):
            raise
        raise PipelineError(
            f"{gguf_file.name} is not a complete GGUF file ({error!r}): fetch it again, or check the pinned package."
        ) from error


def _write_weights(tensors: dict[str, Any], metadata: dict[str, Any], target: Path) -> None:
    # Takes what it writes out of `tensors`.
    import numpy as np
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    def weight(*names: str) -> Any:
        taken = [tensors.pop(name) for name in names]
        return np.concatenate([dequantize(tensor.data, tensor.tensor_type) for tensor in taken])

    def rotated(name: str, heads: int) -> Any:
        # GGUF interleaves the two halves that rotary embedding pairs; transformers keeps them apart.
        interleaved = weight(name)
        return interleaved.reshape(heads, -1, 2, interleaved.shape[1]).swapaxes(1, 2).reshape(interleaved.shape)

    weights = {
        "model.embed_tokens.weight": weight("token_embd.weight"),
        "model.norm.weight": weight("output_norm.weight"),
    }
    for layer in range(metadata["llama.block_count"]):
        source, block = f"blk.{layer}", f"model.layers.{layer}"
        weights |= {
            f"{block}.input_layernorm.weight": weight(f"{source}.attn_norm.weight"),
            f"{block}.self_attn.qkv_proj.weight": np.concatenate(
                [
                    rotated(f"{source}.attn_q.weight", metadata["llama.attention.head_count"]),
                    rotated(f"{source}.attn_k.weight", metadata["llama.attention.head_count_kv"]),
                    weight(f"{source}.attn_v.weight"),
                ]
            ),
            f"{block}.self_attn.o_proj.weight": weight(f"{source}.attn_output.weight"),
            f"{block}.post_attention_layernorm.weight": weight(f"{source}.ffn_norm.weight"),
            f"{block}.mlp.gate_up_proj.weight": weight(f"{source}.ffn_gate.weight", f"{source}.ffn_up.weight"),
            f"{block}.mlp.down_proj.weight": weight(f"{source}.ffn_down.weight"),
        }
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def _write_config(metadata: dict[str, Any], target: Path) -> None:
    from transformers import GenerationConfig, Phi3Config

    token_ids = {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }
    Phi3Config(
        architectures=["Phi3ForCausalLM"],
        dtype="float32",
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        vocab_size=metadata["llama.vocab_size"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        max_position_embeddings=metadata["llama.context_length"],
        original_max_position_embeddings=metadata["llama.context_length"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": metadata["llama.rope.freq_base"],
            "partial_rotary_factor": 1.0,
        },
        sliding_window=None,
        tie_word_embeddings=True,
        **token_ids,
    ).save_pretrained(target)
    GenerationConfig(**token_ids).save_pretrained(target)


def _write_tokenizer(metadata: dict[str, Any], target: Path) -> None:
    # transformers' own conversion picks another pre-tokenizer and decoder, and makes eos the bos token.
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(target)

"""Tiny random checkpoints in the style of the Phi models, for shapes and formats."""

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0] * 16, "short_factor": [1.0] * 16}
STYLES = {
    "phi-3-4k": {"sliding_window": 2047, "tie_word_embeddings": False},
    "phi-3-128k": {
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 128,
        "rope_parameters": LONGROPE | {"original_max_position_embeddings": 128, "partial_rotary_factor": 1.0},
    },
    "phi-4-mini": {
        "tie_word_embeddings": True,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 128,
        "partial_rotary_factor": 0.75,
        "rope_parameters": LONGROPE
        | {
            "original_max_position_embeddings": 128,
            "partial_rotary_factor": 0.75,
            "long_factor": [4.0] * 24,
            "short_factor": [1.0] * 24,
        },
    },
}


def make_tokenizer(text: str = "the capital of France is Paris and water is wet 0123456789"):
    """Return a byte-level BPE tokenizer with Phi-3's chat tokens, trained on `text`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def make_sentencepiece():
    """Return a tokenizer of single characters in SentencePiece's form, as Phi-3-mini's: a mark where a word begins,
    other characters as bytes, and chat tokens that take the spaces after them."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    chat = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer.add_special_tokens(
        [AddedToken("<|endoftext|>", normalized=False), *(AddedToken(t, rstrip=True, normalized=False) for t in chat)]
    )
    special = {"bos_token": "<s>", "unk_token": "<unk>"} | dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


def make_checkpoint(target: Path, style: str = "phi-3-4k", *, on_grid: bool = False, **changes: Any) -> Path:
    """Write a tiny random bf16 checkpoint in the style of a Phi model (see STYLES) to `target`.

    `changes` are keys of its config. With `on_grid` INT4 stores every matrix without loss, in any format, so that all
    variants are the same model; its weights are larger, and its distributions far from uniform.
    """
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    shape = {
        "vocab_size": 320,  # differs from all layers' widths: the ONNX builder recognizes the head by its shape
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**shape | STYLES[style] | changes))
    if on_grid:
        # With these scales the next token depends strongly on the tokens attended to.
        scales = {"embed_tokens": 8, "lm_head": 16, "qkv_proj": 32, "o_proj": 16, "gate_up_proj": 64, "down_proj": 64}
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                codes = torch.randint(-7, 8, parameter.shape)
                groups = codes.view(-1, 32)  # each has both ends of the range, which determine its scale
                groups.scatter_(1, groups.argmin(1, keepdim=True), -8).scatter_(1, groups.argmax(1, keepdim=True), 7)
                parameter.data.copy_(codes / scales[name.split(".")[-2]])
    model.generation_config.eos_token_id = [0, 1]
    model.generation_config.pad_token_id = 0
    model.to(torch.bfloat16).save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    config = json.loads((target / "config.json").read_text("utf-8"))
    rope = config.pop("rope_parameters")  # the Hub's configs have an older form
    config |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0)}
    if rope["rope_type"] == "longrope":
        config["rope_scaling"] = {"type": "longrope"} | {key: rope[key] for key in ("long_factor", "short_factor")}
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    return target

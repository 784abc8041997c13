"""How long a text may be: a model's limits in tokens, and the settings that keep its runtimes correct up to them."""

from pathlib import Path
from typing import Any

from pipeline.common.checkpoint import read_json

ORIGINAL = "original_max_position_embeddings"  # the key of LongRoPE's original limit
NPU_PROMPT = 1024  # tokens of openvino-genai's longest prompt on an NPU, unless MAX_PROMPT_LEN says otherwise


def limits(config: dict[str, Any], *, directml: bool) -> dict[str, int]:
    """Return the limits of a model from its checkpoint's `config`, in tokens of prompt and answer together.

    `max_position_embeddings` is the longest text. `sliding_window`, present when it is smaller, is the number of tokens
    that each token attends to, itself included. `original_max_position_embeddings`, present with LongRoPE, is the
    longest text that is read with the short factors (https://arxiv.org/abs/2402.13753). `faithful_tokens`, present for
    DirectML when there is a sliding window, is the longest text on which the artifact computes the same as the
    checkpoint: DirectML's GroupQueryAttention has no window.
    """
    longest = config["max_position_embeddings"]
    found = {"max_position_embeddings": longest}
    if (window := config.get("sliding_window")) and window < longest:
        found |= {"sliding_window": window} | ({"faithful_tokens": window} if directml else {})
    if is_longrope(config):
        found[ORIGINAL] = config[ORIGINAL]
    return found


def is_longrope(config: dict[str, Any]) -> bool:
    """Return whether a model with `config` uses LongRoPE, other rotary factors for long texts."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return bool(rope.get("rope_type", rope.get("type")) == "longrope")


def describe(context: dict[str, int]) -> str:
    """Return the limits of a manifest's `context` in sentences."""
    said = f"Context: {context['max_position_embeddings']:,} tokens, prompt and answer together."
    if window := context.get("sliding_window"):
        said += f" Each attends to the last {window:,}."
    if faithful := context.get("faithful_tokens"):
        said += f" On DirectML it attends to all of them: beyond {faithful:,} it is another model than its source."
    if original := context.get(ORIGINAL):
        said += f" An answer must not cross {original:,}: beyond them the prompt has to be read again."
    return said


def room(context: dict[str, int], prompt: int) -> tuple[int, str]:
    """Return how many tokens the answer to `prompt` tokens may have, 0 or more, and what to say when it reaches them.

    With LongRoPE an answer that crosses the original limit would attend to keys that were made with the short factors.
    The source model's `generate` reads the whole text again at this limit. The runtimes do not, so the answer ends
    there; they read the next prompt as a whole.
    """
    longest = context["max_position_embeddings"]
    original = context.get(ORIGINAL, longest)
    if prompt <= original < longest:
        # The model never reads the last token of an answer, so this one may lie beyond the limit.
        return original + 1 - prompt, (
            f"The answer ends here, at {original:,} tokens: from here on this model reads the whole conversation with "
            "other rotary factors. Ask it to go on."
        )
    return max(longest - prompt, 0), (
        f"The answer ends here, at the {longest:,} tokens that this model takes: start a new conversation."
    )


def pipeline_options(directory: Path) -> dict[str, Any]:
    """Return the options that openvino_genai.LLMPipeline needs for the IR in `directory` on a CPU or GPU.

    With LongRoPE a token's key depends on whether the text is longer than the original limit. So the runtime must not
    reuse the keys of earlier prompts (as it does by default), of earlier turns (as the SDPA backend does), or of a
    prompt's own beginning (a SchedulerConfig reads prompts in pieces of 256 tokens unless told otherwise).
    """
    config = read_json(directory / "config.json")
    if not is_longrope(config):
        return {}
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = config["max_position_embeddings"]
    return {"scheduler_config": scheduler}

"""A model's limits in tokens, their description, and the room that they leave for an answer."""

import pytest

from pipeline.common.checkpoint import read_json
from pipeline.common.context import describe, limits, pipeline_options, room
from tests.checkpoints import make_checkpoint

WINDOW = {"max_position_embeddings": 4096, "sliding_window": 2047}
LONGROPE = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
ENDED = "The answer ends here, at the {} tokens that this model takes: start a new conversation."
CROSSING = (
    "The answer ends here, at 4,096 tokens: from here on this model reads the whole conversation with other rotary "
    "factors. Ask it to go on."
)


@pytest.mark.parametrize(
    ("config", "directml", "expected"),
    [
        ({"max_position_embeddings": 8192, "sliding_window": None}, True, {"max_position_embeddings": 8192}),
        (WINDOW | {"rope_scaling": None, "original_max_position_embeddings": 4096}, False, WINDOW),
        (WINDOW, True, WINDOW | {"faithful_tokens": 2047}),
        (LONGROPE | {"sliding_window": 262144, "rope_scaling": {"type": "longrope"}}, True, LONGROPE),
        (LONGROPE | {"rope_parameters": {"rope_type": "longrope"}}, False, LONGROPE),
    ],
    ids=["smol-phi3", "4k", "4k-directml", "128k", "128k-of-transformers-5"],
)
def test_limits(config, directml, expected):
    """A window counts if the context is longer, and limits DirectML; LongRoPE is read from both forms of config."""
    assert limits(config, directml=directml) == expected


def test_describe():
    """The model card states every limit."""
    assert describe(WINDOW | {"faithful_tokens": 2047}) == (
        "Context: 4,096 tokens, prompt and answer together. Each attends to the last 2,047. On DirectML it attends to "
        "all of them: beyond 2,047 it is another model than its source."
    )
    assert describe(LONGROPE) == (
        "Context: 131,072 tokens, prompt and answer together. An answer must not cross 4,096: beyond them the prompt "
        "has to be read again."
    )


@pytest.mark.parametrize(
    ("context", "prompt", "tokens", "ended"),
    [
        (WINDOW, 3000, 1096, ENDED.format("4,096")),
        (WINDOW, 5000, 0, ENDED.format("4,096")),
        (LONGROPE, 4000, 97, CROSSING),
        (LONGROPE, 4096, 1, CROSSING),
        (LONGROPE, 4097, 126975, ENDED.format("131,072")),
    ],
)
def test_room(context, prompt, tokens, ended):
    """An answer ends with the context, and before it crosses LongRoPE's original limit; the sentence says which."""
    assert room(context, prompt) == (tokens, ended)


def test_pipeline_options(tmp_path):
    """LongRoPE disables prefix caching and makes prompts be read in one piece; others keep the pipeline's defaults."""
    assert pipeline_options(make_checkpoint(tmp_path / "4k")) == {}
    checkpoint = make_checkpoint(tmp_path / "128k", "phi-3-128k")
    scheduler = pipeline_options(checkpoint)["scheduler_config"]
    assert scheduler.enable_prefix_caching is False
    assert scheduler.max_num_batched_tokens == read_json(checkpoint / "config.json")["max_position_embeddings"] == 512

"""The shipped prompts are many, varied, and kept apart from each other."""

import json

import pytest

from pipeline.common.params import load_params
from pipeline.run.prompts import load_prompts
from tests.helpers import ROOT


def test_reference_prompts_are_varied():
    """There are at least 64 reference prompts, of all the kinds on which variants are compared."""
    prompts = load_prompts("reference")
    assert len(prompts) >= 64
    assert {prompt.category for prompt in prompts} == {
        "facts",
        "reasoning",
        "arithmetic",
        "code",
        "summarising",
        "instructions",
        "languages",
        "dialogue",
        "long",
    }


@pytest.mark.parametrize("name", ["reference", "calibration"])
def test_chats_wait_for_an_answer(name):
    """Turns alternate, the first and the last are the user's, and dialogues have several."""
    for prompt in load_prompts(name):
        roles = [message["role"] for message in prompt.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert (len(roles) > 1) == (prompt.category == "dialogue")


def test_no_prompt_is_in_two_sets():
    """No prompt, nor any turn of a dialogue, is both in the calibration and in the reference set."""
    turns = [
        [message["content"].casefold() for prompt in load_prompts(name) for message in prompt.messages]
        for name in ("reference", "calibration")
    ]
    turns.append([prompt.casefold() for prompt in load_params(ROOT / "params.yaml").validate_.prompts])
    together = [turn for group in turns for turn in group]
    assert len(set(together)) == len(together)


@pytest.mark.slow
def test_a_long_prompt(smol_phi3):
    """One reference prompt has more than 1,500 tokens."""
    reference = json.loads((smol_phi3 / "reference.json").read_bytes())
    assert max(len(answer["prompt_ids"]) for answer in reference["continuations"]) > 1500

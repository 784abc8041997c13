"""Calibration data without a data set: the source model's own answers to prompts that nothing is measured on."""

import json
from pathlib import Path

from pipeline.prompts import Prompt
from pipeline.source_model import Torch


def make_calibration(source: Torch, prompts: list[Prompt], *, max_new_tokens: int) -> list[list[int]]:
    """Return for each of `prompts` the token ids of the rendered chat with the model's greedy answer."""
    rendered = [source.encode(source.render_chat(prompt.messages)) for prompt in prompts]
    answers = source.answer(rendered, max_new_tokens=max_new_tokens)
    return [prompt + answer for prompt, answer in zip(rendered, answers, strict=True)]


def read_calibration(path: Path) -> list[list[int]]:
    """Return the content of `path`, which this pipeline's calibrate stage wrote."""
    sequences: list[list[int]] = json.loads(path.read_bytes())
    return sequences

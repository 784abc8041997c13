"""Read the source model's own answers layer by layer, and write H = X'X of every matrix for all INT4 formats.

No data set is needed: the source answers prompts that no measurement uses. Only one layer computes at a time, so memory
holds the float32 weights of that layer and the hidden states of all answers.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.common.files import building, replace_file
from pipeline.common.progress import say
from pipeline.convert.statistics import HEAD, SUMMARY, Summary, fold
from pipeline.run.openvino import answer_together
from pipeline.run.prompts import Prompt
from pipeline.run.source_model import Reading, Torch
from pipeline.run.torch_device import product

TOGETHER = 1024  # tokens whose inputs are multiplied at a time
BLOCK = 1024  # columns that are multiplied at a time
ENOUGH = 2  # tokens wanted for each column of the widest matrix; with fewer than one, H does not have full rank


def make_calibration(source: Torch, fp16: Path, prompts: list[Prompt], *, max_new_tokens: int) -> list[list[int]]:
    """Return, for each of `prompts`, the token ids of the rendered chat followed by the model's greedy answer.

    The IR in the directory `fp16` answers for `source`, the source model, because it answers many prompts at a time.
    """
    rendered = [source.encode(source.render_chat(prompt.messages)) for prompt in prompts]
    answers = answer_together(fp16, rendered, max_new_tokens=[max_new_tokens] * len(rendered))
    return [prompt + answer for prompt, answer in zip(rendered, answers, strict=True)]


def write_calibration(target: Path, *, answers: list[list[int]], layers: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Write the directory `target`: a file for each of `layers`, which come from `hessians`, and a summary."""
    from safetensors.torch import save_file

    largest: dict[str, float] = {}
    widest = 0
    with building(target, last=SUMMARY) as build:
        for name, found in layers:
            save_file({matrix: fold(hessian) for matrix, hessian in found.items()}, build / f"{name}.safetensors")
            largest |= {matrix: float(hessian.diagonal().max()) for matrix, hessian in found.items()}
            widest = max(widest, *map(len, found.values()))
        replace_file(build / SUMMARY, Summary(answers=answers, largest=largest).model_dump_json())
    tokens = sum(map(len, answers))
    if tokens < ENOUGH * widest:
        say(
            f"calibrated on {tokens} tokens, and the widest matrix has {widest} columns: {ENOUGH * widest} tokens "
            "would be better; raise calibrate.max_new_tokens."
        )


def hessians(source: Torch, answers: list[list[int]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each decoder layer, then of the head, each with H of its matrices by the matrix's name.

    H is float32 of shape (columns, columns). `answers` are the token ids of chats, which `source` reads.
    """
    import torch

    with torch.inference_mode():
        reading = Reading(source.model, answers)
        for name, layer in reading.layers():
            with _collecting({f"{name}.{part}": module for part, module in layer.named_modules()}) as found:
                reading.go_through(layer)
            yield name, found
        norm = copy.deepcopy(source.model.model.norm).float()
        inputs = torch.cat([reading.normed(place, norm) for place in range(len(answers))])
        hessian = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
        _add(hessian, inputs)
        _mirror(hessian)
        yield HEAD, {HEAD: hessian}


def _add(hessian: Any, inputs: Any) -> None:
    # Add X'X of the `inputs` (tokens, columns) to the upper triangle of `hessian`, and to some of the lower one.
    columns = inputs.T.contiguous()
    for start in range(0, len(columns), BLOCK):
        hessian[start : start + BLOCK, start:] += product(columns[start : start + BLOCK], columns[start:])


def _mirror(hessian: Any) -> None:
    # Copy the upper triangle to the lower one.
    hessian.triu_().add_(hessian.triu(1).T)


@contextmanager
def _collecting(modules: dict[str, Any]) -> Iterator[dict[str, Any]]:
    # Yield a dictionary that has H of the inputs of every linear layer among `modules` when the block has ended.
    import torch

    found: dict[str, Any] = {}
    waiting: dict[str, list[Any]] = {}

    def collect(name: str, inputs: Any) -> None:
        waiting[name].append(inputs)
        if sum(map(len, waiting[name])) >= TOGETHER:
            add(name)

    def add(name: str) -> None:
        _add(found[name], torch.cat(waiting[name]))
        waiting[name] = []

    hooks = []
    for name, module in modules.items():
        if isinstance(module, torch.nn.Linear):
            found[name], waiting[name] = module.weight.new_zeros(module.in_features, module.in_features), []
            hooks.append(
                module.register_forward_pre_hook(lambda module, inputs, name=name: collect(name, inputs[0][0]))
            )
    try:
        yield found
        for name, inputs in waiting.items():
            if inputs:
                add(name)
            _mirror(found[name])
    finally:
        for hook in hooks:
            hook.remove()

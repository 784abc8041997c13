"""Read the source model's own answers layer by layer, and write H = X'X of every matrix for all INT4 formats.

No data set is needed: the source answers prompts that no measurement uses. Only one layer computes at a time, so memory
holds the float32 weights of that layer and the hidden states of all answers.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.common.manifest import replace_file
from pipeline.common.progress import Bar, say
from pipeline.convert.calibration import HEAD, SUMMARY, Summary, fold
from pipeline.run.prompts import Prompt
from pipeline.run.source_model import Torch

ENOUGH = 2  # tokens wanted for each column of the widest matrix; with fewer than one, H does not have full rank


def make_calibration(source: Torch, prompts: list[Prompt], *, max_new_tokens: int) -> list[list[int]]:
    """Return, for each of `prompts`, the token ids of the rendered chat followed by the model's greedy answer."""
    rendered = [source.encode(source.render_chat(prompt.messages)) for prompt in prompts]
    answers = source.answer(rendered, max_new_tokens=max_new_tokens)
    return [prompt + answer for prompt, answer in zip(rendered, answers, strict=True)]


def write_calibration(target: Path, *, answers: list[list[int]], layers: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Write the directory `target`: a file for each of `layers`, which come from `hessians`, and a summary."""
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    (target / SUMMARY).unlink(missing_ok=True)  # written last: without it there is no calibration
    largest: dict[str, float] = {}
    widest = 0
    for name, found in layers:
        save_file({matrix: fold(hessian) for matrix, hessian in found.items()}, target / f"{name}.safetensors")
        largest |= {matrix: float(hessian.diagonal().max()) for matrix, hessian in found.items()}
        widest = max(widest, *map(len, found.values()))
    tokens = sum(map(len, answers))
    if tokens < ENOUGH * widest:
        say(
            f"calibrated on {tokens} tokens, and the widest matrix has {widest} columns: {ENOUGH * widest} tokens "
            "would be better; raise calibrate.max_new_tokens."
        )
    replace_file(target / SUMMARY, Summary(answers=answers, largest=largest).model_dump_json())


def hessians(source: Torch, answers: list[list[int]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each decoder layer, then of the head, each with H of its matrices by the matrix's name.

    H is float32 of shape (columns, columns). `answers` are the token ids of chats, which `source` reads.
    """
    import torch

    model = source.model
    with torch.inference_mode():
        hidden, arguments = _layer_inputs(model, answers)
        for index, layer in enumerate(Bar(model.model.layers, desc="reading answers, layer by layer")):
            name = f"model.layers.{index}"
            own = copy.deepcopy(layer).float()
            with _collecting({f"{name}.{part}": module for part, module in own.named_modules()}) as found:
                for place, states in enumerate(hidden):
                    hidden[place] = own(states, **arguments[place])
            yield name, found
        norm = copy.deepcopy(model.model.norm).float()
        inputs = torch.cat([norm(states)[0] for states in hidden])
        yield HEAD, {HEAD: inputs.T @ inputs}


class _Stop(Exception):
    pass


def _layer_inputs(model: Any, answers: list[list[int]]) -> tuple[list[Any], list[dict[str, Any]]]:
    # What the model gives to its first layer for each answer: the hidden states, and masks and positions.
    import torch

    hidden: list[Any] = []
    arguments: list[dict[str, Any]] = []

    def keep(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden.append(inputs[0].float())
        arguments.append(options)
        raise _Stop

    hook = model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for ids in answers:
            with suppress(_Stop):
                model.model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    finally:
        hook.remove()
    return hidden, arguments


@contextmanager
def _collecting(modules: dict[str, Any]) -> Iterator[dict[str, Any]]:
    # Yield H of the inputs of every linear layer among `modules`; each call of such a layer adds its inputs to H.
    import torch

    found: dict[str, Any] = {}

    def add(name: str, inputs: Any) -> None:
        found[name].addmm_(inputs.T, inputs)

    hooks = []
    for name, module in modules.items():
        if isinstance(module, torch.nn.Linear):
            found[name] = module.weight.new_zeros(module.in_features, module.in_features)
            hooks.append(module.register_forward_pre_hook(lambda module, inputs, name=name: add(name, inputs[0][0])))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()

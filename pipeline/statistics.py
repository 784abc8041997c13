"""What the calibration answers say about each matrix's inputs: H = X'X, the sum of their outer products.

Made once per model, for every INT4 format. Only one layer computes at a time, so that its float32 weights and the
hidden states of all answers are what is in memory.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.progress import Bar
from pipeline.source_model import Torch


def hessians(source: Torch, sequences: list[list[int]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield, for each decoder layer and then for the head, its name and H of each of its matrices by the weight's name.

    H is float32 of shape (columns, columns). `sequences` are the token ids of chats, which `source` reads.
    """
    import torch

    model = source.model
    hidden, arguments = _layer_inputs(model, sequences)
    with torch.inference_mode():
        for index, layer in enumerate(Bar(model.model.layers, desc="collecting statistics")):
            name = f"model.layers.{index}"
            own = copy.deepcopy(layer).float()
            with _Collector({f"{name}.{part}.weight": m for part, m in own.named_modules()}) as found:
                for place, states in enumerate(hidden):
                    hidden[place] = own(states, **arguments[place])
            yield name, found
        norm = copy.deepcopy(model.model.norm).float()
        inputs = torch.cat([norm(states)[0] for states in hidden])
        yield "lm_head", {"lm_head.weight": inputs.T @ inputs}


class _Stop(Exception):
    pass


def _layer_inputs(model: Any, sequences: list[list[int]]) -> tuple[list[Any], list[dict[str, Any]]]:
    # What the model gives to its first layer for each sequence: the hidden states, and masks and positions.
    import torch

    hidden: list[Any] = []
    arguments: list[dict[str, Any]] = []

    def keep(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden.append(inputs[0])
        arguments.append(options)
        raise _Stop

    hook = model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for ids in sequences:
            try:
                with torch.inference_mode():
                    model.model(input_ids=torch.tensor([ids]), use_cache=False)
            except _Stop:
                pass
    finally:
        hook.remove()
    return hidden, arguments


class _Collector:
    # While it is entered, H of the inputs of every linear layer among `modules`, by name.

    def __init__(self, modules: dict[str, Any]) -> None:
        self.modules, self.found, self.hooks = modules, {}, []

    def __enter__(self) -> dict[str, Any]:
        import torch

        def add(name: str, inputs: Any) -> None:
            inputs = inputs.flatten(0, -2).float()
            if name not in self.found:
                self.found[name] = torch.zeros(inputs.shape[1], inputs.shape[1])
            self.found[name].addmm_(inputs.T, inputs)

        for name, module in self.modules.items():
            if isinstance(module, torch.nn.Linear):
                self.hooks.append(
                    module.register_forward_pre_hook(lambda module, inputs, name=name: add(name, inputs[0]))
                )
        return self.found

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

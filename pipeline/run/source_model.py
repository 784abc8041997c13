"""The source checkpoint in torch: the model that every variant is compared with."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.common.progress import Bar
from pipeline.run.torch_device import product, torch_device
from pipeline.run.transformers import Transformers


class Torch(Transformers):
    """The source checkpoint, computed in float32 whatever precision its weights are stored in.

    It reads texts layer by layer. The weights stay memory-mapped as they are stored, and only the layer that computes
    is converted to float32. So a checkpoint of 3.8 billion bfloat16 weights does not take 15 GB, and its activations
    are not rounded, which would count as an error of its variants.
    """

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(directory, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", local_files_only=True, trust_remote_code=trust_remote_code
        )
        self.model = model.eval().to(torch_device())
        self.model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())

    def read(self, texts: Sequence[list[int]], *, positions: Sequence[Sequence[int]]) -> Iterator[tuple[Any, float]]:
        """Yield, for each of `texts`, the float32 logits at its `positions`, and the peak of its residual stream.

        The logits are an array of shape (positions, vocabulary). The peak is the largest magnitude that reaches an RMS
        norm at any position.
        """
        import torch

        with torch.inference_mode():
            reading = Reading(self.model, texts)
            for _, layer in reading.layers():
                with reading.watching(layer):
                    reading.go_through(layer)
            norm, head = (_in_float32(part) for part in (self.model.model.norm, self.model.lm_head))
            with reading.watching(norm):
                for place, wanted in enumerate(positions):
                    logits = head(reading.normed(place, norm)[list(wanted)])
                    yield logits.cpu().numpy(), reading.peaks[place]

    def logits(self, ids: list[int], *, last: int) -> Any:
        """Return the float32 logits at the last `last` positions of `ids`, shape (last, vocabulary)."""
        ((logits, _),) = self.read([ids], positions=[range(len(ids) - last, len(ids))])
        return logits


class Reading:
    """Texts on their way through the layers of a source model; use it in torch.inference_mode().

    `hidden` has the hidden states of each text, shape (1, tokens, hidden size), and `peaks` the largest magnitude of
    each text that reached a norm which was watched.
    """

    def __init__(self, model: Any, texts: Sequence[list[int]]) -> None:
        self.model = model
        self.hidden: list[Any] = []
        self.peaks = [0.0] * len(texts)
        self._arguments: list[dict[str, Any]] = []  # masks and positions that the model gives to its layers
        self._begin(texts)

    def _begin(self, texts: Sequence[list[int]]) -> None:
        import torch

        class Stop(Exception):
            pass

        def keep(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            self.hidden.append(inputs[0])
            self._arguments.append(options)
            raise Stop

        hook = self.model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for ids in texts:
                with suppress(Stop):
                    self.model.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False)
        finally:
            hook.remove()

    def layers(self) -> Iterator[tuple[str, Any]]:
        """Yield the name of each decoder layer and the layer itself in float32; send the texts through each."""
        for index, layer in enumerate(Bar(self.model.model.layers, desc="reading texts, layer by layer")):
            yield f"model.layers.{index}", _in_float32(layer)

    def go_through(self, layer: Any) -> None:
        """Send all texts through `layer`."""
        for place, states in enumerate(self.hidden):
            self._place = place
            self.hidden[place] = layer(states, **self._arguments[place])

    def normed(self, place: int, norm: Any) -> Any:
        """Return what the final `norm` gives the head for a text after all layers, shape (tokens, hidden size)."""
        self._place = place
        return norm(self.hidden[place])[0]

    @contextmanager
    def watching(self, part: Any) -> Iterator[None]:
        """Note in `peaks` what reaches the RMS norms of `part` while the block runs."""

        def note(module: Any, inputs: tuple[Any, ...]) -> None:
            self.peaks[self._place] = max(self.peaks[self._place], float(inputs[0].abs().max()))

        norms = [module for module in part.modules() if type(module).__name__.endswith("RMSNorm")]
        hooks = [norm.register_forward_pre_hook(note) for norm in norms]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _in_float32(part: Any) -> Any:
    # Return a copy of a part of the model that computes in float32.
    import torch

    class Linear(torch.nn.Linear):  # type: ignore[misc]
        def forward(self, inputs: Any) -> Any:
            return product(inputs, self.weight, self.bias)

    part = copy.deepcopy(part).float()
    for module in part.modules():
        if isinstance(module, torch.nn.Linear):
            # A `forward` of its own would be a reference cycle, and keep the weights until the garbage collector runs.
            module.__class__ = Linear
    return part

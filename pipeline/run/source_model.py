"""The source checkpoint in torch: the model that every variant is compared with."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.common.progress import Bar
from pipeline.run.torch_device import torch_device
from pipeline.run.transformers import Transformers

BATCH, BATCH_TOKENS = 32, 4096  # most prompts answered at a time, and most tokens of these with padding


class Torch(Transformers):
    """The source checkpoint, computed in float32 whatever precision its weights are stored in.

    The weights stay memory-mapped as they are stored, and each layer converts its own to float32 while it computes. So
    a checkpoint of 3.8 billion bfloat16 weights does not take 15 GB, and its activations are not rounded, which would
    count as an error of its variants.
    """

    name = "transformers"

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        super().__init__(directory, trust_remote_code=trust_remote_code)
        # The largest magnitude at the input of an RMS norm in all that `answer` read and wrote.
        self.residual_peak = 0.0
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", local_files_only=True, trust_remote_code=trust_remote_code
        )
        self.model = model.eval().to(torch_device())
        self.device = f"{self.model.device.type.upper()} (torch)"
        if self.model.dtype != torch.float32:
            for module in self.model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.forward = functools.partial(_linear, module)
                elif isinstance(module, torch.nn.Embedding):
                    module.register_forward_hook(lambda module, inputs, output: output.float())

    def answer(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        on_logits: Callable[[int, Any], None] | None = None,
    ) -> list[list[int]]:
        """Return the ids that continue each of `prompts` greedily, up to and including the eos token or to the limit.

        Prompts of similar length are answered together, padded on the left. `on_logits` is called with each prompt's
        index and the float32 logits that led to its answer, shape (len(answer), vocabulary).
        """
        import torch

        eos, device = self.eos_token_ids(), self.model.device
        answers: dict[int, list[int]] = {}
        with Bar(desc="answering prompts", total=len(prompts)) as bar:
            for batch in _batches([len(prompt) for prompt in prompts]):
                width = max(len(prompts[index]) for index in batch)
                padding = [width - len(prompts[index]) for index in batch]
                mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=device)
                rows = [[eos[0]] * pad + prompts[index] for pad, index in zip(padding, batch, strict=True)]
                with self._residual_peaks(mask) as peaks:
                    output = self.model.generate(
                        torch.tensor(rows, device=device),
                        attention_mask=mask,
                        max_new_tokens=max_new_tokens,
                        do_sample=False,
                        pad_token_id=eos[0],
                        return_dict_in_generate=True,
                        output_logits=on_logits is not None,
                    )
                for row, index in enumerate(batch):
                    ids = output.sequences[row, width:].tolist()
                    end = next((position for position, token in enumerate(ids) if token in eos), len(ids) - 1)
                    answers[index] = ids[: end + 1]
                    # What follows an answer's end in a batch is padding, too.
                    self.residual_peak = max([self.residual_peak, *(step[row] for step in peaks[: end + 1])])
                    if on_logits:
                        logits = torch.stack([step[row] for step in output.logits[: end + 1]])
                        on_logits(index, logits.float().cpu().numpy())
                bar.update(len(batch))
        return [answers[index] for index in range(len(prompts))]

    @contextmanager
    def _residual_peaks(self, mask: Any) -> Iterator[list[list[float]]]:
        # Yield a list that gets, for each pass through the model, the largest magnitude per row that reaches an RMS
        # norm. The first pass reads the prompts; `mask` (rows, width) is 0 at their padding.
        norms = [module for module in self.model.modules() if type(module).__name__.endswith("RMSNorm")]
        peaks: list[list[float]] = []

        def keep(module: Any, inputs: tuple[Any, ...]) -> None:
            magnitudes = inputs[0].abs().amax(dim=-1)
            if len(peaks) < 2 and magnitudes.shape == mask.shape:
                magnitudes = magnitudes * mask
            rows = magnitudes.amax(dim=1).tolist()
            if module is norms[0]:
                peaks.append(rows)
            else:
                peaks[-1] = list(map(max, peaks[-1], rows))

        hooks = [norm.register_forward_pre_hook(keep) for norm in norms]
        try:
            yield peaks
        finally:
            for hook in hooks:
                hook.remove()


def _linear(module: Any, inputs: Any) -> Any:
    import torch

    bias = None if module.bias is None else module.bias.float()
    return torch.nn.functional.linear(inputs, module.weight.float(), bias)


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == BATCH or (len(batch) + 1) * lengths[index] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    yield batch

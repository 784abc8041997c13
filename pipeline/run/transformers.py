"""Models with transformers' interface."""

import time
from pathlib import Path
from typing import Any

from pipeline.common.checkpoint import as_list
from pipeline.run.interface import Generation, Message


class Transformers:
    """What the source model and optimum-intel share."""

    model: Any

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def render_chat(self, messages: list[Message]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def eos_token_ids(self) -> list[int]:
        eos = self.model.generation_config.eos_token_id
        return [] if eos is None else as_list(eos)

    def generate(self, ids: list[int], *, max_new_tokens: int) -> Generation:
        import torch

        times = [time.perf_counter()]

        class Clock:
            def put(self, value: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None: ...

        prompt = torch.tensor([ids], device=self.model.device)
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=Clock(),
        )
        generated = [int(token) for token in output[0, len(ids) :]]
        started, first = times[0], times[2]  # the streamer is first given the prompt
        return Generation(
            ids=generated,
            stopped=bool(generated) and generated[-1] in self.eos_token_ids(),
            time_to_first_token=first - started,
            time_per_token=(times[-1] - first) / max(len(generated) - 1, 1),
        )

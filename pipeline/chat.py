"""Chat with an artifact in the runtime that it was made for; the text comes in pieces as it is generated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import PipelineError, lines
from pipeline.manifest import read_manifest
from pipeline.pull import verify_any

MAX_NEW_TOKENS = 512


class Chat(Protocol):
    """A loaded artifact that remembers the conversation."""

    device: str

    def ask(self, question: str, *, on_text: Callable[[str], None]) -> None:
        """Answer `question`, giving the text piece by piece to `on_text`."""


def load_chat(directory: Path, *, device: str | None = None) -> Chat:
    """Return the artifact in `directory`, loaded by openvino-genai or onnxruntime-genai, whichever it is for.

    Without `device` an NPU artifact uses the NPU where there is one, others the CPU.

    Raises PipelineError when a file of it is not what it should be, or that runtime is not installed or refuses it.
    """
    verify_any(directory)
    manifest = read_manifest(directory)
    requires = ", ".join(f"{package}=={version}" for package, version in manifest.runtime["requires"].items())
    try:
        if "openvino-genai" in manifest.runtime["requires"]:
            return OpenvinoChat(directory, device=device, npu="NPU" in manifest.runtime["devices"])
        return OnnxChat(directory)
    except ImportError as error:
        raise PipelineError(f"{directory} needs {requires}: pip install it.") from error
    except (RuntimeError, ValueError) as error:
        raise PipelineError(
            f"{directory} cannot be loaded ({lines(error)[-1]}): it was made for {requires}."
        ) from error


class OpenvinoChat:
    """openvino-genai."""

    def __init__(self, directory: Path, *, device: str | None, npu: bool) -> None:
        import openvino_genai

        self._pipeline: Any
        if npu and device is None:
            from pipeline.npu.load import load_pipeline

            self._pipeline, self.device = load_pipeline(directory)
        else:
            self.device = device or "CPU"
            self._pipeline = openvino_genai.LLMPipeline(directory, self.device)
        self._history = openvino_genai.ChatHistory()

    def ask(self, question: str, *, on_text: Callable[[str], None]) -> None:
        import openvino_genai

        self._history.append({"role": "user", "content": question})
        answer: list[str] = []

        def stream(text: str) -> openvino_genai.StreamingStatus:
            answer.append(text)
            on_text(text)
            return openvino_genai.StreamingStatus.RUNNING

        self._pipeline.generate(self._history, max_new_tokens=MAX_NEW_TOKENS, streamer=stream)
        self._history.append({"role": "assistant", "content": "".join(answer)})


class OnnxChat:
    """onnxruntime-genai, on the provider of the artifact where the installed package has it, else on the CPU."""

    def __init__(self, directory: Path) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(directory))
        self.device = "DirectML" if og.is_dml_available() else "CPU"
        if self.device == "CPU":
            config.clear_providers()
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)
        self._messages: list[dict[str, str]] = []

    def ask(self, question: str, *, on_text: Callable[[str], None]) -> None:
        import onnxruntime_genai as og

        self._messages.append({"role": "user", "content": question})
        prompt = self._tokenizer.apply_chat_template(json.dumps(self._messages), add_generation_prompt=True)
        ids = self._tokenizer.encode(prompt)
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=len(ids) + MAX_NEW_TOKENS, do_sample=False)
        generator, stream = og.Generator(self._model, parameters), self._tokenizer.create_stream()
        generator.append_tokens(ids)
        answer: list[str] = []
        while not generator.is_done():
            generator.generate_next_token()
            answer.append(stream.decode(generator.get_next_tokens()[0]))
            on_text(answer[-1])
        self._messages.append({"role": "assistant", "content": "".join(answer)})

"""Chat with an artifact in the runtime that it was made for; the text comes in pieces as it is generated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pipeline.common.context import pipeline_options, room
from pipeline.common.errors import PipelineError, lines
from pipeline.common.manifest import VariantManifest, read_manifest
from pipeline.release.pull import verify_any

MAX_NEW_TOKENS = 512


class Chat(Protocol):
    """A loaded artifact that remembers the conversation."""

    device: str

    def ask(self, question: str, *, on_text: Callable[[str], None]) -> str | None:
        """Answer `question`, passing the text piece by piece to `on_text`.

        Returns a sentence for the user when the limit of the model's context ended the answer, else None. Raises
        PipelineError when the context has no room for an answer.
        """


def load_chat(directory: Path, *, device: str | None = None) -> Chat:
    """Return the artifact in `directory`, loaded by openvino-genai or onnxruntime-genai, whichever it was made for.

    Without `device` an OpenVINO artifact for the NPU uses the NPU where there is one, and other OpenVINO artifacts use
    the CPU. `device` has no effect on ONNX artifacts.

    Raises PipelineError when one of its files is missing or changed, or when the runtime is not installed or cannot
    load it.
    """
    verify_any(directory)
    manifest = read_manifest(directory, VariantManifest)
    requires = ", ".join(f"{package}=={version}" for package, version in manifest.runtime.requires.items())
    try:
        if "openvino-genai" in manifest.runtime.requires:
            npu = "NPU" in manifest.runtime.devices
            return OpenvinoChat(directory, device=device, npu=npu, context=manifest.context)
        return OnnxChat(directory, directml="GPU" in manifest.runtime.devices, context=manifest.context)
    except ImportError as error:
        raise PipelineError(f"{directory} needs {requires}: pip install it.") from error
    except (RuntimeError, ValueError) as error:
        raise PipelineError(
            f"{directory} cannot be loaded ({lines(error)[-1]}): it was made for {requires}."
        ) from error


class OpenvinoChat:
    """A chat that runs on openvino-genai."""

    def __init__(self, directory: Path, *, device: str | None, npu: bool, context: dict[str, int]) -> None:
        import openvino_genai

        self._pipeline: Any
        if npu and device is None:
            from pipeline.run.blobs import load_pipeline

            self._pipeline, self.device = load_pipeline(directory)
        else:
            self.device = device or "CPU"
            options = {} if self.device == "NPU" else pipeline_options(directory)
            self._pipeline = openvino_genai.LLMPipeline(directory, self.device, **options)
        self._history, self._context = openvino_genai.ChatHistory(), context

    def ask(self, question: str, *, on_text: Callable[[str], None]) -> str | None:
        import openvino_genai

        self._history.append({"role": "user", "content": question})
        tokenizer = self._pipeline.get_tokenizer()
        prompt = tokenizer.apply_chat_template(self._history, add_generation_prompt=True)
        length = tokenizer.encode(prompt, add_special_tokens=False).input_ids.shape[1]
        limit, ended = answer_limit(self._context, length)
        answer: list[str] = []

        def stream(text: str) -> openvino_genai.StreamingStatus:
            answer.append(text)
            on_text(text)
            return openvino_genai.StreamingStatus.RUNNING

        result = self._pipeline.generate(self._history, max_new_tokens=limit, streamer=stream)
        self._history.append({"role": "assistant", "content": "".join(answer)})
        stopped = result.finish_reasons[0] == openvino_genai.GenerationFinishReason.STOP
        return None if stopped else ended


class OnnxChat:
    """A chat on onnxruntime-genai: with a model for DirectML on DirectML, if the package has it, else on the CPU."""

    def __init__(self, directory: Path, *, directml: bool, context: dict[str, int]) -> None:
        import onnxruntime_genai as og

        self._context = context
        config = og.Config(str(directory))
        self.device = "DirectML" if directml and og.is_dml_available() else "CPU"
        if self.device == "CPU":
            config.clear_providers()
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)
        self._messages: list[dict[str, str]] = []

    def ask(self, question: str, *, on_text: Callable[[str], None]) -> str | None:
        import onnxruntime_genai as og

        self._messages.append({"role": "user", "content": question})
        prompt = self._tokenizer.apply_chat_template(json.dumps(self._messages), add_generation_prompt=True)
        ids = self._tokenizer.encode(prompt)
        limit, ended = answer_limit(self._context, len(ids))
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=len(ids) + limit, do_sample=False)
        generator, stream = og.Generator(self._model, parameters), self._tokenizer.create_stream()
        generator.append_tokens(ids)
        answer: list[str] = []
        while not generator.is_done():
            generator.generate_next_token()
            answer.append(stream.decode(generator.get_next_tokens()[0]))
            on_text(answer[-1])
        self._messages.append({"role": "assistant", "content": "".join(answer)})
        return ended if generator.token_count() == len(ids) + limit else None


def answer_limit(context: dict[str, int], prompt: int) -> tuple[int, str | None]:
    """Return how many tokens the answer to `prompt` tokens may have, and what to tell the user when it uses them all.

    Raises PipelineError when there is no room for an answer.
    """
    most, ended = room(context, prompt)
    if not most:
        raise PipelineError(
            f"the conversation has {prompt:,} tokens and this model takes {context['max_position_embeddings']:,}: "
            "start a new one."
        )
    return (most, ended) if most <= MAX_NEW_TOKENS else (MAX_NEW_TOKENS, None)

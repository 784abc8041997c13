"""Chat with an artifact in the runtime that it was made for; the text comes in pieces as it is generated."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.common.context import NPU_PROMPT, pipeline_options, room
from pipeline.common.errors import PipelineError, lines, require_runtime
from pipeline.common.manifest import VariantManifest, read_manifest
from pipeline.release.pull import verify_any
from pipeline.run.interface import Message

MAX_NEW_TOKENS = 512


class Chat(Protocol):
    """A loaded artifact that remembers the conversation."""

    device: str

    def ask(self, question: str, *, on_text: Callable[[str], None]) -> str | None:
        """Answer `question`, passing the text piece by piece to `on_text`.

        Returns what to tell the user, else None: that the model's context or MAX_NEW_TOKENS ended the answer, or that
        there was no room for the oldest turns, which are dropped. Raises PipelineError when the question alone is too
        long; it is dropped.
        """


def load_chat(directory: Path, *, device: str | None = None) -> Chat:
    """Return the artifact in `directory`, loaded by openvino-genai or onnxruntime-genai, whichever it was made for.

    An OpenVINO artifact for the NPU uses the NPU where there is one, unless `device` names another; without `device`
    other OpenVINO artifacts use the CPU. `device` has no effect on ONNX artifacts.

    Raises PipelineError when one of its files is missing or changed, or when the runtime is not installed, does not
    load or cannot load it.
    """
    verify_any(directory)
    manifest = read_manifest(directory, VariantManifest)
    requires = ", ".join(manifest.runtime.pins)
    require_runtime(
        "openvino_genai" if manifest.runtime.openvino else "onnxruntime_genai", f"{directory} needs {requires}"
    )
    try:
        if manifest.runtime.openvino:
            npu = "NPU" in manifest.runtime.devices
            return OpenvinoChat(directory, device=device, npu=npu, context=manifest.context)
        return OnnxChat(directory, directml="GPU" in manifest.runtime.devices, context=manifest.context)
    except (RuntimeError, ValueError) as error:
        raise PipelineError(
            f"{directory} cannot be loaded ({lines(error)[-1]}): it was made for {requires}."
        ) from error


class Conversation:
    """The messages of a chat, of which the oldest turns are dropped when the model has no room for all.

    `count` returns the number of tokens of messages in the model's chat template. `longest_prompt` is for an NPU, whose
    prompts have a limit of their own.
    """

    def __init__(
        self, context: dict[str, int], *, count: Callable[[list[Message]], int], longest_prompt: int | None
    ) -> None:
        self.messages: list[Message] = []
        self._context, self._count, self._longest_prompt = context, count, longest_prompt

    @contextmanager
    def turn(self, question: str) -> Iterator["Turn"]:
        """Add `question`, and the answer that the block has appended to the turn; when the block fails, add nothing.

        Raises PipelineError when there is no room for an answer to the question alone, or when the runtime fails.
        """
        kept = [*self.messages, {"role": "user", "content": question}]
        dropped = 0
        while not (limit := self._room(prompt := self._count(kept)))[0]:
            if len(kept) == 1:
                raise PipelineError(f"the question has {prompt:,} tokens, more than this model takes: shorten it.")
            del kept[:2]
            dropped += 1
        turn = Turn(kept, *limit)
        if dropped:
            turn.remark = f"The conversation is longer than this model takes: its first {dropped} turns are forgotten."
        try:
            yield turn
        except RuntimeError as error:
            raise PipelineError(f"the runtime could not answer ({lines(error)[-1]}): ask something else.") from error
        self.messages = [*kept, {"role": "assistant", "content": "".join(turn.answer)}]

    def _room(self, prompt: int) -> tuple[int, str]:
        # Return how many tokens the answer to a prompt may have, and what to tell the user when it uses them all.
        if self._longest_prompt and prompt > self._longest_prompt:
            return 0, ""
        most = MAX_NEW_TOKENS, f"The answer ends here, after {MAX_NEW_TOKENS} tokens: ask the model to go on."
        return min(room(self._context, prompt), most)


@dataclass
class Turn:
    """A question with the messages before it, and its answer, piece by piece."""

    messages: list[Message]
    limit: int  # most tokens of the answer
    ended: str  # what to tell the user when the limit ends the answer
    remark: str | None = None
    answer: list[str] = field(default_factory=list)

    def result(self, *, at_limit: bool) -> str | None:
        """Return what to tell the user."""
        return " ".join(filter(None, (self.remark, self.ended if at_limit else None))) or None


class OpenvinoChat:
    """A chat that runs on openvino-genai."""

    def __init__(self, directory: Path, *, device: str | None, npu: bool, context: dict[str, int]) -> None:
        import openvino_genai

        self._pipeline: Any
        if npu and device in (None, "NPU"):
            from pipeline.run.blobs import choose, load_chosen

            choice = choose(directory)
            longest_prompt = choice.longest_prompt
            self._pipeline, self.device = load_chosen(directory, choice)
        else:
            self.device = device or "CPU"
            longest_prompt = NPU_PROMPT if self.device == "NPU" else None
            options = {} if self.device == "NPU" else pipeline_options(directory)
            self._pipeline = openvino_genai.LLMPipeline(directory, self.device, **options)
        tokenizer = self._pipeline.get_tokenizer()

        def count(messages: list[Message]) -> int:
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            return int(tokenizer.encode(prompt, add_special_tokens=False).input_ids.shape[1])

        self._conversation = Conversation(context, count=count, longest_prompt=longest_prompt)

    def ask(self, question: str, *, on_text: Callable[[str], None]) -> str | None:
        import openvino_genai

        with self._conversation.turn(question) as turn:

            def stream(text: str) -> openvino_genai.StreamingStatus:
                turn.answer.append(text)
                on_text(text)
                return openvino_genai.StreamingStatus.RUNNING

            history = openvino_genai.ChatHistory(turn.messages)
            result = self._pipeline.generate(history, max_new_tokens=turn.limit, streamer=stream)
        stopped = result.finish_reasons[0] == openvino_genai.GenerationFinishReason.STOP
        return turn.result(at_limit=not stopped)


class OnnxChat:
    """A chat on onnxruntime-genai: with a model for DirectML on DirectML, if the package has it, else on the CPU."""

    def __init__(self, directory: Path, *, directml: bool, context: dict[str, int]) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(directory))
        self.device = "DirectML" if directml and og.is_dml_available() else "CPU"
        if self.device == "CPU":
            config.clear_providers()
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)
        self._conversation = Conversation(context, count=lambda m: len(self._encode(m)), longest_prompt=None)

    def ask(self, question: str, *, on_text: Callable[[str], None]) -> str | None:
        import onnxruntime_genai as og

        with self._conversation.turn(question) as turn:
            ids = self._encode(turn.messages)
            parameters = og.GeneratorParams(self._model)
            parameters.set_search_options(max_length=len(ids) + turn.limit, do_sample=False)
            generator, stream = og.Generator(self._model, parameters), self._tokenizer.create_stream()
            generator.append_tokens(ids)
            while not generator.is_done():
                generator.generate_next_token()
                text = stream.decode(generator.get_next_tokens()[0])
                # With a SentencePiece tokenizer, as Phi-3's, the first word comes with a space before it.
                turn.answer.append(text if any(turn.answer) else text.lstrip(" "))
                on_text(turn.answer[-1])
        return turn.result(at_limit=generator.token_count() == len(ids) + turn.limit)

    def _encode(self, messages: list[Message]) -> Any:
        return self._tokenizer.encode(
            self._tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        )

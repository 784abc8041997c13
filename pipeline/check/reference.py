"""The source model's token ids, rendered chats and greedy answers, with which every variant is compared.

pipeline/check/recording.py records them.
"""

import json
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pipeline.run.interface import Message, Runtime

SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")  # answers are compared in their first sentence
# Texts that tokenizer conversions are known to get wrong.
TEXTS = (
    "Hello, world!",
    "  two leading spaces",
    " one leading space",
    "trailing space ",
    "tab\tnewline\n\n  indent",
    "Grüße aus Zürich – l'été à l'Élysée",
    "Привет, мир! Γειά σου Κόσμε",
    "你好,世界。こんにちは、世界。안녕하세요",
    "مرحبا بالعالم नमस्ते दुनिया สวัสดี",
    "😀 👩‍👩‍👧‍👦 🇨🇭 🎉",
    "3.14159 12,345 2026-11-21 0x1F",
    "def f(x):\n    return x + 1\n",
    "don't I'M we'll you're",
)
CHATS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": " spaces and\nlines "}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! 你好"},
        {"role": "user", "content": "Who are you?"},
    ],
)


class Text(BaseModel):
    """A text, its token ids, and what these decode to without special tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str
    ids: list[int]
    decoded: str


class Chat(BaseModel):
    """A dialogue and its rendering by the chat template."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    messages: list[Message]
    rendered: str


class Answer(BaseModel):
    """The greedy answer to one question, with the token ids of the rendered prompt and of the answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    question: str
    prompt_ids: list[int]
    ids: list[int]
    text: str
    stopped: bool


class Continuation(Answer):
    """The answer to a shipped reference prompt; variants are compared with the source at each of its tokens."""

    category: str


class LongContext(BaseModel):
    """The long prompts: for each of `lengths`, that many of the first tokens of `ids`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    ids: list[int]
    lengths: list[int]


class Expected(BaseModel):
    """What a loaded variant has to do as the source model does."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    texts: list[Text]
    chats: list[Chat]
    eos_token_ids: list[int]
    answers: list[Answer]


class Reference(Expected):
    """The content of reference.json."""

    near_ties: list[str]  # for each question of validate.prompts that was left out, a sentence with the reason
    continuations: list[Continuation]
    residual_peak: float = Field(description="largest magnitude of the residual stream on all that the source read")
    long_context: LongContext


def ask(runtime: Runtime, question: str, *, max_new_tokens: int) -> Answer:
    """Return the runtime's greedy answer to `question`."""
    prompt_ids = runtime.encode(runtime.render_chat([{"role": "user", "content": question}]))
    generation = runtime.generate(prompt_ids, max_new_tokens=max_new_tokens)
    return Answer(
        question=question,
        prompt_ids=prompt_ids,
        ids=generation.ids,
        text=runtime.decode(generation.ids),
        stopped=generation.stopped,
    )


def read_reference(path: Path) -> Reference:
    """Return the content of `path`, which this pipeline's reference stage wrote."""
    return Reference.model_validate(json.loads(path.read_bytes()))

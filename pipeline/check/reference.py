"""The source model's token ids, rendered chats and greedy answers, with which every variant is compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.common.errors import PipelineError
from pipeline.common.params import Params
from pipeline.common.progress import say
from pipeline.run.interface import Message, Runtime
from pipeline.run.prompts import load_prompts
from pipeline.run.source_model import Torch

# In nats: where the log probabilities of the source's best two tokens differ by less, a rounding may decide.
MIN_MARGIN = 0.2
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
    residual_peak: float = Field(description="largest magnitude of the residual stream on the reference prompts")
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


def near_tie(source: Torch, answer: Answer) -> str | None:
    """Return where in `answer` the source nearly ties between two tokens, as a sentence; None when it never does."""
    import torch

    logits = torch.from_numpy(source.logits(answer.prompt_ids + answer.ids[:-1], last=len(answer.ids)))
    first, second = torch.log_softmax(logits, dim=1).topk(2, dim=1).values.unbind(dim=1)
    place = int((first - second).argmin())
    if first[place] - second[place] >= MIN_MARGIN:
        return None
    pair = [f"{source.decode([token])!r}" for token in logits[place].topk(2).indices.tolist()]
    shares = [f"{float(value.exp()):.3f}" for value in (first[place], second[place])]
    return (
        f"'{answer.question}' proves nothing: after {source.decode(answer.ids[:place])!r} the source model itself "
        f"nearly ties between {pair[0]} ({shares[0]}) and {pair[1]} ({shares[1]})"
    )


def answer_questions(source: Torch, *, params: Params) -> tuple[list[Answer], list[str]]:
    """Return the answers of `source`, the source model, to validate.prompts, and why questions were left out.

    Questions on which it nearly ties between two tokens are left out. Raises PipelineError when no question is left.
    """
    answers, near_ties = [], []
    for question in params.validate_.prompts:
        answer = ask(source, question, max_new_tokens=params.validate_.max_new_tokens)
        if tie := near_tie(source, answer):
            near_ties.append(tie)
            say(f"left out: {tie}")
        else:
            answers.append(answer)
            say(f"{question} {answer.text.strip()}")
    if not answers:
        raise PipelineError(
            f"validate.prompts: {'; '.join(near_ties)}: give a question that the model answers without doubt."
        )
    return answers, near_ties


def make_reference(
    source: Torch,
    *,
    params: Params,
    eos_token_ids: list[int],
    answers: list[Answer],
    near_ties: list[str],
    long_context: LongContext,
    on_logits: Callable[[int, Any], None],
) -> Reference:
    """Return the reference: the given parts, and the output of `source` for every probe and reference prompt.

    `source` is the source model. `on_logits` is called with the index and the logits of each answer to the reference
    prompts; see `Torch.answer`.
    """
    rendered = [Chat(messages=messages, rendered=source.render_chat(messages)) for messages in CHATS]
    texts = [*TEXTS, *(chat.rendered for chat in rendered)]  # the rendered chats hold the special tokens
    ids = [source.encode(text) for text in texts]
    prompts = load_prompts("reference")
    prompt_ids = [source.encode(source.render_chat(prompt.messages)) for prompt in prompts]
    continuations = source.answer(prompt_ids, max_new_tokens=params.reference.max_new_tokens, on_logits=on_logits)
    return Reference(
        texts=[Text(text=text, ids=i, decoded=source.decode(i)) for text, i in zip(texts, ids, strict=True)],
        chats=rendered,
        eos_token_ids=eos_token_ids,
        answers=answers,
        near_ties=near_ties,
        long_context=long_context,
        continuations=[
            Continuation(
                category=prompt.category,
                question=prompt.messages[-1]["content"],
                prompt_ids=before,
                ids=answer,
                text=source.decode(answer),
                stopped=answer[-1] in source.eos_token_ids(),
            )
            for prompt, before, answer in zip(prompts, prompt_ids, continuations, strict=True)
        ],
        residual_peak=float(f"{source.residual_peak:.3g}"),
    )


def read_reference(path: Path) -> Reference:
    """Return the content of `path`, which this pipeline's reference stage wrote."""
    return Reference.model_validate(json.loads(path.read_bytes()))

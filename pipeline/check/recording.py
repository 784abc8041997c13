"""Record what the source model says, and how probable it finds it: the reference with which variants are compared."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.check.fidelity import Distributions, concatenate, distributions
from pipeline.check.long_context import ROWS, make_prompts
from pipeline.check.reference import CHATS, SENTENCE_END, TEXTS, Answer, Chat, Continuation, Reference, Text
from pipeline.common.context import ORIGINAL
from pipeline.common.errors import PipelineError
from pipeline.common.params import Params
from pipeline.common.progress import say
from pipeline.run.interface import Message
from pipeline.run.openvino import answer_together
from pipeline.run.prompts import load_prompts
from pipeline.run.source_model import Torch

# In nats: where the log probabilities of the source's best two tokens differ by less, a rounding may decide.
MIN_MARGIN = 0.2
# In nats: the most by which the source may prefer another token to one that the FP16 IR generated in float32.
MAX_LEAD = 0.05


def record(
    source: Torch, fp16: Path, *, params: Params, limits: dict[str, int], eos_token_ids: list[int]
) -> tuple[Reference, Distributions]:
    """Return the reference and the distributions of `source`, the source model, whose context has these `limits`.

    The distributions are those at each token of the answers to the reference prompts, and then those at the last ROWS
    tokens of each long prompt. Questions on which the source nearly ties between two tokens are left out.

    The IR in the directory `fp16` generates the answers, because it answers many prompts at a time. Then the source
    reads all of them, and the long prompts, in one pass.

    Raises PipelineError when no question is left, and when the source would have answered otherwise.
    """
    rendered = list(render_chats(source))
    texts = [*TEXTS, *(chat.rendered for chat in rendered)]  # the rendered chats hold the special tokens
    ids = [source.encode(text) for text in texts]
    answers, continuations = _answer(source, fp16, params=params)
    said = [*answers, *continuations]
    long_context = make_prompts(source.encode, limits)
    ends = long_context.lengths
    # With LongRoPE a prompt's length changes all its logits. Else the longest prompt has the ends of all others.
    groups = [[end] for end in ends] if ORIGINAL in limits else [ends]
    logits = source.read(
        [*(answer.prompt_ids + answer.ids[:-1] for answer in said), *(long_context.ids[: ends[-1]] for ends in groups)],
        positions=[
            *(range(len(answer.prompt_ids) - 1, len(answer.prompt_ids) + len(answer.ids) - 1) for answer in said),
            *([place for end in ends for place in range(end - ROWS, end)] for ends in groups),
        ],
    )
    kept, near_ties, peaks = [], [], [0.0]
    for answer, (found, peak) in zip(answers, logits, strict=False):
        peaks.append(peak)
        _require_greedy(source, answer, found)
        if tie := near_tie(source, answer, found):
            near_ties.append(tie)
            say(f"left out: {tie}")
        else:
            kept.append(answer)
            say(f"{answer.question} {answer.text.strip()}")
    if not kept:
        raise PipelineError(
            f"validate.prompts: {'; '.join(near_ties)}: give a question that the model answers without doubt."
        )
    rows = []
    for continuation, (found, peak) in zip([*continuations, *[None] * len(groups)], logits, strict=True):
        peaks.append(peak)
        if continuation:
            _require_greedy(source, continuation, found)
        rows.append(distributions(found))
    reference = Reference(
        texts=[Text(text=text, ids=i, decoded=source.decode(i)) for text, i in zip(texts, ids, strict=True)],
        chats=rendered,
        eos_token_ids=eos_token_ids,
        answers=kept,
        near_ties=near_ties,
        long_context=long_context,
        continuations=continuations,
        residual_peak=float(f"{max(peaks):.3g}"),
    )
    return reference, concatenate(rows)


def render_chats(source: Torch) -> Iterator[Chat]:
    """Yield CHATS as the chat template of `source` renders them, without those that it refuses.

    Raises PipelineError when it refuses all.
    """
    from jinja2 import TemplateError

    refusals = []
    for messages in CHATS:
        try:
            yield Chat(messages=messages, rendered=source.render_chat(messages))
        except TemplateError as error:
            refusals.append(str(error))
            say(f"left out: a chat that the chat template refuses ({error})")
    if len(refusals) == len(CHATS):
        raise PipelineError(f"the chat template refuses every chat ({refusals[0]}): correct it in the checkpoint.")


def near_tie(source: Torch, answer: Answer, logits: Any) -> str | None:
    """Return where the source nearly ties between two tokens, as a sentence; None when it never does.

    It is looked for in the first sentence of `answer`, with which variants' answers are compared. `logits`, shape
    (tokens of the answer, vocabulary), are those with which the source predicts the answer.
    """
    import torch

    scores = torch.from_numpy(logits[: _first_sentence(source, answer)])
    first, second = torch.log_softmax(scores, dim=1).topk(2, dim=1).values.unbind(dim=1)
    place = int((first - second).argmin())
    if first[place] - second[place] >= MIN_MARGIN:
        return None
    pair = [f"{source.decode([token])!r}" for token in scores[place].topk(2).indices.tolist()]
    shares = [f"{float(value.exp()):.3f}" for value in (first[place], second[place])]
    return (
        f"'{answer.question}' proves nothing: after {source.decode(answer.ids[:place])!r} the source model itself "
        f"nearly ties between {pair[0]} ({shares[0]}) and {pair[1]} ({shares[1]})"
    )


def _first_sentence(source: Torch, answer: Answer) -> int:
    # Return the number of tokens of the first sentence, up to the one with which the next begins.
    for tokens in range(1, len(answer.ids)):
        if len(SENTENCE_END.split(source.decode(answer.ids[:tokens]).strip(), maxsplit=1)) > 1:
            return tokens
    return len(answer.ids)


def _answer(source: Torch, fp16: Path, *, params: Params) -> tuple[list[Answer], list[Continuation]]:
    # The answers to the questions of validate.prompts, and to the reference prompts.
    questions, prompts = params.validate_.prompts, load_prompts("reference")
    chats: list[list[Message]] = [[{"role": "user", "content": question}] for question in questions]
    chats += [prompt.messages for prompt in prompts]
    prompt_ids = [source.encode(source.render_chat(chat)) for chat in chats]
    limits = [params.validate_.max_new_tokens] * len(questions) + [params.reference.max_new_tokens] * len(prompts)
    said: list[dict[str, Any]] = [
        {
            "question": chat[-1]["content"],
            "prompt_ids": before,
            "ids": ids,
            "text": source.decode(ids),
            "stopped": ids[-1] in source.eos_token_ids(),
        }
        for chat, before, ids in zip(
            chats, prompt_ids, answer_together(fp16, prompt_ids, max_new_tokens=limits), strict=True
        )
    ]
    answers = [Answer(**fields) for fields in said[: len(questions)]]
    asked = zip(prompts, said[len(questions) :], strict=True)
    return answers, [Continuation(category=prompt.category, **fields) for prompt, fields in asked]


def _require_greedy(source: Torch, answer: Answer, logits: Any) -> None:
    # Where the source nearly ties between two tokens, either is a greedy answer.
    lead = logits.max(axis=1) - logits[np.arange(len(answer.ids)), answer.ids]
    place = int(lead.argmax())
    if not lead[place] <= MAX_LEAD:
        theirs, own = (source.decode([int(token)]) for token in (answer.ids[place], logits[place].argmax()))
        raise PipelineError(
            f"'{answer.question}': after {source.decode(answer.ids[:place])!r} the FP16 IR says {theirs!r} and the "
            f"source model {own!r}: the export has changed the model."
        )

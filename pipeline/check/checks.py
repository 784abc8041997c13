"""Checks that catch silent errors of a conversion. Each `check_…` generator yields a Failure for what it finds."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from pipeline.check.fidelity import Comparison
from pipeline.check.long_context import Found
from pipeline.check.reference import SENTENCE_END, Answer, Expected, ask
from pipeline.common.matrices import Matrix, int4_ratio
from pipeline.common.params import Limits, OpenvinoInt4, Validate, Variant
from pipeline.common.progress import say
from pipeline.run.interface import Runtime

CHECKS = (
    "files",
    "recipe",
    "size",
    "operators",
    "float16-range",
    "load",
    "tokenizer",
    "chat-template",
    "eos",
    "empty",
    "loop",
    "stop",
    "answer",
    "finite",
    "fidelity",
    "long-context",
    "directml",
)
FLOAT16_MAX = 65504.0
LOOP_REPEATS, LOOP_TOKENS = 4, 24  # a loop ends in this many repeats, which have at least this many tokens

NEAR_TIE = 0.25  # in nats: between logits that differ by less, the order of a runtime's additions may decide


@dataclass(frozen=True)
class Failure:
    """A failed check: its name, and what was expected and found instead."""

    check: str
    expected: Any
    actual: Any

    def __str__(self) -> str:
        expected, actual = (json.dumps(value, ensure_ascii=False)[:300] for value in (self.expected, self.actual))
        return f"check '{self.check}' failed: expected {expected}, got {actual}"


def check_recipe(
    built: list[Matrix], expected: list[Matrix], *, source: list[Matrix], recipe: Variant
) -> Iterator[Failure]:
    """Compare the matrices read back from a built file with the forms that the recipe gives them."""
    for matrix, form in zip(built, expected, strict=True):
        if matrix.format != form.format:
            yield Failure("recipe", f"{form.format} for {form.name}", matrix.format)
            return
    elements = {role: sum(m.elements for m in source if m.role == role) for role in ("embedding", "head", "layer")}
    found = {role: sum(m.elements for m in built if m.role == role) for role in elements}
    if found != elements:
        yield Failure("recipe", {"weights": elements}, {"weights": found})
    elif isinstance(recipe, OpenvinoInt4):
        # NNCF chooses whole matrices, so the share may be below the ratio by up to the largest of them.
        step = max(m.elements for m in source if m.role == "layer") / elements["layer"]
        if not recipe.ratio - step <= int4_ratio(built) <= recipe.ratio + 1e-6:
            yield Failure("recipe", f"INT4 ratio {recipe.ratio} (-{step:.3f})", round(int4_ratio(built), 4))


def check_size(actual: int, expected: float, *, tolerance: float) -> Iterator[Failure]:
    """Compare the bytes of the weights' file with what the recipe predicts."""
    if abs(actual - expected) > tolerance * expected:
        yield Failure("size", f"{expected / 1e6:.1f} MB ±{tolerance:.0%}", f"{actual / 1e6:.1f} MB")


def check_float16_range(
    peak: float, *, devices: Sequence[str], directml: bool, hidden_size: int, residual_scale: float
) -> Iterator[Failure]:
    """Compare the largest magnitude of the residual stream with what float16 on the variant's devices can hold.

    DirectML's RMS norms keep mean(x²) in float16, so that it overflows beyond a peak of sqrt(65504 * hidden_size).
    """
    limit, what = FLOAT16_MAX, "float16 on a GPU"
    if directml:
        limit, what = sqrt(FLOAT16_MAX * hidden_size), "DirectML's RMS norms in float16"
    elif "GPU" not in devices:
        return
    found = peak / residual_scale
    if found > limit:
        yield Failure("float16-range", f"a residual stream of at most {limit:.0f} for {what}", round(found))


def check_tokenizer(runtime: Runtime, reference: Expected) -> Iterator[Failure]:
    """Compare token ids and decoded texts, of many scripts, digits, spaces and special tokens, with the source's."""
    rendered = {chat.rendered for chat in reference.chats}
    for probe in reference.texts:
        ids = runtime.encode(probe.text)
        if ids != probe.ids:
            yield Failure("tokenizer", {"text": probe.text, "ids": probe.ids}, ids)
            return
        # SentencePiece has a mark where a word begins. At the beginning of a text, and after a special token of a chat,
        # transformers and onnxruntime-genai differ in whether it is a space.
        decoded, expected = runtime.decode(ids), probe.decoded
        if probe.text in rendered:
            same = decoded.replace(" ", "") == expected.replace(" ", "")
        else:
            same = decoded.lstrip(" ") == expected.lstrip(" ")
        if not same:
            yield Failure("tokenizer", {"ids": ids, "decoded": expected}, decoded)
            return


def check_chat_template(runtime: Runtime, reference: Expected) -> Iterator[Failure]:
    """Compare the rendered chats with the source's."""
    for chat in reference.chats:
        if (rendered := runtime.render_chat(chat.messages)) != chat.rendered:
            yield Failure("chat-template", chat.rendered, rendered)
            return


def check_eos(runtime: Runtime, reference: Expected) -> Iterator[Failure]:
    """Compare the ids that end generation with the source's; a Phi-3 chat may end with any of three ids."""
    if (eos := runtime.eos_token_ids()) != reference.eos_token_ids:
        yield Failure("eos", reference.eos_token_ids, eos)


def check_runtime(runtime: Runtime, reference: Expected, *, max_new_tokens: int) -> tuple[list[Failure], list[Answer]]:
    """Return what is wrong with how a loaded variant reads texts, and its answers to the questions.

    With a wrong tokenizer or chat template it is not asked.
    """
    failures = [
        *check_tokenizer(runtime, reference),
        *check_chat_template(runtime, reference),
        *check_eos(runtime, reference),
    ]
    if failures:
        return failures, []
    answers = []
    for source in reference.answers:
        answers.append(ask(runtime, source.question, max_new_tokens=max_new_tokens))
        say(f"{source.question} {answers[-1].text.strip()}")
    return [], answers


def check_fidelity(comparison: Comparison, *, limits: Iterable[tuple[str, float]]) -> Iterator[Failure]:
    """Look for NaN and infinity in the logits, then check the comparison with the source against the limits.

    `limits` is a Limits, or some of its figures with their names.
    """
    if comparison.non_finite:
        yield Failure("finite", "finite logits", f"{comparison.non_finite} logits that are not")
        return
    metrics = comparison.metrics()
    for name, limit in limits:
        least = name == "top1_agreement"
        if (metrics[name] < limit) if least else (metrics[name] > limit):
            yield Failure("fidelity", f"{name} {'at least' if least else 'at most'} {limit}", metrics[name])


def check_long_context(found: Sequence[Found], *, limits: Limits) -> Iterator[Failure]:
    """Compare a variant's logits after the long prompts with the source's, and its answers with its own logits."""
    for prompt in found:
        name = f"after {prompt.length:,} tokens"
        if prompt.error:
            yield Failure("long-context", f"an answer {name}", prompt.error)
        elif not prompt.kl_mean <= limits.kl_p99:
            yield Failure("long-context", f"kl_mean at most {limits.kl_p99} {name}", round(prompt.kl_mean, 5))
        elif not prompt.departure <= NEAR_TIE:
            expected = f"{name}, in a second turn, the tokens that its logits prefer by at most {NEAR_TIE}"
            yield Failure("long-context", expected, round(prompt.departure, 3))


def check_answers(answers: Sequence[Answer], reference: Expected, *, params: Validate) -> Iterator[Failure]:
    """Compare the answers with the source's: none may be empty, a loop or endless, and together they must say the same.

    A quantized model may slip on one of several questions; `check_fidelity` judges how far it is from the source.
    """
    pairs = zip(answers, reference.answers, strict=True)
    failures = [failure for pair in pairs for failure in _check_form(*pair, params=params)]
    yield from failures or check_recall(answers, reference, min_recall=params.min_recall)


def check_recall(answers: Sequence[Answer], reference: Expected, *, min_recall: float) -> Iterator[Failure]:
    """Look in the answers for the source's words: together they must have the share `min_recall` of them."""
    pairs = list(zip(answers, reference.answers, strict=True))
    if sum(recall(*pair) for pair in pairs) < min_recall * len(pairs):
        answer, source = min(pairs, key=lambda pair: recall(*pair))
        yield Failure("answer", {"question": source.question, "answer": source.text}, answer.text)


def check_first_answer(answer: Answer, reference: Expected, *, params: Validate) -> Iterator[Failure]:
    """Compare the answer to the first question alone with the source's."""
    return check_answers([answer], reference.model_copy(update={"answers": reference.answers[:1]}), params=params)


def _check_form(answer: Answer, source: Answer, *, params: Validate) -> Iterator[Failure]:
    if not answer.text.strip():
        yield Failure("empty", source.text, answer.text)
    elif is_loop(answer.ids) and not is_loop(source.ids):
        yield Failure("loop", source.text, answer.text)
    elif source.stopped and 2 * len(source.ids) <= params.max_new_tokens and not answer.stopped:
        yield Failure("stop", f"an end within {params.max_new_tokens} tokens, as: {source.text}", answer.text)


def is_loop(ids: list[int]) -> bool:
    """Return whether `ids` ends in LOOP_REPEATS repeats of the same tokens, LOOP_TOKENS or more in all."""
    for period in range(1, len(ids) // LOOP_REPEATS + 1):
        length = max(period * LOOP_REPEATS, LOOP_TOKENS)
        if length <= len(ids) and all(ids[-i] == ids[-i - period] for i in range(1, length - period + 1)):
            return True
    return False


def recall(answer: Answer, source: Answer) -> float:
    """Return the share of the source's new words that `answer` has, too.

    New are the words in the first sentence of `source` that are not in its question: "The capital of France is Paris."
    adds "paris" to "What is the capital of France?".
    """
    sentence = SENTENCE_END.split(source.text.strip(), maxsplit=1)[0]
    added = _words(sentence) - _words(source.question)
    return len(added & _words(answer.text)) / len(added) if added else 1.0


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))

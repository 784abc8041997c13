"""Run a DirectML variant on DirectML itself, with onnxruntime-genai's own DLL and graph capture, its default.

Graph capture is refused when any node is left to the CPU, except nodes that compute shapes. ONNX Runtime always leaves
two of these there (they give GroupQueryAttention the length), so session.disable_cpu_ep_fallback cannot be set.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.check.checks import Failure, check_first_answer
from pipeline.check.directml import wine
from pipeline.check.fidelity import compare, concatenate, distributions
from pipeline.check.reference import Answer, Reference
from pipeline.common.checkpoint import read_json
from pipeline.common.errors import PipelineError, refusal
from pipeline.common.params import Limits, Validate
from pipeline.common.progress import say
from pipeline.convert.onnx_format import CONFIG
from pipeline.run.interface import Scorer

NAME, DEVICE = "onnxruntime-genai", "DirectML (software Vulkan under Wine)"
PROMPTS = 2  # the shortest prompts, whose logits are compared; in software each takes half a minute
SHARE = 0.1  # the KL divergence that running on DirectML may add, as a share of the variant's limit
# Keys of genai_config.json, for models whose vocabulary has tokens for tool calls or thinking, that the pinned
# onnxruntime-genai for DirectML refuses; newer versions take them.
UNKNOWN = {"bot_token_id", "eot_token_id", "bor_token_id", "eor_token_id"}
TYPES = {1: np.float32, 10: np.float16}  # onnx.TensorProto.DataType


@dataclass(frozen=True)
class Request:
    """A prompt's ids, how many of its last positions need logits, and how many tokens to generate greedily."""

    ids: list[int]
    last: int
    max_new_tokens: int = 0


def run(directory: Path, requests: list[Request]) -> tuple[list[Any], list[list[int]]]:
    """Return each request's float32 logits, shape (last, vocabulary), and its greedily generated ids.

    Raises PipelineError with the runtime's message when the model does not load or a node is left to the CPU.
    """
    with tempfile.TemporaryDirectory(prefix="directml-") as folder:
        work = Path(folder)
        # enter.sh puts this file in the place of the model's.
        genai = read_json(directory / CONFIG)
        for key in UNKNOWN & genai["model"].keys():
            del genai["model"][key]
        (work / CONFIG).write_text(json.dumps(genai), "utf-8")
        numbers = [number for r in requests for number in (len(r.ids), r.last, r.max_new_tokens, *r.ids)]
        np.array(numbers, dtype=np.int32).tofile(work / "prompts")
        shapes: list[tuple[int, int]] = []
        tokens: list[list[int]] = []
        for line in wine.run(directory, work=work):
            # The libraries print warnings in between, some without an end of line.
            if found := re.search(r"logits (\d+) (\d+)$", line):
                shapes.append((int(found[1]), int(found[2])))
                tokens.append([])
                say(f"DirectML: prompt {len(shapes)} of {len(requests)}")
            elif found := re.search(r"token (\d+) 0$", line):
                tokens[-1].append(int(found[1]))
        logits, start = [], 0
        for request, (type_, vocabulary) in zip(requests, shapes, strict=True):
            count = request.last * vocabulary
            part = np.fromfile(work / "logits", dtype=TYPES[type_], count=count, offset=start)
            start += part.nbytes
            logits.append(part.astype(np.float32).reshape(request.last, vocabulary))
        return logits, tokens


class Recorded:
    """Logits that were computed beforehand, as a Scorer."""

    def __init__(self, requests: list[Request], logits: list[Any]) -> None:
        self._known = {tuple(r.ids): values for r, values in zip(requests, logits, strict=True)}

    def logits(self, ids: list[int], *, last: int) -> Any:
        return self._known[tuple(ids)][-last:]


def check_directml(
    directory: Path, *, cpu: Scorer, reference: Reference, limits: Limits, params: Validate
) -> tuple[list[Failure], dict[str, Any]]:
    """Return what is wrong when the variant in `directory` runs on DirectML, and a record of what ran, if anything did.

    The logits of the shortest reference prompts may differ from those of `cpu`, the same model on the CPU provider, by
    a share of the variant's limit, and the answer to the first question must say the same as the source's.

    Raises MemoryError when memory ran out.
    """
    if reason := wine.unavailable():
        say(f"{reason}. The model ran on the CPU provider alone.")
        return [], {"device": None}
    answers = sorted(reference.continuations, key=lambda a: len(a.prompt_ids) + len(a.ids))[:PROMPTS]
    first = reference.answers[0]
    requests = [Request(answer.prompt_ids + answer.ids[:-1], last=len(answer.ids)) for answer in answers]
    question = Request(first.prompt_ids, last=1, max_new_tokens=len(first.ids) + 8)
    try:
        logits, tokens = run(directory, [*requests, question])
    except PipelineError as error:
        failure = Failure("directml", f"a model that {NAME} runs on DirectML as a whole", refusal(error))
        return [failure], {"device": DEVICE}
    on_cpu = concatenate([distributions(cpu.logits(r.ids, last=r.last)) for r in requests])
    comparison = compare(Recorded(requests, logits[: len(requests)]), answers, on_cpu)
    metrics = {"device": DEVICE, "runtime": NAME, "prompts": len(answers), "tokens": len(on_cpu.ids)}
    return list(_judge(directory, comparison, tokens[-1], reference, limits=limits, params=params)), metrics


def _judge(
    directory: Path, comparison: Any, ids: list[int], reference: Reference, *, limits: Limits, params: Validate
) -> Iterator[Failure]:
    from tokenizers import Tokenizer

    if comparison.non_finite:
        yield Failure("directml", "finite logits", f"{comparison.non_finite} logits that are not")
        return
    kl, limit = comparison.metrics()["kl_mean"], SHARE * limits.kl_mean
    say(f"DirectML: mean KL divergence from the CPU provider {kl:.1e}")
    if kl > limit:
        yield Failure("directml", f"a mean KL divergence from the CPU provider of at most {limit:.3g}", kl)
    first = reference.answers[0]
    text = Tokenizer.from_file(str(directory / "tokenizer.json")).decode(ids).strip()
    stopped = bool(ids) and ids[-1] in reference.eos_token_ids
    answer = Answer(question=first.question, prompt_ids=first.prompt_ids, ids=ids, text=text, stopped=stopped)
    say(f"DirectML: {first.question} {text}")
    for failure in check_first_answer(answer, reference, params=params):
        yield Failure("directml", failure.expected, failure.actual)

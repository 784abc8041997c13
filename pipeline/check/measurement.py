"""Measure what an application will see of an artifact on this machine, with its runtime's defaults.

What is measured does not decide whether the artifact passes validation.
"""

import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.check.fidelity import Distributions, compare
from pipeline.check.reference import Answer, Reference
from pipeline.common.context import ORIGINAL
from pipeline.common.memory import peak_memory
from pipeline.common.params import OnnxInt4, Variant
from pipeline.run.interface import Precision, Runtime, Scorer
from pipeline.run.onnx import OnnxGenai
from pipeline.run.openvino import OpenvinoGenai, OpenvinoLogits

SAMPLED = 16  # answers on which the default precision is measured


def load_runtime(directory: Path, *, variant: Variant, device: str = "CPU", precision: Precision = "f32") -> Runtime:
    """Return the artifact in the runtime that an application would use; `device` is for OpenVINO variants.

    Here NPU variants run the NPU's static pipeline on the CPU, and DirectML variants run on the CPU provider.
    """
    if isinstance(variant, OnnxInt4):
        return OnnxGenai(directory, precision=precision)
    return OpenvinoGenai(directory, device=device, npu=variant.npu, precision=precision)


def load_scorer(
    directory: Path, *, variant: Variant, context: dict[str, int], device: str = "CPU", precision: Precision = "f32"
) -> Scorer:
    """Return a scorer that computes the logits of the artifact with the limits `context` (pipeline/common/context.py).

    NPU variants run as a plain IR.
    """
    if isinstance(variant, OnnxInt4):
        return OnnxGenai(directory, original=context.get(ORIGINAL))
    return OpenvinoLogits(directory, device=device, precision=precision)


def measure(load: Callable[[], Runtime], answers: Sequence[Answer]) -> tuple[Runtime, dict[str, Any]]:
    """Return the runtime that `load` loads, with times in seconds and peak memory in bytes of loading and answering.

    It answers the questions of `answers`, with as many tokens. Memory is resident memory, so mapped weights count. The
    peak is that of the whole process, so measure before the process does anything larger.

    Raises RuntimeError when the runtime cannot load the artifact.
    """
    started = time.perf_counter()
    runtime = load()
    load_time = time.perf_counter() - started
    found = [runtime.generate(answer.prompt_ids, max_new_tokens=len(answer.ids)) for answer in answers]
    paces = [generation.time_per_token for generation in found if len(generation.ids) > 1]
    return runtime, {
        "machine": machine(),
        "runtime": runtime.name,
        "device": runtime.device,
        "load_time_s": round(load_time, 3),
        "time_to_first_token_s": round(median(generation.time_to_first_token for generation in found), 4),
        "tokens_per_second": round(1 / median(paces), 2) if paces else 0.0,
        "peak_memory_bytes": peak_memory(),
    }


def measure_default_precision(
    directory: Path,
    *,
    variant: Variant,
    context: dict[str, int],
    device: str,
    reference: Reference,
    distributions: Distributions,
) -> dict[str, float]:
    """Return the mean KL divergence from the source when the artifact runs in the precision of this machine's defaults.

    It is that of the first SAMPLED answers, since nothing depends on this figure. When logits are not finite there is
    none.

    onnxruntime-genai always computes in the model's own precision, so there is nothing to measure for its variants.
    """
    if isinstance(variant, OnnxInt4):
        return {}
    scorer = load_scorer(directory, variant=variant, context=context, device=device, precision="default")
    comparison = compare(scorer, reference.continuations[:SAMPLED], distributions)
    return {} if comparison.non_finite else {"kl_mean_default": comparison.metrics()["kl_mean"]}


def machine() -> str:
    """Return what is to be known of this machine beside a figure: its processor and the number of its cores."""
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    # platform.processor() is empty on Linux.
    if sys.platform == "linux":
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
        if names:
            return str(names[0])
    return platform.processor() or platform.machine()

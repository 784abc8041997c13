"""Compile an NPU variant's IR to a blob: the rules it must meet, the properties, and the two compilers."""

import re
from pathlib import Path

from pipeline.common.errors import PipelineError
from pipeline.common.manifest import VariantManifest
from pipeline.common.params import Npu
from pipeline.convert.npu import wine

NOISE = re.compile(r"^(\s*|Exception from .*|Compilation failed|openvino \S+|wine: .*)$")
STAMP = re.compile(r"^\[ERROR\] [\d:.]+ ")


class NotCompiledError(PipelineError):
    """There is no compiler here, or it refused the model; the message has the reason."""


def blob_name(npu: Npu, platform: str, openvino: str) -> str:
    """Return the blob's file name, such as `openvino_model-npu4000-2026.4.1-p1024.blob`."""
    return f"openvino_model-npu{platform}-{openvino}-p{npu.max_prompt_len}.blob"


def lint(ir: VariantManifest, npu: Npu) -> None:
    """Raise PipelineError when the IR that `ir` describes breaks a rule of the NPU, or `npu` exceeds its context.

    Rules: https://docs.openvino.ai/2026/openvino-workflow-generative/inference-with-genai/inference-with-genai-on-npu.html
    """
    asked, achieved = ir.recipe.asked, ir.recipe.achieved
    limit, length = ir.context["max_position_embeddings"], npu.max_prompt_len + npu.min_response_len
    violations = [
        (not asked.get("symmetric"), "its INT4 weights must be symmetric"),
        (achieved.int4_ratio != 1.0, f"all layers must be INT4, ratio 1.0, and {achieved.int4_ratio} are"),
        (asked.get("group_size") not in (-1, 128), f"group size must be -1 or 128, not {asked.get('group_size')}"),
        (length > limit, f"max_prompt_len + min_response_len is {length}, beyond the model's context of {limit}"),
    ]
    for violated, reason in violations:
        if violated:
            raise PipelineError(
                f"{ir.name} cannot be compiled for the NPU: {reason}: correct its block in params.yaml."
            )


def properties(npu: Npu, *, platform: str, bank: str) -> dict[str, str]:
    """Return OpenVINO's properties for a compilation: those that openvino-genai sets for a model on the NPU.

    `bank` names the weights that the model for the prompt and the model for the answer share; NPUW's default name is
    random, and then no two blobs are the same.
    """
    return {
        "NPU_PLATFORM": platform,
        "NPU_COMPILER_TYPE": "PLUGIN",
        "NPU_USE_NPUW": "YES",
        "NPUW_DEVICES": "NPU",
        "NPUW_LLM": "YES",
        "NPUW_LLM_BATCH_DIM": "0",
        "NPUW_LLM_SEQ_LEN_DIM": "2",
        "NPUW_LLM_MAX_PROMPT_LEN": str(npu.max_prompt_len),
        "NPUW_LLM_MIN_RESPONSE_LEN": str(npu.min_response_len),
        "NPUW_WEIGHTS_BANK": bank,
        "CACHE_MODE": "OPTIMIZE_SIZE" if npu.weightless else "OPTIMIZE_SPEED",
        **npu.hints,
    }


def compile_blob(ir: Path, target: Path, *, properties: dict[str, str]) -> str:
    """Compile the IR file `ir` and write the blob to the file `target`; return the compiler, `native` or `wine`.

    Raises NotCompiledError when there is no compiler, or with the compiler's own reason when it refuses. Raises
    PipelineError when the compiler cannot be set up, as without a network.
    """
    native = has_native_compiler()
    if not native:
        if reason := wine.unavailable():
            raise NotCompiledError(
                f"no NPU compiler here: {reason}, and run this cell again with `dvc repro --force --single-item`"
            )
        wine.install()
    try:
        (_compile_native if native else wine.compile_blob)(ir, target, properties=properties)
    except RuntimeError as error:
        raise NotCompiledError(f"the NPU compiler refused: {reason_of(str(error))}") from error
    return "native" if native else "wine"


def has_native_compiler() -> bool:
    """Return whether the installed openvino includes the NPU compiler, as it does on Windows."""
    import openvino

    return any(Path(openvino.__file__).parent.glob("libs/*openvino_intel_npu_compiler*"))


def reason_of(output: str) -> str:
    """Return the lines of a compiler's output that matter, joined into one, without C++ stack and time stamps."""
    lines = [STAMP.sub("", line.removeprefix("compiling failed: ").strip()) for line in output.splitlines()]
    matter = list(dict.fromkeys(line for line in lines if not NOISE.match(line)))
    return " / ".join(matter[:4])[:600] or "it gave no reason"


def _compile_native(ir: Path, target: Path, *, properties: dict[str, str]) -> None:
    import openvino

    model = openvino.Core().compile_model(ir, "NPU", properties)
    with target.open("wb") as stream:
        stream.write(model.export_model().getbuffer())

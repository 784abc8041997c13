"""Compare a pulled artifact, as an application loads it on the device at hand, with what its source model says.

Validation judges an artifact in float32 on the CPU. A GPU or an NPU may still compute something else with its driver.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from pipeline.check.report import FIGURES, figure
from pipeline.common.context import ORIGINAL
from pipeline.common.errors import PipelineError, lacks_memory, lines, require_runtime
from pipeline.common.manifest import Manifest, VariantManifest, read_manifest
from pipeline.release.device import openvino_devices
from pipeline.release.pull import verify_any
from pipeline.run.interface import Runtime, Scorer

NPU_ON_CPU = "NPU-ON-CPU"
# What default precision and the excerpt's choice of prompts may add to the figures of validation, in nats and shares:
# docs/device-check.md has what they add here.
KL_FACTOR, KL_MARGIN, TOP1_MARGIN, RECALL_SHARE = 1.5, 0.05, 0.1, 0.6


class Judged(BaseModel):
    """The figures in a release's metrics.json from which the limits for a device follow."""

    kl_mean: FiniteFloat = Field(ge=0)
    top1_agreement: float = Field(ge=0, le=1)
    answer_recall: float = Field(gt=0, le=1)

    def limits(self) -> dict[str, float]:
        """Return the largest mean KL divergence, in nats, and the least top-1 agreement that a device may have."""
        return {
            "kl_mean": round(KL_FACTOR * self.kl_mean + KL_MARGIN, 4),
            "top1_agreement": round(max(self.top1_agreement - TOP1_MARGIN, 0), 4),
        }


@dataclass(frozen=True)
class Place:
    """A device, and how to load an artifact there: in the runtime of an application, and for its logits."""

    runtime: str  # with its version
    device: str
    load: Callable[[], Runtime]
    load_scorer: Callable[[], Scorer]
    longest_prompt: int | None = None  # in tokens


@dataclass(frozen=True)
class Result:
    """What a check found: figures by their names, as in `artifacts/<model>/measured/`, and what failed."""

    release: str
    figures: dict[str, Any]
    limits: dict[str, float]
    failures: list[str]

    def document(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
        judged = {"release": self.release, "passed": not self.failures, "failures": self.failures}
        return judged | {"limits": self.limits} | self.figures

    def table(self) -> str:
        """Return what ran where, and each figure with its limit, if it has one."""
        ran = "{runtime} on {device}; {machine}".format(**self.figures)
        bounds = {
            "kl_mean_default": f"at most {figure(self.limits['kl_mean'], 'kl_mean')}",
            "top1_agreement": f"at least {figure(self.limits['top1_agreement'], 'top1_agreement')}",
        }
        rows = [
            f"{heading:16}{figure(self.figures[name], name):15}{bounds.get(name, '')}".rstrip()
            for name, (heading, *_) in FIGURES.items()
            if name in self.figures
        ]
        compared = "compared at {tokens} tokens of {prompts} prompts".format(**self.figures)
        return "\n".join([f"{self.release}: {ran}", *rows, compared])


def check_device(directory: Path, *, device: str | None = None) -> Result:
    """Return how the release in `directory` compares with its source model on `device`, with its runtime's defaults.

    `device` is OpenVINO's name of one, such as NPU or GPU, or NPU_ON_CPU for the NPU's static pipeline compiled for the
    CPU. For an ONNX model it is GPU, which stands for DirectML, or CPU. By default it is the device on which
    `load_chat` loads the artifact.

    Raises PipelineError when a file has changed, when the directory was not pulled from a registry, when the runtime or
    the device is not there, or when memory runs out.
    """
    release = verify_any(directory)
    if isinstance(release, Manifest):
        raise PipelineError(
            f"{directory} was built here, and only a release carries what the source model says: publish it with "
            "`phi3 publish`, and check the directory that `phi3 pull` prints."
        )
    manifest = read_manifest(directory, VariantManifest)
    module = "openvino_genai" if manifest.runtime.openvino else "onnxruntime_genai"
    require_runtime(module, f"{directory} needs {', '.join(manifest.runtime.pins)}")
    place = (_openvino if manifest.runtime.openvino else _onnx)(directory, manifest, device)
    # These need numpy, which comes with the runtime.
    from pipeline.check import checks
    from pipeline.check.excerpt import read_excerpt
    from pipeline.check.fidelity import compare
    from pipeline.check.measurement import machine, measure

    excerpt, judged = read_excerpt(directory), _judged(directory)
    answers, source = excerpt.passages_up_to(place.longest_prompt)
    most = 2 * max(len(answer.ids) for answer in excerpt.answers)
    figures: dict[str, Any] = {"machine": machine(), "runtime": place.runtime, "device": place.device}
    figures |= {"prompts": len(answers), "tokens": len(source.ids)}
    failures: list[checks.Failure] = []
    try:
        runtime, measured = measure(place.load, excerpt.answers)
        figures |= measured | {"runtime": place.runtime}
        # A weak model may repeat itself in another precision. Only what the answers lack says that a device is wrong.
        failures, said = checks.check_runtime(runtime, excerpt, max_new_tokens=most)
        if said:
            failures += checks.check_recall(said, excerpt, min_recall=RECALL_SHARE * judged.answer_recall)
        del runtime  # the device may not have room for two
        comparison = compare(place.load_scorer(), answers, source)
        failures += checks.check_fidelity(comparison, limits=judged.limits().items())
        if not comparison.non_finite:
            found = comparison.metrics()
            figures |= {"kl_mean_default": found["kl_mean"], "top1_agreement": found["top1_agreement"]}
    except (RuntimeError, PipelineError, MemoryError) as error:
        if lacks_memory(error):
            raise PipelineError("memory ran out: close other programs, or pull a smaller variant.") from error
        failures.append(checks.Failure("load", "a runtime that loads and runs it", lines(error)[-1]))
    return Result(f"{release.name} {release.version}", figures, judged.limits(), list(map(str, failures)))


def _judged(directory: Path) -> Judged:
    from pipeline.release.documents import METRICS

    path = directory / METRICS
    try:
        return Judged.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise PipelineError(f"{path} does not have the figures of a validation: pull a release that has.") from error


def _openvino(directory: Path, manifest: VariantManifest, device: str | None) -> Place:
    import openvino
    import openvino_genai

    from pipeline.run.blobs import Choice, choose, compile_chosen, load_chosen, static_on_cpu
    from pipeline.run.openvino import LoadedPipeline, OpenvinoLogits, StaticLogits

    core, npu = openvino.Core(), "NPU" in manifest.runtime.devices
    present = list(dict.fromkeys([*openvino_devices(), *core.available_devices]))
    if device in ("NPU", NPU_ON_CPU) and not npu:
        raise PipelineError(f"{manifest.name} is not made for NPUs: pull a variant that is, with `--for npu`.")
    if device not in (None, NPU_ON_CPU, *present):
        remedy = f" `--device {NPU_ON_CPU}` checks the NPU's pipeline on the CPU." if device == "NPU" else ""
        raise PipelineError(
            f"this machine has no {device}, or no driver for it: OpenVINO sees {', '.join(present)}.{remedy}"
        )
    if device == NPU_ON_CPU:
        choice, where = static_on_cpu(directory), "CPU"
    elif npu and device in (None, "NPU"):
        choice = choose(directory)
        where = choice.device
    else:
        where = device or "CPU"
        choice = Choice(where, {}, core.get_property(where, "FULL_DEVICE_NAME"))

    def load() -> Runtime:
        pipeline, how = load_chosen(directory, choice)
        return LoadedPipeline(pipeline, device=f"{where} ({how})")

    def load_scorer() -> Scorer:
        if choice.device == "NPU":
            return StaticLogits(compile_chosen(directory, choice))
        return OpenvinoLogits(directory, device=choice.device, precision="default")

    return Place(
        runtime=f"openvino-genai {openvino_genai.__version__.split('-')[0]}",
        device=f"{where} ({choice.reason})",
        load=load,
        load_scorer=load_scorer,
        longest_prompt=choice.longest_prompt,
    )


def _onnx(directory: Path, manifest: VariantManifest, device: str | None) -> Place:
    import onnxruntime_genai

    from pipeline.run.onnx import OnnxGenai

    made_for, here = "GPU" in manifest.runtime.devices, bool(onnxruntime_genai.is_dml_available())
    if device not in (None, "CPU", "GPU") or (device == "GPU" and not made_for):
        raise PipelineError(f"{manifest.name} is made for {'DirectML' if made_for else 'the CPU'}, not for {device}.")
    if device == "GPU" and not here:
        raise PipelineError(
            "this onnxruntime-genai has no DirectML, which is for Windows: `--device CPU` checks the model on the CPU."
        )
    directml = made_for and here and device != "CPU"
    where = "DirectML" if directml else "CPUExecutionProvider"
    if made_for and not directml:
        where += " (not DirectML, for which the model is made)"

    @cache
    def load() -> OnnxGenai:
        original = manifest.context.get(ORIGINAL)
        model = OnnxGenai(directory, precision="default", original=original, directml=directml)
        model.device = where
        return model

    return Place(f"onnxruntime-genai {onnxruntime_genai.__version__}", where, load, load)

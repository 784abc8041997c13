"""Prove one variant: run every check through the runtime that an application would use, and measure it."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from pipeline import onnx_genai, openvino, smoke
from pipeline.artifact import asked
from pipeline.checkpoint import read_json, tensor_shapes
from pipeline.errors import PipelineError
from pipeline.manifest import verify
from pipeline.params import Model, OnnxInt4, OpenvinoInt4, Validate, Variant
from pipeline.process import peak_memory
from pipeline.recipe import matrices, summary
from pipeline.reference import Answer, Reference, ask
from pipeline.runtimes import Generation, OnnxGenai, OpenvinoGenai, OptimumIntel, Runtime
from pipeline.smoke import Failure


class Measured:
    """A runtime whose generations are kept, for their times."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.generations: list[Generation] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def generate(self, ids: list[int], *, max_new_tokens: int) -> Generation:
        self.generations.append(self._runtime.generate(ids, max_new_tokens=max_new_tokens))
        return self.generations[-1]


def check_files(directory: Path, *, variant: Variant, model: Model, source: Path, params: Validate) -> list[Failure]:
    """Return what is wrong with the files of the variant in `directory`, without running it."""
    backend: Any = onnx_genai if isinstance(variant, OnnxInt4) else openvino
    try:
        manifest = verify(directory)
    except PipelineError as error:
        return [Failure("files", "the files of the manifest", str(error))]
    if missing := [name for name in backend.REQUIRED if name not in manifest.files]:
        return [Failure("files", list(backend.REQUIRED), f"no {', '.join(missing)}")]
    config, original = read_json(source / "config.json"), matrices(tensor_shapes(source))
    options = {"recipe": variant, "config": config, "adjust_group_size": model.group_size_fallback == "adjust"}
    built = backend.read_matrices(directory)
    forms = [backend.expected_form(matrix, **options) for matrix in built]
    expected_size = backend.expected_size(original, **options)
    claims = {"asked": asked(variant), "achieved": summary(built)}
    return [
        *(
            Failure("recipe", {k: claims[k]}, {k: manifest.recipe.get(k)})
            for k in claims
            if manifest.recipe.get(k) != claims[k]
        ),
        *smoke.check_recipe(built, forms, source=original, recipe=variant),
        *smoke.check_size((directory / backend.WEIGHTS).stat().st_size, expected_size, tolerance=params.size_tolerance),
    ]


def check_runtime(
    runtime: Runtime, reference: Reference, *, params: Validate, progress: Callable[[str], None]
) -> tuple[list[Failure], list[Answer]]:
    """Return what is wrong with a loaded variant, and its answers; there are none when it cannot be asked rightly."""
    failures = [
        *smoke.check_tokenizer(runtime, reference),
        *smoke.check_chat_template(runtime, reference),
        *smoke.check_eos(runtime, reference),
        *smoke.check_finite(runtime, reference),
    ]
    if failures:
        return failures, []
    answers = []
    for question in params.prompts:
        answers.append(ask(runtime, question, max_new_tokens=params.max_new_tokens))
        progress(f"{question} {answers[-1].text.strip()}")
    return list(smoke.check_answers(answers, reference, params=params)), answers


def validate(
    directory: Path,
    *,
    variant: Variant,
    model: Model,
    source: Path,
    reference: Reference,
    params: Validate,
    progress: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metrics and the evidence (checks passed, answers) of the variant in `directory`.

    Metrics: times in seconds, sizes in bytes, peak memory in bytes (resident, so mapped weights count).

    Raises PipelineError that names every failed check with expected and actual.
    """
    _refuse(check_files(directory, variant=variant, model=model, source=source, params=params))
    started = time.perf_counter()
    try:
        runtime = Measured(load_runtime(directory, variant=variant, device=params.openvino_device))
    except RuntimeError as error:
        raise PipelineError(str(Failure("load", "a runtime that loads it", str(error)))) from error
    load_time = time.perf_counter() - started
    progress(f"loaded by {runtime.name} on {runtime.device} in {load_time:.1f} s")
    failures, answers = check_runtime(runtime, reference, params=params, progress=progress)
    memory = peak_memory()
    evidence: dict[str, Any] = {"runtime": runtime.name, "device": runtime.device, "checks": list(smoke.CHECKS)}
    evidence["answers"] = [answer.model_dump(include={"question", "text", "ids", "stopped"}) for answer in answers]
    if not isinstance(variant, OnnxInt4):
        tutorial = OptimumIntel(directory, device=params.openvino_device)
        first = ask(tutorial, params.prompts[0], max_new_tokens=params.max_new_tokens)
        progress(f"{tutorial.name}: {first.text.strip()}")
        subset = reference.model_copy(update={"answers": reference.answers[:1]})
        failures += smoke.check_answers([first], subset, params=params)
        evidence[tutorial.name] = {"device": tutorial.device, "text": first.text}
    _refuse(failures)
    metrics = {
        "checks_passed": len(smoke.CHECKS),
        "size_bytes": sum(path.stat().st_size for path in directory.iterdir()),
        "load_time_s": round(load_time, 3),
        "time_to_first_token_s": round(median(g.time_to_first_token for g in runtime.generations), 4),
        "tokens_per_second": round(1 / median(g.time_per_token for g in runtime.generations), 2),
        "peak_memory_bytes": memory,
        "answer_recall": round(sum(map(smoke.recall, answers, reference.answers)) / len(answers), 4),
        "runtime": runtime.name,
        "device": runtime.device,
    }
    return metrics, evidence


def load_runtime(directory: Path, *, variant: Variant, device: str) -> Runtime:
    """Return the loaded artifact in the runtime that an application would use; `device` is for OpenVINO variants.

    Here NPU variants run the NPU's static pipeline on the CPU, and DirectML variants run on the CPU provider.
    """
    if isinstance(variant, OnnxInt4):
        return OnnxGenai(directory)
    return OpenvinoGenai(directory, device=device, npu=variant.npu if isinstance(variant, OpenvinoInt4) else None)


def _refuse(failures: list[Failure]) -> None:
    if failures:
        raise PipelineError("\n  ".join(map(str, failures)))

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
from pipeline.fidelity import Distributions, compare
from pipeline.manifest import digest, read_manifest, verify
from pipeline.params import Limits, Model, OnnxInt4, OpenvinoInt4, Validate, Variant
from pipeline.paths import MANIFEST
from pipeline.process import peak_memory
from pipeline.progress import say
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


def check_runtime(runtime: Runtime, reference: Reference, *, params: Validate) -> tuple[list[Failure], list[Answer]]:
    """Return what is wrong with a loaded variant, and its answers; there are none when it cannot be asked rightly."""
    failures = [
        *smoke.check_tokenizer(runtime, reference),
        *smoke.check_chat_template(runtime, reference),
        *smoke.check_eos(runtime, reference),
    ]
    if failures:
        return failures, []
    answers = []
    for question in params.prompts:
        answers.append(ask(runtime, question, max_new_tokens=params.max_new_tokens))
        say(f"{question} {answers[-1].text.strip()}")
    return list(smoke.check_answers(answers, reference, params=params)), answers


def validate(
    directory: Path,
    *,
    variant: Variant,
    model: Model,
    limits: Limits,
    source: Path,
    reference: Reference,
    distributions: Distributions,
    params: Validate,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metrics and the evidence of the variant in `directory`; the evidence lists what failed, if anything.

    Metrics: times in seconds, sizes in bytes, peak memory in bytes (resident, so mapped weights count; loading and
    answering only), and those of `Comparison.metrics`. They end where a failure makes going on pointless.
    """
    metrics: dict[str, Any] = {"passed": False}
    evidence: dict[str, Any] = {"checks": list(smoke.CHECKS)}

    def result(failures: list[Failure]) -> tuple[dict[str, Any], dict[str, Any]]:
        metrics["passed"] = not failures
        return metrics, evidence | {"failures": list(map(str, failures))}

    if failures := check_files(directory, variant=variant, model=model, source=source, params=params):
        return result(failures)
    manifest = read_manifest(directory)
    # Whoever publishes the artifact can tell by the manifest's hash that these very files are what was validated.
    evidence |= {"manifest_sha256": digest(directory / MANIFEST).sha256, "recipe": manifest.recipe}
    evidence |= {"runs_on": manifest.runtime, "tools": manifest.tools}
    metrics["size_bytes"] = sum(path.stat().st_size for path in directory.iterdir())
    started = time.perf_counter()
    try:
        runtime = Measured(load_runtime(directory, variant=variant, device=params.openvino_device))
    except RuntimeError as error:
        return result([Failure("load", "a runtime that loads it", str(error))])
    metrics["load_time_s"] = round(time.perf_counter() - started, 3)
    metrics |= {"runtime": runtime.name, "device": runtime.device}
    say(f"loaded by {runtime.name} on {runtime.device} in {metrics['load_time_s']:.1f} s")
    failures, answers = check_runtime(runtime, reference, params=params)
    if not answers:
        return result(failures)
    evidence["answers"] = [
        {"question": answer.question} | departure(answer.ids, source.ids, runtime.decode)
        for answer, source in zip(answers, reference.answers, strict=True)
    ]
    metrics |= {
        "time_to_first_token_s": round(median(g.time_to_first_token for g in runtime.generations), 4),
        "tokens_per_second": round(1 / median(g.time_per_token for g in runtime.generations), 2),
        "peak_memory_bytes": peak_memory(),
        "answer_recall": round(sum(map(smoke.recall, answers, reference.answers)) / len(answers), 4),
    }
    if not isinstance(variant, OnnxInt4) and "NPU" not in manifest.runtime["devices"]:
        tutorial = OptimumIntel(directory, device=params.openvino_device)
        first = ask(tutorial, params.prompts[0], max_new_tokens=params.max_new_tokens)
        say(f"{tutorial.name}: {first.text.strip()}")
        subset = reference.model_copy(update={"answers": reference.answers[:1]})
        failures += smoke.check_answers([first], subset, params=params)
        evidence[tutorial.name] = {"device": tutorial.device, "text": first.text}
    comparison = compare(runtime, reference.continuations, distributions)
    evidence["continuations"] = [
        departure(answer.ids[:prefix] + ([] if token is None else [token]), answer.ids, runtime.decode)
        for answer, prefix, token in zip(
            reference.continuations, comparison.prefixes, comparison.preferred, strict=True
        )
    ]
    if not comparison.non_finite:
        metrics |= comparison.metrics()
    return result([*failures, *smoke.check_fidelity(comparison, limits=limits)])


def departure(ids: list[int], source: list[int], decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """Return the text of `ids` in three parts: as the source's ids begin, the first token that differs, the rest.

    `common_tokens` is the number of tokens in the first part; `departs` is false when all of the source's are in it.
    """
    common = next((i for i, (a, b) in enumerate(zip(ids, source, strict=False)) if a != b), min(len(ids), len(source)))
    text, same, until = decode(ids), decode(ids[:common]), decode(ids[: common + 1])
    return {
        "common_tokens": common,
        "departs": ids != source,
        "same": text[: len(same)],
        "differs": text[len(same) : len(until)],
        "rest": text[len(until) :],
    }


def load_runtime(directory: Path, *, variant: Variant, device: str) -> Runtime:
    """Return the loaded artifact in the runtime that an application would use; `device` is for OpenVINO variants.

    Here NPU variants run the NPU's static pipeline on the CPU, and DirectML variants run on the CPU provider.
    """
    if isinstance(variant, OnnxInt4):
        return OnnxGenai(directory)
    return OpenvinoGenai(directory, device=device, npu=variant.npu if isinstance(variant, OpenvinoInt4) else None)

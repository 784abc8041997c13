"""Prove one variant: run every check through the runtime that an application would use, in float32 on the CPU.

It is also measured with this machine's defaults. No two of the runtimes are loaded at a time.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.check import checks, long_context
from pipeline.check.checks import Failure
from pipeline.check.directml.operators import find_faults
from pipeline.check.directml.runtime import check_directml
from pipeline.check.fidelity import Distributions, compare
from pipeline.check.measurement import load_runtime, load_scorer, measure, measure_default_precision
from pipeline.check.reference import Reference, ask
from pipeline.common.checkpoint import read_json, tensor_shapes
from pipeline.common.errors import PipelineError
from pipeline.common.manifest import VariantManifest, digest, read_manifest, verify
from pipeline.common.matrices import matrices, summary
from pipeline.common.params import Model, OnnxInt4, Validate, Variant
from pipeline.common.paths import MANIFEST
from pipeline.common.progress import say
from pipeline.convert import onnx_format
from pipeline.convert.backend import backend
from pipeline.convert.variant import asked
from pipeline.run.openvino import OptimumIntel


def check_files(directory: Path, *, variant: Variant, model: Model, source: Path, params: Validate) -> list[Failure]:
    """Return what is wrong with the files of the variant in `directory`, without running it."""
    library = backend(variant)
    try:
        manifest = verify(directory, VariantManifest)
    except PipelineError as error:
        return [Failure("files", "the files of the manifest", str(error))]
    if missing := [name for name in library.REQUIRED if name not in manifest.files]:
        return [Failure("files", list(library.REQUIRED), f"no {', '.join(missing)}")]
    config, original = read_json(source / "config.json"), matrices(tensor_shapes(source))
    options: dict[str, Any] = {
        "recipe": variant,
        "config": config,
        "adjust_group_size": model.group_size_fallback == "adjust",
    }
    built = library.read_matrices(directory)
    forms = [library.expected_form(matrix, **options) for matrix in built]
    expected_size = library.expected_size(original, **options)
    claims = {"asked": asked(variant, config), "achieved": summary(built).model_dump()}
    stated = manifest.recipe.model_dump()
    return [
        *(Failure("recipe", {key: claim}, {key: stated[key]}) for key, claim in claims.items() if stated[key] != claim),
        *checks.check_recipe(built, forms, source=original, recipe=variant),
        *_check_operators(directory, variant=variant),
        *checks.check_size(
            (directory / library.WEIGHTS).stat().st_size, expected_size, tolerance=params.size_tolerance
        ),
    ]


def _check_operators(directory: Path, *, variant: Variant) -> Iterator[Failure]:
    if variant.directml:
        for fault in find_faults(directory / onnx_format.MODEL[0])[:1]:
            yield Failure("operators", "a graph that DirectML can run as a whole", fault)


def check_range(directory: Path, *, variant: Variant, source: Path, reference: Reference) -> list[Failure]:
    """Return the failure that the residual stream, as the variant scales it, exceeds float16 on its devices, if any."""
    config = read_json(source / "config.json")
    return list(
        checks.check_float16_range(
            reference.residual_peak,
            devices=read_manifest(directory, VariantManifest).runtime.devices,
            directml=variant.directml,
            hidden_size=config["hidden_size"],
            residual_scale=onnx_format.residual_scale(directory, config=config) if variant.directml else 1,
        )
    )


def validate(
    directory: Path,
    *,
    variant: Variant,
    model: Model,
    source: Path,
    reference: Reference,
    distributions: Distributions,
    params: Validate,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return metrics, evidence and measurements of the variant in `directory`; the evidence lists what failed, if any.

    Metrics are the same on every machine: sizes in bytes and those of `Comparison.metrics`. When a failure makes
    further checks pointless, the remaining metrics are missing. Measurements are of this machine; see
    pipeline/check/measurement.py.
    """
    metrics: dict[str, Any] = {"passed": False}
    evidence: dict[str, Any] = {"checks": list(checks.CHECKS)}
    measured: dict[str, Any] = {}

    def result(failures: list[Failure]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        metrics["passed"] = not failures
        return metrics, evidence | {"failures": list(map(str, failures))}, measured

    if failures := check_files(directory, variant=variant, model=model, source=source, params=params):
        return result(failures)
    if failures := check_range(directory, variant=variant, source=source, reference=reference):
        return result(failures)
    manifest = read_manifest(directory, VariantManifest)
    # The manifest's hash proves, when the artifact is published, that these very files were validated.
    evidence |= {"manifest_sha256": digest(directory / MANIFEST).sha256, "recipe": manifest.recipe.model_dump()}
    evidence |= {"runs_on": manifest.runtime.model_dump(), "tools": manifest.tools}
    metrics["size_bytes"] = sum(path.stat().st_size for path in directory.iterdir())
    try:
        measured |= measure(
            lambda: load_runtime(directory, variant=variant, device=params.openvino_device, precision="default"),
            reference.answers,
        )[1]
        say(f"loaded by {measured['runtime']} on {measured['device']} in {measured['load_time_s']:.1f} s")
        failures, said = _judge_answers(
            directory, metrics, evidence, variant=variant, context=manifest.context, reference=reference, params=params
        )
    except RuntimeError as error:
        return result([Failure("load", "a runtime that loads it", str(error))])
    if "answers" not in evidence:
        return result(failures)
    scorer = load_scorer(directory, variant=variant, context=manifest.context)
    comparison = compare(scorer, reference.continuations, distributions)
    long_prompts = long_context.compare(scorer, reference.long_context, said, distributions)
    if variant.directml:
        found, measured["directml"] = check_directml(
            directory, cpu=scorer, reference=reference, limits=variant.limits, params=params
        )
        failures += found
    del scorer
    decode = Tokenizer.from_file(str(directory / "tokenizer.json")).decode
    evidence["continuations"] = [
        departure(answer.ids[:prefix] + ([] if token is None else [token]), answer.ids, decode)
        for answer, prefix, token in zip(
            reference.continuations, comparison.prefixes, comparison.preferred, strict=True
        )
    ]
    evidence["long_context"] = [vars(prompt) for prompt in long_prompts]
    failures += checks.check_fidelity(comparison, limits=variant.limits)
    failures += checks.check_long_context(long_prompts, limits=variant.limits)
    if not comparison.non_finite:
        metrics |= comparison.metrics()
        measured |= measure_default_precision(
            directory,
            variant=variant,
            context=manifest.context,
            device=params.openvino_device,
            reference=reference,
            distributions=distributions,
        )
    if not isinstance(variant, OnnxInt4) and "NPU" not in manifest.runtime.devices:
        failures += _judge_tutorial(directory, evidence, reference=reference, params=params)
    return result(failures)


def _judge_answers(
    directory: Path,
    metrics: dict[str, Any],
    evidence: dict[str, Any],
    *,
    variant: Variant,
    context: dict[str, int],
    reference: Reference,
    params: Validate,
) -> tuple[list[Failure], long_context.Said]:
    runtime = load_runtime(directory, variant=variant)
    metrics |= {"runtime": runtime.name, "device": runtime.device}
    failures, answers = checks.check_runtime(runtime, reference, max_new_tokens=params.max_new_tokens)
    if answers:
        failures += checks.check_answers(answers, reference, params=params)
        evidence["answers"] = [
            {"question": answer.question} | departure(answer.ids, source.ids, runtime.decode)
            for answer, source in zip(answers, reference.answers, strict=True)
        ]
        metrics["answer_recall"] = round(sum(map(checks.recall, answers, reference.answers)) / len(answers), 4)
        chosen = long_context.choose(context, most=long_context.longest_prompt(context, variant))
        return failures, long_context.answer(runtime, reference.long_context, chosen)
    return failures, {}


def _judge_tutorial(
    directory: Path, evidence: dict[str, Any], *, reference: Reference, params: Validate
) -> Iterator[Failure]:
    tutorial = OptimumIntel(directory, device="CPU")
    first = ask(tutorial, reference.answers[0].question, max_new_tokens=params.max_new_tokens)
    say(f"{tutorial.name}: {first.text.strip()}")
    evidence[tutorial.name] = {"device": tutorial.device, "text": first.text}
    return checks.check_first_answer(first, reference, params=params)


def departure(ids: list[int], source: list[int], decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """Return the text of `ids` in three parts: what it shares with `source`, the first token that differs, the rest.

    `common_tokens` is the number of tokens in the first part; `departs` is false when `ids` and `source` are equal.
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

"""Prove one variant: run every check through the runtime that an application would use, in float32 on the CPU.

It is also measured with this machine's defaults. No two of the runtimes are loaded at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from pipeline.common.checkpoint import expected_shapes, read_json
from pipeline.common.errors import PipelineError, refusal
from pipeline.common.files import digest, list_files
from pipeline.common.manifest import VariantManifest, read_manifest, verify
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
    config = read_json(source / "config.json")
    original = matrices(dict(expected_shapes(config)))
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


@dataclass(frozen=True)
class Case:
    """A variant whose files are right, and what it is compared with."""

    directory: Path
    variant: Variant
    context: dict[str, int]
    reference: Reference
    distributions: Distributions
    params: Validate


@dataclass(frozen=True)
class Part:
    """What a part of the validation found."""

    failures: Sequence[Failure] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)


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

    Raises MemoryError when memory ran out.
    """
    if failures := (
        check_files(directory, variant=variant, model=model, source=source, params=params)
        or check_range(directory, variant=variant, source=source, reference=reference)
    ):
        return _result(Part(failures))
    manifest = read_manifest(directory, VariantManifest)
    case = Case(directory, variant, manifest.context, reference, distributions, params)
    # The manifest's hash proves, when the artifact is published, that these very files were validated.
    stated = {"manifest_sha256": digest(directory / MANIFEST).sha256, "recipe": manifest.recipe.model_dump()}
    stated |= {"runs_on": manifest.runtime.model_dump(), "tools": manifest.tools}
    size = sum((directory / path).stat().st_size for path in list_files(directory))
    parts = [Part(metrics={"size_bytes": size}, evidence=stated, measured=_measure(case))]
    answered, said = _answer(case)
    parts.append(answered)
    if said is not None:
        parts.append(_compare(case, said))
        if not isinstance(variant, OnnxInt4) and "NPU" not in manifest.runtime.devices:
            parts.append(_follow_tutorial(case))
    return _result(*parts)


def _result(*parts: Part) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    failures = [failure for part in parts for failure in part.failures]
    metrics: dict[str, Any] = {"passed": not failures}
    evidence: dict[str, Any] = {"checks": list(checks.CHECKS)}
    measured: dict[str, Any] = {}
    for part in parts:
        metrics |= part.metrics
        evidence |= part.evidence
        measured |= part.measured
    return metrics, evidence | {"failures": list(map(str, failures))}, measured


def _measure(case: Case) -> dict[str, Any]:
    # Nothing depends on what is measured, so a device that is not here, or fails, is only told.
    options: dict[str, Any] = {"variant": case.variant, "device": case.params.openvino_device}
    try:
        measured = measure(
            lambda: load_runtime(case.directory, precision="default", **options), case.reference.answers
        )[1]  # the runtime is not kept, so that it is no longer loaded when the next one is
        say(f"loaded by {measured['runtime']} on {measured['device']} in {measured['load_time_s']:.1f} s")
        return measured | measure_default_precision(
            case.directory,
            context=case.context,
            reference=case.reference,
            distributions=case.distributions,
            **options,
        )
    except RuntimeError as error:
        say(f"not measured: {refusal(error)}")
        return {}


def _answer(case: Case) -> tuple[Part, long_context.Said | None]:
    # Return what the answers to the questions show, and the answers to the long prompts. They are None when the variant
    # does not load or reads texts wrongly, since it is then asked nothing.
    reference, params = case.reference, case.params
    try:
        runtime = load_runtime(case.directory, variant=case.variant)
        failures, answers = checks.check_runtime(runtime, reference, max_new_tokens=params.max_new_tokens)
    except RuntimeError as error:
        return Part([Failure("load", "a runtime that loads it", refusal(error))]), None
    metrics: dict[str, Any] = {"runtime": runtime.name, "device": runtime.device}
    if failures:
        return Part(failures, metrics), None
    metrics["answer_recall"] = round(sum(map(checks.recall, answers, reference.answers)) / len(answers), 4)
    evidence = [
        {"question": answer.question} | departure(answer.ids, source.ids, runtime.decode)
        for answer, source in zip(answers, reference.answers, strict=True)
    ]
    judged = Part(list(checks.check_answers(answers, reference, params=params)), metrics, {"answers": evidence})
    chosen = long_context.choose(case.context, most=long_context.longest_prompt(case.context, case.variant))
    return judged, long_context.answer(runtime, reference.long_context, chosen)


def _compare(case: Case, said: long_context.Said) -> Part:
    # Compare the variant's logits with the source's, and on DirectML with its own on the CPU.
    directory, variant, reference = case.directory, case.variant, case.reference
    scorer = load_scorer(directory, variant=variant, context=case.context)
    comparison = compare(scorer, reference.continuations, case.distributions)
    long_prompts = long_context.compare(scorer, reference.long_context, said, case.distributions)
    failures = [
        *checks.check_fidelity(comparison, limits=variant.limits),
        *checks.check_long_context(long_prompts, limits=variant.limits),
    ]
    measured = {}
    if variant.directml:
        found, measured["directml"] = check_directml(
            directory, cpu=scorer, reference=reference, limits=variant.limits, params=case.params
        )
        failures += found
    decode = Tokenizer.from_file(str(directory / "tokenizer.json")).decode
    continuations = [
        departure(answer.ids[:prefix] + ([] if token is None else [token]), answer.ids, decode)
        for answer, prefix, token in zip(
            reference.continuations, comparison.prefixes, comparison.preferred, strict=True
        )
    ]
    evidence = {"continuations": continuations, "long_context": [vars(prompt) for prompt in long_prompts]}
    return Part(failures, {} if comparison.non_finite else comparison.metrics(), evidence, measured)


def _follow_tutorial(case: Case) -> Part:
    tutorial = OptimumIntel(case.directory, device="CPU")
    first = ask(tutorial, case.reference.answers[0].question, max_new_tokens=case.params.max_new_tokens)
    say(f"{tutorial.name}: {first.text.strip()}")
    failures = list(checks.check_first_answer(first, case.reference, params=case.params))
    return Part(failures, evidence={tutorial.name: {"device": tutorial.device, "text": first.text}})


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

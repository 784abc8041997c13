"""Measure what each quantization option costs and loses on `smol-phi3`, and write bench/fidelity.md.

Run `dvc repro validate` first, for the checkpoint, the FP16 IR, the reference and the calibration data.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import nncf

from bench.measure import WORK
from bench.twins import Change, leave_the_grid, untie, write_twin
from pipeline.check.fidelity import compare, read_distributions
from pipeline.check.measurement import load_runtime, load_scorer
from pipeline.check.reference import read_reference
from pipeline.common import paths
from pipeline.common.files import replace_file
from pipeline.common.manifest import tool_versions
from pipeline.common.params import OnnxInt4, OpenvinoInt4, load_params
from pipeline.convert import onnx_genai, openvino
from pipeline.convert.backend import backend
from pipeline.convert.calibration import Calibration
from pipeline.convert.hessians import hessians, write_calibration
from pipeline.run.openvino import model_inputs
from pipeline.run.source_model import Torch

MODEL = "smol-phi3"
RESULTS = Path(__file__).with_suffix(".json")
FOLDER = WORK / "fidelity"
QUESTIONS = 3  # for the speed test, after one more that warms up and is not counted
# The former defaults as NNCF's options; only this benchmark still uses NNCF's calibration.
NNCF: dict[str, dict[str, Any]] = {
    "openvino-int4": {
        "awq": True,
        "gptq": True,
        "sensitivity_metric": nncf.SensitivityMetric.MAX_ACTIVATION_VARIANCE,
    },
    "npu-int4-channelwise": {"scale_estimation": True, "gptq": True},
    "npu-int4-group128": {"awq": True, "scale_estimation": True},
}
FORMER = "NNCF's calibration"
PLAIN, SOLVER, ROTATED = "plain (the tutorial's)", "solver", "solver, rotated"
SHAPES: dict[str, dict[str, Any]] = {
    "openvino-int4": {"group_size": 128, "ratio": 0.6},
    "npu-int4-channelwise": {"group_size": -1, "ratio": 1.0},
    "npu-int4-group128": {"group_size": 128, "ratio": 1.0},
}
INT8 = ["last_matmul", "mixed_layers"]
ONNX: dict[str, dict[str, Any]] = {
    "default, symmetric, block 32 (the tutorial's)": {"algorithm": "default", "symmetric": True},
    "default, symmetric, block 128": {"algorithm": "default", "symmetric": True, "block_size": 128},
    "rtn, asymmetric": {},
    "rtn, asymmetric, INT8 head and mixed layers": {"int8": INT8},
    "k_quant, asymmetric, INT8 head and mixed layers": {"algorithm": "k_quant", "int8": INT8},
    "solver, symmetric, block 32": {"algorithm": "default", "symmetric": True, "calibrated": True},
    "solver, symmetric, block 128": {"algorithm": "default", "symmetric": True, "block_size": 128, "calibrated": True},
    "solver, asymmetric": {"calibrated": True},
    "solver, asymmetric, INT8 head and mixed layers": {"calibrated": True, "int8": INT8},
}
# Models that compute the same with other weights, and the changes to each variant's default recipe to build from them.
TWINS: dict[str, tuple[Change, dict[str, dict[str, bool]]]] = {
    "head of its own": (untie, {SOLVER: {"rotated": False}, ROTATED: {"rotated": True}}),
    "off the 4-bit grid": (leave_the_grid, {"plain": {"calibrated": False, "rotated": False}, SOLVER: {}}),
}


@dataclass(frozen=True)
class Source:
    """The paths of a checkpoint, its FP16 IR and its calibration."""

    checkpoint: Path
    fp16: Path
    calibration: Path


SMOL_PHI3 = Source(paths.source(MODEL), paths.variant(MODEL, "openvino-fp16"), paths.calibration(MODEL))


def make_twin(change: Change, folder: Path) -> Source:
    """Apply `change` to `smol-phi3`, build its IR, calibrate it on the same answers, all in `folder`."""
    found = Source(folder / "checkpoint", folder / "fp16", folder / "calibration")
    if not found.calibration.exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_twin(SMOL_PHI3.checkpoint, found.checkpoint, change)
        found.fp16.mkdir()
        openvino.export_fp16(found.checkpoint, found.fp16)
        answers = Calibration(SMOL_PHI3.calibration, SMOL_PHI3.checkpoint).summary.answers
        aside = folder / "statistics"
        write_calibration(aside, answers=answers, layers=hessians(Torch(found.checkpoint), answers))
        aside.rename(found.calibration)
    return found


def recipes() -> dict[str, dict[str, OpenvinoInt4 | OnnxInt4]]:
    """Return the recipes to compare, by variant and label."""
    found: dict[str, dict[str, OpenvinoInt4 | OnnxInt4]] = {}
    params = load_params()
    for variant, shape in SHAPES.items():
        default = params.get_variant(variant)
        plain = OpenvinoInt4(stage="quantize_openvino", limits=default.limits, symmetric=True, **shape)
        found[variant] = {PLAIN: plain, FORMER: plain, SOLVER: _without_npu(default)}
    fixed = {"stage": "build_onnx", "algorithm": "rtn", "symmetric": False, "block_size": 32, "int8": []}
    for variant, provider in {"onnx-directml-int4": "dml", "onnx-cpu-int4": "cpu"}.items():
        fixed |= {"execution_provider": provider, "limits": params.get_variant(variant).limits}
        found[variant] = {name: OnnxInt4(**fixed | options) for name, options in ONNX.items()}
    for twin, (_, options) in TWINS.items():
        for variant in (*SHAPES, "onnx-directml-int4", "onnx-cpu-int4"):
            default = _without_npu(params.get_variant(variant))
            found[f"{variant}: {twin}"] = {name: default.model_copy(update=option) for name, option in options.items()}
    return found


def _without_npu(recipe: Any) -> Any:
    return recipe.model_copy(update={"npu": None}) if isinstance(recipe, OpenvinoInt4) else recipe


@contextmanager
def calibrated_by_nncf(variant: str, source: Source) -> Iterator[None]:
    """In this context NNCF calibrates `variant` with its former default options, on the answers of `source`."""
    compress = nncf.compress_weights
    summary = Calibration(source.calibration, source.checkpoint).summary
    answers = [model_inputs(ids) for ids in summary.answers]
    options = NNCF[variant] | {"dataset": nncf.Dataset(answers)}
    nncf.compress_weights = lambda model, **own: compress(model, **own | options)
    try:
        yield
    finally:
        nncf.compress_weights = compress


def measure(
    label: str, variant: str, recipe: OpenvinoInt4 | OnnxInt4, directory: Path, source: Source
) -> dict[str, float]:
    """Build `recipe` of `source` in `directory`.

    Returns its size in MB, build time in s, fidelity, and decode speed on the CPU.
    """
    reference = read_reference(paths.reference(MODEL))
    started = time.perf_counter()
    calibration = None
    if recipe.calibrated:
        calibration = Calibration(source.calibration, source.checkpoint, rotated=recipe.rotated)
    if isinstance(recipe, OpenvinoInt4):
        with calibrated_by_nncf(variant, source) if label == FORMER else nullcontext():
            openvino.build_int4(
                source.checkpoint,
                source.fp16,
                directory,
                recipe=recipe,
                adjust_group_size=True,
                trust_remote_code=False,
                calibration=calibration,
            )
    else:
        onnx_genai.build_int4(
            source.checkpoint, directory, recipe=recipe, trust_remote_code=False, calibration=calibration
        )
    seconds = time.perf_counter() - started
    weights = directory / backend(recipe).WEIGHTS
    runtime = load_runtime(directory, variant=recipe, precision="default")
    speeds = []
    for answer in reference.continuations[: QUESTIONS + 1]:
        speeds.append(1 / runtime.generate(answer.prompt_ids, max_new_tokens=32).time_per_token)
    del runtime
    scorer = load_scorer(directory, variant=recipe, context={})  # none of the models has LongRoPE
    comparison = compare(scorer, reference.continuations, read_distributions(paths.distributions(MODEL)))
    metrics = comparison.metrics()
    chosen = ("kl_mean", "kl_p99", "top1_agreement", "perplexity_ratio", "common_prefix_tokens")
    return {
        "size_mb": round(weights.stat().st_size / 1e6, 1),
        **{name: metrics[name] for name in chosen},
        "build_s": round(seconds, 1),
        "tokens_per_second": round(median(speeds[1:]), 1),
    }


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return `results` as Markdown, one table per variant; the lowest mean KL divergence is bold."""
    parts = []
    params = load_params()
    for variant, rows in results.items():
        default = _without_npu(params.get_variant(variant.partition(": ")[0]))
        best = min(rows, key=lambda name: rows[name]["kl_mean"])
        columns = list(rows[best])
        missing = [name for name in recipes()[variant] if name not in rows]
        parts += [f"\n## {variant}\n"]
        if missing:
            parts += [f"Not measured yet: {'; '.join(missing)}.\n"]
        parts += [f"| option | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
        for name, row in rows.items():
            label = f"**{name}**" if name == best and not missing else name
            label += " (default)" * (name != FORMER and recipes()[variant][name] == default)
            parts.append(f"| {label} | {' | '.join(f'{row[column]:g}' for column in columns)} |")
    return "\n".join(parts)


@click.command()
def main() -> None:
    """Measure every option on `smol-phi3` and write bench/fidelity.json and bench/fidelity.md.

    A run continues where an interrupted one ended; delete bench/fidelity.json to measure all options anew.
    """
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    for variant, options in recipes().items():
        rows = results.setdefault(variant, {})
        for name, recipe in options.items():
            if name in rows:
                continue
            click.echo(f"{variant}: {name}")
            _, _, twin = variant.partition(": ")
            source = make_twin(TWINS[twin][0], FOLDER / twin.replace(" ", "-")) if twin else SMOL_PHI3
            with tempfile.TemporaryDirectory(prefix="phi3-bench-") as directory:
                rows[name] = measure(name, variant, recipe, Path(directory), source)
            click.echo(rows[name])
            replace_file(RESULTS, json.dumps(results, indent=2))
    versions = ", ".join(f"{k} {v}" for k, v in tool_versions("openvino", "nncf", "onnxruntime-genai").items())
    heading = f"# Quantization options on {MODEL}\n\nMade by `make bench-fidelity`; CPU, {versions}.\n"
    replace_file(RESULTS.with_suffix(".md"), heading + table(results))
    shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main()

"""What each quantization option costs and loses: builds them all from the embedded model and writes bench/fidelity.md.

Run `dvc repro validate` first, for the checkpoint, the FP16 IR, the reference and the calibration data.
"""

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, get_args

import click

from pipeline import onnx_genai, openvino, paths
from pipeline.calibration import read_calibration
from pipeline.fidelity import compare, read_distributions
from pipeline.manifest import replace_file, tool_versions
from pipeline.measurement import load_runtime, load_scorer
from pipeline.params import OnnxInt4, OpenvinoInt4, SensitivityMetric, load_params
from pipeline.reference import read_reference

MODEL = "smol-phi3"
RESULTS = Path(__file__).with_suffix(".json")
QUESTIONS = 3  # of the speed test; the first, which warms up, is not counted
CALIBRATED = {"calibrated": True}
OPENVINO: dict[str, dict[str, Any]] = {
    "plain (the tutorial's)": {},
    "AWQ, data-free": {"awq": True},
    "AWQ": {"awq": True} | CALIBRATED,
    "SE": {"scale_estimation": True} | CALIBRATED,
    "GPTQ": {"gptq": True} | CALIBRATED,
    "AWQ + SE": {"awq": True, "scale_estimation": True} | CALIBRATED,
    "SE + GPTQ": {"scale_estimation": True, "gptq": True} | CALIBRATED,
    "AWQ + GPTQ": {"awq": True, "gptq": True} | CALIBRATED,
    "AWQ + SE + GPTQ": {"awq": True, "scale_estimation": True, "gptq": True} | CALIBRATED,
}
METRICS = get_args(SensitivityMetric)[1:]  # the first needs no data, and is the default
BEST = "max_activation_variance"  # of these
MIXED = [("AWQ + SE", metric) for metric in METRICS] + [
    (name, BEST) for name in ("GPTQ", "AWQ + GPTQ", "AWQ + SE + GPTQ")
]
INT4 = {name: options for name, options in OPENVINO.items() if name == "GPTQ" or "GPTQ" not in name}
INT4 |= {f"{name}, {metric}": OPENVINO[name] | {"sensitivity_metric": metric} for name, metric in MIXED}
INT8 = ["last_matmul", "mixed_layers"]
ONNX: dict[str, dict[str, Any]] = {
    "default, symmetric, block 32 (the tutorial's)": {"algorithm": "default", "symmetric": True},
    "default, symmetric, block 128": {"algorithm": "default", "symmetric": True, "block_size": 128},
    "rtn, asymmetric": {},
    "rtn, asymmetric, INT8 head": {"int8": INT8[:1]},
    "rtn, symmetric, INT8 head and mixed layers": {"symmetric": True, "int8": INT8},
    "rtn, asymmetric, INT8 head and mixed layers": {"int8": INT8},
    "k_quant, asymmetric": {"algorithm": "k_quant"},
    "k_quant, asymmetric, INT8 head and mixed layers": {"algorithm": "k_quant", "int8": INT8},
}


def recipes() -> dict[str, dict[str, OpenvinoInt4 | OnnxInt4]]:
    """Return the recipes to compare, by variant and label."""

    def openvino_recipe(options: dict[str, Any], **fixed: Any) -> OpenvinoInt4:
        return OpenvinoInt4(stage="quantize_openvino", symmetric=True, **fixed | options)

    def onnx_recipe(options: dict[str, Any], provider: str) -> OnnxInt4:
        plain = {"algorithm": "rtn", "symmetric": False, "block_size": 32, "int8": []}
        return OnnxInt4(stage="build_onnx", execution_provider=provider, **plain | options)

    return {
        "openvino-int4": {k: openvino_recipe(v, group_size=128, ratio=0.6) for k, v in INT4.items()},
        "onnx-directml-int4": {k: onnx_recipe(v, "dml") for k, v in ONNX.items()},
        "onnx-cpu-int4": {k: onnx_recipe(ONNX[k], "cpu") for k in ONNX if "block" in k or "mixed" in k},
        "npu-int4-channelwise": {k: openvino_recipe(v, group_size=-1, ratio=1.0) for k, v in OPENVINO.items()},
        "npu-int4-group128": {k: openvino_recipe(v, group_size=128, ratio=1.0) for k, v in OPENVINO.items()},
    }


def measure(recipe: OpenvinoInt4 | OnnxInt4, directory: Path) -> dict[str, float]:
    """Build `recipe` in `directory` and return size in MB, build time in s, fidelity and decode speed on the CPU."""
    reference = read_reference(paths.reference(MODEL))
    started = time.perf_counter()
    if isinstance(recipe, OpenvinoInt4):
        openvino.quantize_int4(
            paths.variant(MODEL, "openvino-fp16"),
            directory,
            recipe=recipe,
            adjust_group_size=True,
            calibration=read_calibration(paths.calibration(MODEL)),
        )
    else:
        onnx_genai.build_int4(
            paths.source(MODEL),
            directory,
            recipe=recipe,
            trust_remote_code=False,
        )
    seconds = time.perf_counter() - started
    weights = directory / (openvino if isinstance(recipe, OpenvinoInt4) else onnx_genai).WEIGHTS
    runtime = load_runtime(directory, variant=recipe, precision="default")
    speeds = []
    for answer in reference.continuations[: QUESTIONS + 1]:
        speeds.append(1 / runtime.generate(answer.prompt_ids, max_new_tokens=32).time_per_token)
    del runtime
    comparison = compare(
        load_scorer(directory, variant=recipe), reference.continuations, read_distributions(paths.distributions(MODEL))
    )
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
        default = params.get_variant(variant)
        if isinstance(default, OpenvinoInt4):
            default = default.model_copy(update={"npu": None})
        best = min(rows, key=lambda name: rows[name]["kl_mean"])
        columns = list(rows[best])
        missing = [name for name in recipes()[variant] if name not in rows]
        parts += [f"\n## {variant}\n"]
        if missing:
            parts += [f"Not measured yet: {'; '.join(missing)}.\n"]
        parts += [f"| option | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
        for name, row in rows.items():
            label = f"**{name}**" if name == best and not missing else name
            label += " (default)" * (recipes()[variant][name] == default)
            parts.append(f"| {label} | {' | '.join(f'{row[column]:g}' for column in columns)} |")
    return "\n".join(parts)


@click.command()
def main() -> None:
    """Measure every option on the embedded model and write bench/fidelity.json and bench/fidelity.md.

    Goes on where an interrupted run ended; delete bench/fidelity.json to measure all options anew.
    """
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    for variant, options in recipes().items():
        rows = results.setdefault(variant, {})
        for name, recipe in options.items():
            if name in rows:
                continue
            click.echo(f"{variant}: {name}")
            with tempfile.TemporaryDirectory(prefix="phi3-bench-") as directory:
                rows[name] = measure(recipe, Path(directory))
            click.echo(rows[name])
            replace_file(RESULTS, json.dumps(results, indent=2))
    versions = ", ".join(f"{k} {v}" for k, v in tool_versions("openvino", "nncf", "onnxruntime-genai").items())
    heading = f"# Quantization options on {MODEL}\n\nMade by `make bench-fidelity`; CPU, {versions}.\n"
    replace_file(RESULTS.with_suffix(".md"), heading + table(results))


if __name__ == "__main__":
    main()

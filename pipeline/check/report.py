"""The report: one HTML page per model that needs no network, and the data of its two figures for `dvc plots`."""

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

from pipeline.check.reference import read_reference
from pipeline.common import paths
from pipeline.common.checkpoint import read_json
from pipeline.common.manifest import read_manifest
from pipeline.common.params import Params

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 340, 56, 44  # of the scatter plot, in SVG units
FIGURES: dict[str, tuple[str, str, float, int]] = {  # heading, unit, factor and decimals of the metrics in the tables
    "size_bytes": ("size", "MB", 1e-6, 1),
    "kl_mean": ("mean KL", "nats", 1, 4),
    "kl_p99": ("99th percentile KL", "nats", 1, 3),
    "kl_max": ("largest KL", "nats", 1, 2),
    "top1_agreement": ("top-1 agreement", "%", 100, 1),
    "perplexity_ratio": ("perplexity ratio", "", 1, 3),
    "common_prefix_tokens": ("common greedy prefix", "tokens", 1, 1),
    "kl_mean_default": ("mean KL here", "nats", 1, 4),
    "time_to_first_token_s": ("first token", "s", 1, 2),
    "tokens_per_second": ("speed", "tokens/s", 1, 1),
    "load_time_s": ("load time", "s", 1, 1),
    "peak_memory_bytes": ("peak memory", "GB", 1e-9, 2),
}


def collect(params: Params, *, model: str) -> dict[str, Any]:
    """Return what the page shows of `model`; a variant that was not validated yet has neither metrics nor evidence.

    Measurements stay on the machine that made them: a variant that was measured elsewhere has none here.
    """
    source, reference = read_manifest(paths.source(model)), read_reference(paths.reference(model))
    variants: list[dict[str, Any]] = []
    for number, name in enumerate(params.variants, start=1):
        metrics, evidence, measured = (
            _read(path(model, name)) for path in (paths.metrics, paths.validation, paths.measured)
        )
        variants.append(
            {
                "number": number,
                "name": name,
                "status": "not validated" if not metrics else "pass" if metrics["passed"] else "fail",
                "metrics": metrics,
                "evidence": evidence,
                "measured": measured,
                "limits": dict(params.variants[name].limits),
                "layers": bits_per_layer(evidence.get("recipe", {}).get("achieved", {}).get("matrices", {})),
            }
        )
    return {
        "model": model,
        "source": source,
        "reference": reference,
        "tokens": sum(len(answer.ids) for answer in reference.continuations),
        "variants": variants,
        "figures": FIGURES,
        "scatter": scatter([variant for variant in variants if "kl_mean" in variant["metrics"]]),
        "blobs": [read_manifest(path.parent) for path in sorted(paths.blobs(model).glob(f"*/{paths.MANIFEST}"))],
    }


def render(content: dict[str, Any]) -> str:
    """Return the self-contained page for `content`, which `collect` returned."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    return environment.get_template("report.html.j2").render(content)


def figure(value: float | None, name: str) -> str:
    """Return a metric as the tables show it, for example `114.4 MB`; a dash when it was not measured."""
    if value is None:
        return "–"
    _, unit, factor, decimals = FIGURES[name]
    shown = value * factor
    text = f"{shown:.{decimals}f}" if shown == 0 or shown >= 10**-decimals else f"{shown:.0e}"
    return f"{text} {unit}".strip()


def plot_rows(content: dict[str, Any], *names: str) -> str:
    """Return the metrics `names` of all measured variants as CSV, in the units of the page."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["variant", *names])
    for variant in content["variants"]:
        if all(name in variant["metrics"] for name in names):
            writer.writerow([variant["name"], *(variant["metrics"][name] * FIGURES[name][2] for name in names)])
    return stream.getvalue().rstrip()


def bits_per_layer(matrices: dict[str, str]) -> dict[str, dict[int, str]]:
    """Return for each kind of matrix (such as `qkv_proj`) the format in each layer; -1 stands for no layer."""
    found: dict[str, dict[int, str]] = {}
    for name, form in matrices.items():
        name = name.removeprefix("model.").removesuffix(".weight")
        layer = re.search(r"layers\.(\d+)\.(?:.*\.)?(\w+)$", name)
        kind, index = (layer[2], int(layer[1])) if layer else (name, -1)
        found.setdefault(kind, {})[index] = form
    return found


def scatter(variants: list[dict[str, Any]]) -> dict[str, Any]:
    """Return points and ticks of mean KL divergence over size, in SVG units."""
    sizes = [variant["metrics"]["size_bytes"] / 1e6 for variant in variants]
    losses = [variant["metrics"]["kl_mean"] for variant in variants]
    x_ticks, y_ticks = _ticks(max(sizes, default=1)), _ticks(max(losses, default=1))

    def x(value: float) -> float:
        return round(LEFT + value / x_ticks[-1] * (WIDTH - LEFT - 20), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / y_ticks[-1] * (HEIGHT - BOTTOM - 20), 1)

    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "bottom": HEIGHT - BOTTOM,
        "x_ticks": [(x(tick), f"{tick:g}") for tick in x_ticks],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in y_ticks],
        "points": [
            {"x": x(size), "y": y(loss), "variant": variant}
            for variant, size, loss in zip(variants, sizes, losses, strict=True)
        ],
    }


def _ticks(highest: float) -> list[float]:
    # Return ticks from 0 to beyond `highest`, in about five steps of 1, 2 or 5 times a power of ten.
    rough = highest / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(index * step, 10) for index in range(math.floor(highest / step) + 2)]


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}

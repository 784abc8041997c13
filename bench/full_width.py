"""Measure what the solver and NNCF's calibration cost per layer at Phi-3-mini's width, in the same run.

Run it with `make bench-width`. The first two layers of `smol-phi3` are widened to that width and calibrated on random
tokens, since the cost depends on the shapes only. Each step runs in a process of its own.
"""

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import click

from bench.fidelity import FORMER, SMOL_PHI3, Source, calibrated_by_nncf
from bench.make_checkpoint import Widening, widen
from bench.measure import WORK, Cost, made_by, measure
from pipeline.common.checkpoint import read_json
from pipeline.common.files import replace_file
from pipeline.common.params import OnnxInt4, OpenvinoInt4, load_params
from pipeline.convert import onnx_genai, openvino
from pipeline.convert.calibration import Calibration
from pipeline.costs import estimate
from pipeline.graph import Cell

RESULTS = Path(__file__).with_suffix(".json")
FOLDER = WORK / "full_width"
BESIDE = "npu-int4-channelwise"  # the variant that NNCF calibrates, too; it takes many minutes
LAYERS, ANSWERS, LENGTH = 2, 32, 128  # 4,096 tokens
GOALS = {"faster": 8.0, "memory_gb": 6.0}


def calibrate(checkpoint: Path, target: Path) -> None:
    """Write the calibration of `checkpoint` on random answers."""
    import torch

    from pipeline.convert.hessians import hessians, write_calibration
    from pipeline.run.source_model import Torch

    answers = torch.randint(
        read_json(checkpoint / "config.json")["vocab_size"],
        (ANSWERS, LENGTH),
        generator=torch.Generator().manual_seed(0),
    ).tolist()
    write_calibration(target, answers=answers, layers=hessians(Torch(checkpoint), answers))


def quantize(folder: Path, variant: str, calibration: Calibration | None) -> None:
    """Build `variant` of the checkpoint in `folder`."""
    recipe = load_params().get_variant(variant)
    target = folder / "built"
    target.mkdir()
    if isinstance(recipe, OnnxInt4):
        onnx_genai.build_int4(
            folder / "checkpoint", target, recipe=recipe, trust_remote_code=False, calibration=calibration
        )
    elif isinstance(recipe, OpenvinoInt4):
        openvino.quantize_int4(folder / "fp16", target, recipe=recipe, adjust_group_size=False, calibration=calibration)


def table(costs: dict[str, Cost], planned: dict[str, float]) -> str:
    """Return the costs of the steps, the time per layer, and the memory planned for 32 layers, as Markdown."""
    made = made_by("openvino", "nncf", "onnxruntime-genai", "torch")
    lines = [f"# {LAYERS} layers of Phi-3-mini's width: the solver and NNCF's calibration", ""]
    lines += [f"Made by `make bench-width` on {made['date']}: {made['machine']}; {made['versions']}.", ""]
    lines += [
        f"Calibrated on {ANSWERS * LENGTH:,} tokens. A calibrated build less the plain one is the calibration.",
        "",
    ]
    columns = list(next(iter(costs.values())).figures())
    lines += [f"| step | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    lines += [f"| {step} | {' | '.join(f'{v:g}' for v in cost.figures().values())} |" for step, cost in costs.items()]
    plain, former, own = (costs[f"{BESIDE}: {name}"].wall for name in ("plain", FORMER, "solver"))
    former, own = (former - plain) / LAYERS, (own - plain) / LAYERS
    lines += ["", f"Calibration of `{BESIDE}`: {former:.1f} s per layer by NNCF, {own:.1f} s by the solver, which is"]
    lines += [f"{former / own:.1f} times as fast; the goal is {GOALS['faster']:g}. For 32 layers these are"]
    lines += [f"{32 * former / 60:.0f} and {32 * own / 60:.0f} minutes, extrapolated from {LAYERS} layers."]
    lines += ["", f"Anonymous memory at 32 layers by `phi3 plan`; the goal is {GOALS['memory_gb']:g} GB.", ""]
    lines += ["| step | GB |", "| --- | --- |", *(f"| {cell} | {memory:.1f} |" for cell, memory in planned.items())]
    return "\n".join(lines)


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Measure calibration and quantization at full width and write bench/full_width.md and .json."""
    if context.invoked_subcommand:
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    widen(SMOL_PHI3.checkpoint, FOLDER / "checkpoint", layers=LAYERS)
    (FOLDER / "fp16").mkdir()
    openvino.export_fp16(FOLDER / "checkpoint", FOLDER / "fp16")
    params = load_params()
    variants = [name for name, variant in params.variants.items() if not name.endswith("fp16")]
    steps = {"calibrate": ["calibrate"]}
    for variant in variants:
        for label in ("plain", *([FORMER] if variant == BESIDE else []), "solver"):
            steps[f"{variant}: {label}"] = ["quantize", variant, label]
    costs: dict[str, Cost] = {}
    for step, arguments in steps.items():
        click.echo(step)
        program = [sys.executable, "-m", "bench.full_width", *arguments]
        tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as in the stages
        costs |= measure(program, step=step, cwd=Path.cwd(), log=FOLDER / "log", **tunables)
        click.echo(costs[step].figures())
    config, model = Widening(SMOL_PHI3.checkpoint, layers=32).config(), "phi-3-mini-4k-instruct"
    cells = [Cell("calibrate", model), *(Cell(params.get_variant(name).stage, model, name) for name in variants)]
    planned = {str(cell): estimate(cell, params=params, config=config).memory / 1e9 for cell in cells}
    text = table(costs, planned)
    click.echo(text)
    figures = {step: cost.figures() for step, cost in costs.items()}
    replace_file(RESULTS, json.dumps({"steps": figures, "planned_gb": planned}, indent=2))
    replace_file(RESULTS.with_suffix(".md"), text)
    shutil.rmtree(FOLDER)


@main.command("calibrate")
def _calibrate() -> None:
    calibrate(FOLDER / "checkpoint", FOLDER / "calibration")


@main.command("quantize")
@click.argument("variant")
@click.argument("label")
def _quantize(variant: str, label: str) -> None:
    shutil.rmtree(FOLDER / "built", ignore_errors=True)
    source = Source(FOLDER / "checkpoint", FOLDER / "fp16", FOLDER / "calibration")
    calibration = Calibration(source.calibration, source.checkpoint) if label == "solver" else None
    with calibrated_by_nncf(variant, source) if label == FORMER else nullcontext():
        quantize(FOLDER, variant, calibration)


if __name__ == "__main__":
    main()

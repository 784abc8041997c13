"""Build a model of Phi-3-mini's shape by hand, as tutorials do, and by this pipeline, on the same machine.

Run it with `make bench`. `smol-phi3`, widened to that shape, takes the place of the real weights, since the cost
depends on the shapes only. Both ways use the tutorial's recipes, and both results are compared, matrix by matrix.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from bench.make_checkpoint import SMOL_PHI3, widen
from bench.measure import WORK, Cost, disk_used, made_by, measure, require_free
from pipeline.common.checkpoint import read_json
from pipeline.common.files import digest, replace_file
from pipeline.common.params import load_params
from pipeline.convert import onnx_format, openvino_format
from pipeline.costs import estimate
from pipeline.graph import Cell

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_suffix(".json")
MODEL = "full-size"
FREE = 60e9  # bytes of disk that a run may need
OPENVINO = {
    "openvino-fp16": ["--weight-format", "fp16"],
    "openvino-int4": ["--weight-format", "int4", "--sym", "--group-size", "128", "--ratio", "0.6"],
    "npu-int4-channelwise": ["--weight-format", "int4", "--sym", "--group-size", "-1", "--ratio", "1.0"],
    "npu-int4-group128": ["--weight-format", "int4", "--sym", "--group-size", "128", "--ratio", "1.0"],
}
ONNX = {"onnx-directml-int4": "dml", "onnx-cpu-int4": "cpu"}
PLAIN = {  # the tutorial's recipes in params.yaml's words
    "rotated: true": "rotated: false",
    "calibrated: true": "calibrated: false",
    "algorithm: rtn": "algorithm: default",
    "symmetric: false": "symmetric: true",
    "int8: [last_matmul, mixed_layers]": "int8: []",
}
STAGES = ("quantize_openvino", "build_onnx")  # with the stages that they need, as `make models` builds them
WHOLE = "make models"
GOALS = {"wall_ratio": 0.5, "openvino_anonymous_gb": 4.0, "onnx_anonymous_gb": 6.0, "disk_ratio": 1.1}


def by_hand(checkpoint: Path, folder: Path) -> tuple[dict[str, Cost], dict[str, Any]]:
    """Build each variant with the tutorial's command; return the costs and what was built. Artifacts are deleted."""
    costs, built = {}, {}
    for variant in (*OPENVINO, *ONNX):
        click.echo(f"by hand: {variant}")
        target = folder / variant
        if variant in OPENVINO:
            command = ["optimum-cli", "export", "openvino", "--model", str(checkpoint)]
            command += ["--task", "text-generation-with-past", *OPENVINO[variant], str(target)]
        else:
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-p", "int4"]
            command += ["-o", str(target), "-c", str(folder / "cache"), "-e", ONNX[variant]]
        costs |= measure(command, step=variant, cwd=folder, log=folder / "by-hand.log", GIT_DIR=os.devnull)
        built[variant] = content(target, variant)
        shutil.rmtree(target)
    return costs, built


def by_pipeline(checkpoint: Path, folder: Path) -> tuple[Cost, dict[str, Cost], dict[str, Any], dict[str, Any]]:
    """Build all variants with `make models` in a clone of this project.

    Returns the cost of the whole build, the cost of each stage, what was built, and further figures.
    """
    project = folder / "project"
    clone_project(project, plain=True)
    add_model(project, checkpoint, build=[MODEL])
    here = {"PYTHONPATH": str(project)}
    click.echo("by the pipeline")
    log = folder / "pipeline.log"
    # The clone uses the packages that are installed here.
    command = ["make", f"VENV={sys.prefix}", f"--old-file={sys.prefix}/.installed", "models"]
    costs = measure(command, step=WHOLE, cwd=project, log=log, **here)
    whole = costs.pop(WHOLE)
    artifacts = project / "artifacts" / MODEL
    built = {variant: content(artifacts / variant, variant) for variant in (*OPENVINO, *ONNX)}
    again = []
    for _ in range(2):
        started = time.monotonic()
        subprocess.run(["dvc", "repro", *STAGES], cwd=project, check=True, capture_output=True)
        again.append(round(time.monotonic() - started, 1))
    planned = plans(project, checkpoint, costs)
    more = {
        "planned": planned,
        "planned_disk_gb": round(sum(cost["disk_gb"] for cost in planned.values()), 2),
        "disk_gb": round(disk_used(project) / 1e9, 2),
        "artifacts_gb": round(sum(disk_used(artifacts / variant) for variant in built) / 1e9, 2),
        "noop_first_s": again[0],
        "noop_s": again[1],
    }
    return whole, costs, built, more


def clone_project(project: Path, *, plain: bool) -> None:
    """Clone this project into the folder `project`. When `plain`, its recipes become the tutorial's."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(project)], check=True)
    params = (project / "params.yaml").read_text("utf-8")
    for default, tutorial in PLAIN.items() if plain else ():
        params = params.replace(default, tutorial)
    (project / "params.yaml").write_text(params, "utf-8")


def add_model(project: Path, checkpoint: Path, *, build: list[str]) -> None:
    """Let `project` build the models `build`, of which the last one is new: it comes from `checkpoint`."""
    params = (project / "params.yaml").read_text("utf-8")
    block = f"  {build[-1]}:\n    source: {{path: {checkpoint}}}\n    license: MIT\n    group_size_fallback: error\n"
    params = params.replace("build: [smol-phi3]", f"build: [{', '.join(build)}]")
    (project / "params.yaml").write_text(params.replace("models:\n", f"models:\n{block}", 1), "utf-8")


def plans(project: Path, checkpoint: Path, costs: dict[str, Cost]) -> dict[str, dict[str, float]]:
    """Return the memory and disk that `phi3 plan` predicts for each step, in GB, beside the memory that it took."""
    params, config = load_params(project / "params.yaml"), read_json(checkpoint / "config.json")
    found = {}
    for step in costs:
        stage, *arguments = step.split()
        cost = estimate(Cell(stage, *arguments), params=params, config=config)
        measured = costs[step].anonymous / 1e9
        found[step] = {"memory_gb": round(cost.memory / 1e9, 2), "measured_gb": round(measured, 2)}
        found[step] |= {"ratio": round(cost.memory / 1e9 / measured, 2), "disk_gb": round(cost.disk / 1e9, 2)}
        found[step] |= {"seconds": round(cost.seconds)}
    return found


def content(directory: Path, variant: str) -> dict[str, Any]:
    """Return the format of each matrix of a built variant, the SHA-256 of its weights' file, and one of its weights.

    The latter is, for an IR, that of all matrices, scales and zero points, without constants that are not weights.
    """
    backend: Any = openvino_format if variant in OPENVINO else onnx_format
    formats = {matrix.name: matrix.format for matrix in backend.read_matrices(directory)}
    file = digest(directory / backend.WEIGHTS).sha256
    return {"formats": formats, "file": file, "weights": _weights(directory) if variant in OPENVINO else file}


def _weights(directory: Path) -> str:
    from openvino import Core

    operations = Core().read_model(directory / openvino_format.MODEL[0]).get_ops()
    constants = {node.get_friendly_name(): node for node in operations if node.get_type_name() == "Constant"}
    digests = [
        (name, hashlib.sha256(node.data.tobytes()).hexdigest())
        for name, node in sorted(constants.items())
        if name.startswith("self.")
    ]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def compare(hand: dict[str, Any], own: dict[str, Any]) -> dict[str, str]:
    """Return in words whether two variants have the same formats and the same weights."""
    weights = "differ"
    if hand["file"] == own["file"]:
        weights = "the same file"
    elif hand["weights"] == own["weights"]:
        weights = "the same matrices, scales and zero points; other constants are float16 by hand, float32 here"
    return {"formats": "the same" if hand["formats"] == own["formats"] else "differ", "weights": weights}


def peak(costs: dict[str, Cost], kind: str) -> float:
    """Return the largest anonymous memory, in GB, of the steps for `kind`: openvino or onnx."""
    return round(max(c.anonymous for step, c in costs.items() if ("onnx" in step) == (kind == "onnx")) / 1e9, 2)


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    totals, goals = results["totals"], results["reached"]
    lines = ["# Phi-3-mini-4k's shape: by hand and by the pipeline", ""]
    lines += [f"Made by `make bench` on {results['date']}: {results['machine']}; {results['versions']}.", ""]
    lines += ["| | by hand | pipeline | ratio | goal |", "| --- | --- | --- | --- | --- |"]
    ratio = f"{goals['wall_ratio']:.2f}"
    lines += [
        f"| wall time | {totals['hand_s']:.0f} s | {totals['pipeline_s']:.0f} s | {ratio} | {GOALS['wall_ratio']} |"
    ]
    for kind in ("openvino", "onnx"):
        hand, own = totals[f"hand_{kind}_gb"], goals[f"{kind}_anonymous_gb"]
        goal = f"{GOALS[f'{kind}_anonymous_gb']:g} GB"
        lines += [f"| largest anonymous memory, {kind} | {hand} GB | {own} GB | {own / hand:.2f} | {goal} |"]
    needed = f"{results['pipeline_more']['artifacts_gb'] + totals['checkpoint_gb']:.1f} GB of artifacts and checkpoint"
    own = f"{results['pipeline_more']['disk_gb']} GB"
    lines += [f"| disk | {needed} | {own} | {goals['disk_ratio']:.2f} | {GOALS['disk_ratio']} |"]
    lines += [f"| `dvc repro` with nothing to do | | {results['pipeline_more']['noop_s']} s | | 5 s |"]
    more = results["pipeline_more"]
    planned = f"{more['planned_disk_gb']} GB planned, {more['disk_gb']} GB taken"
    lines += ["", f"What `phi3 plan` said is below, step by step; disk in all: {planned}."]
    tables = {"By hand": results["hand"], "By the pipeline": results["pipeline"], "By plan": more["planned"]}
    for title, steps in tables.items():
        columns = list(next(iter(steps.values())))
        lines += ["", f"## {title}", "", f"| step | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(f'{row[c]:g}' for c in columns)} |" for name, row in steps.items()]
    lines += ["", "## The same artifacts", "", "| variant | bit widths | weights |", "| --- | --- | --- |"]
    for variant, same in results["same"].items():
        lines += [f"| {variant} | {same['formats']} | {same['weights']} |"]
    return "\n".join(lines)


@click.command()
@click.option("--layers", default=32, show_default=True, help="Fewer make a quicker trial, which is not recorded.")
def main(layers: int) -> None:
    """Build Phi-3-mini's shape by hand and by the pipeline, and write bench/full_size.md and .json.

    Example: make bench
    """
    folder = WORK.absolute() / "full_size"
    folder.mkdir(parents=True, exist_ok=True)
    require_free(folder, FREE * layers / 32)
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        widen(SMOL_PHI3, checkpoint, layers=layers)
    for left in ("hand", "pipeline"):
        shutil.rmtree(folder / left, ignore_errors=True)
        (folder / left).mkdir()
    hand, hand_built = by_hand(checkpoint, folder / "hand")
    whole, own, own_built, more = by_pipeline(checkpoint, folder / "pipeline")
    same = {variant: compare(hand_built[variant], own_built[variant]) for variant in hand_built}
    checkpoint_gb = disk_used(checkpoint) / 1e9
    hand_s, own_s = round(sum(cost.wall for cost in hand.values()), 1), round(whole.wall, 1)
    totals = {"checkpoint_gb": round(checkpoint_gb, 2), "hand_s": hand_s, "pipeline_s": own_s}
    totals |= {f"hand_{kind}_gb": peak(hand, kind) for kind in ("openvino", "onnx")}
    reached = {f"{kind}_anonymous_gb": peak(own, kind) for kind in ("openvino", "onnx")}
    reached["wall_ratio"] = round(own_s / hand_s, 3)
    reached["disk_ratio"] = round(more["disk_gb"] / (more["artifacts_gb"] + checkpoint_gb), 3)
    packages = ("openvino", "nncf", "optimum-intel", "onnxruntime-genai", "onnxruntime", "torch", "dvc")
    results = made_by(*packages) | {
        "layers": layers,
        "totals": totals,
        "reached": reached,
        "pipeline_more": more,
        "hand": {step: cost.figures() for step, cost in hand.items()},
        "pipeline": {step: cost.figures() for step, cost in ({WHOLE: whole} | own).items()},
        "same": same,
    }
    text = table(results)
    click.echo(text)
    if layers == 32:
        replace_file(RESULTS, json.dumps(results, indent=2))
        replace_file(RESULTS.with_suffix(".md"), text)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

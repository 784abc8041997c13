"""Run every stage with the default recipes at Phi-3-mini's full size, then publish and pull all variants.

Run it with `make bench-rehearsal`. The checkpoint is the embedded model, widened to Phi-3-mini-4k's shape
(bench/make_checkpoint.py), so its answers are real. What its variants lose is not what those of Phi-3-mini lose.
"""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import click

from bench.full_size import MODEL, ROOT, clone_project, plans
from bench.make_checkpoint import SHAPE, widen
from bench.measure import disk_used, made_by, measure
from pipeline.common import paths
from pipeline.common.checkpoint import read_json
from pipeline.common.manifest import replace_file
from pipeline.common.params import load_params

RESULTS = Path(__file__).with_suffix(".json")
FREE = 75e9  # bytes of disk that a run needs
WHOLE = "dvc repro"
GOALS = {"minutes": 90.0, "anonymous_gb": 8.0, "disk_ratio": 1.2}
FIGURES = ("passed", "size_bytes", "kl_mean", "kl_p99", "top1_agreement", "perplexity_ratio")


def release(project: Path, folder: Path, variants: list[str]) -> dict[str, float]:
    """Publish each of `variants` to a directory and pull it from there; return the seconds of both."""
    seconds: dict[str, float] = {}
    environment = {"PHI3_CACHE": str(folder / "cache")}
    for variant in variants:
        url, name = f"dir:{folder / 'registry'}", f"{MODEL}/{variant}"
        steps = {
            f"publish {variant}": ["phi3", "publish", name, "--to", url, "--version", "1.0.0"],
            f"pull {variant}": ["phi3", "pull", url, name],
        }
        for step, command in steps.items():
            started = time.monotonic()
            measure(command, step=step, cwd=project, log=folder / "release.log", PYTHONPATH=str(project), **environment)
            seconds[step] = round(time.monotonic() - started, 1)
        shutil.rmtree(folder / "registry")
        shutil.rmtree(folder / "cache")
    return seconds


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["# Every stage at Phi-3-mini's full size, with the default recipes", ""]
    lines += [f"Made by `make bench-rehearsal` on {results['date']}: {results['machine']}; {results['versions']}.", ""]
    lines += ["| | reached | goal |", "| --- | --- | --- |"]
    units = {"minutes": "minutes", "anonymous_gb": "GB in the largest process", "disk_ratio": "of artifacts and source"}
    lines += [f"| {name} ({units[name]}) | {results['reached'][name]:g} | {goal:g} |" for name, goal in GOALS.items()]
    lines += ["", "## Each stage, beside what `phi3 plan` said", ""]
    lines += ["| step | wall_s | planned_s | cpu_s | anonymous_gb | planned_gb | written_gb |", "| --- " * 7 + "|"]
    for step, row in results["steps"].items():
        said = results["planned"].get(step, {})
        cells = (row["wall_s"], said.get("seconds", ""), row["cpu_s"], row["anonymous_gb"], said.get("memory_gb", ""))
        lines += [f"| {step} | {' | '.join(str(cell) for cell in (*cells, row['written_gb']))} |"]
    lines += ["", "## What the variants lost", "", f"| variant | {' | '.join(FIGURES)} |"]
    lines += ["| --- " * (len(FIGURES) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[f]}' for f in FIGURES)} |" for name, row in results["metrics"].items()]
    lines += ["", "## Publishing and pulling, in seconds", "", "| step | seconds |", "| --- | --- |"]
    lines += [f"| {step} | {seconds:g} |" for step, seconds in results["release"].items()]
    return "\n".join(lines)


@click.command()
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=Path("bench/work"),
    show_default=True,
    help="Where everything is built; needs 75 GB.",
)
@click.option("--layers", default=SHAPE["num_hidden_layers"], show_default=True, help="Fewer are not recorded.")
def main(directory: Path, layers: int) -> None:
    """Rehearse a build of Phi-3-mini and write bench/rehearsal.md and .json.

    Example: make bench-rehearsal
    """
    folder = directory.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < FREE * layers / 32:
        raise click.ClickException(f"{folder} has {free / 1e9:.0f} GB free, {FREE / 1e9:.0f} GB are needed.")
    checkpoint, project = folder / "checkpoint", folder / "project"
    if not checkpoint.exists():
        widen(ROOT / paths.source("smol-phi3"), checkpoint, layers=layers)
    shutil.rmtree(project, ignore_errors=True)
    clone_project(project, checkpoint, build=[MODEL], plain=False)
    log = folder / "rehearsal.log"
    costs = measure(WHOLE.split(), step=WHOLE, cwd=project, log=log, PYTHONPATH=str(project))
    whole = costs.pop(WHOLE)
    variants = [*load_params(project / "params.yaml").variants]
    planned = plans(project, checkpoint, costs)
    artifacts = project / "artifacts" / MODEL
    disk = disk_used(project) / 1e9
    needed = sum(disk_used(artifacts / variant) for variant in (*variants, "blobs", "source")) / 1e9
    git = ["git", "-c", "user.name=bench", "-c", "user.email=bench@example.org"]
    subprocess.run([*git, "commit", "-qam", "bench"], cwd=project, check=True)
    results = made_by("openvino", "nncf", "onnxruntime-genai", "onnxruntime", "torch", "dvc") | {
        "layers": layers,
        "steps": {step: cost.figures() for step, cost in ({WHOLE: whole} | costs).items()},
        "planned": planned,
        "metrics": {variant: read_json(artifacts / f"metrics/{variant}.json") for variant in variants},
        "reached": {
            "minutes": round(whole.wall / 60, 1),
            "anonymous_gb": round(max(cost.anonymous for cost in costs.values()) / 1e9, 2),
            "disk_ratio": round(disk / needed, 3),
        },
        "release": release(project, folder, variants),
    }
    text = table(results)
    click.echo(text)
    if layers == SHAPE["num_hidden_layers"]:
        replace_file(RESULTS, json.dumps(results, indent=2))
        replace_file(RESULTS.with_suffix(".md"), text)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

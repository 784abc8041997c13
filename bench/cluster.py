"""Compare builds on local clusters of one, two and four workers with `dvc repro`, and simulate larger clusters.

`make bench-cluster` writes bench/cluster.json and .md. The two models built are `smol-phi3` and one of
Phi-3-mini's shape with fewer layers; the recipes are the tutorials', without calibration.
"""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from bench.full_size import ROOT, add_model, clone_project
from bench.make_checkpoint import SMOL_PHI3, Widening, widen
from bench.measure import WORK, made_by
from pipeline.common.files import replace_file
from pipeline.common.params import load_params
from pipeline.costs import estimate
from pipeline.graph import read_graph

RESULTS = Path(__file__).with_suffix(".json")
SECOND, LAYERS = "phi-3-shaped", 2
TARGETS = ("quantize_openvino", "build_onnx")  # reproducible stages; NPU blobs differ between builds at times
CATALOGUES = ((4, (1, 2, 4, 8)), (42, (1, 8, 32, 128)))  # the number of models, and the numbers of workers
BANDWIDTHS = {"1 Gbit/s": 0.125e9, "10 Gbit/s": 1.25e9}


def make_project(folder: Path) -> Path:
    """Return a git project below `folder` that builds both models, with a DVC remote beside it."""
    project = folder / "project"
    widen(SMOL_PHI3, folder / "checkpoint", layers=LAYERS)
    clone_project(project, plain=True)
    add_model(project, folder / "checkpoint", build=["smol-phi3", SECOND])
    subprocess.run(["dvc", "remote", "add", "-q", "-d", "store", str(folder / "store")], cwd=project, check=True)
    git = ["git", "-c", "user.name=bench", "-c", "user.email=bench@example.org"]
    subprocess.run([*git, "commit", "-qam", "bench"], cwd=project, check=True)
    return project


def measure(project: Path, workers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build in a fresh clone with `workers`, or `dvc repro` if 0; return the figures and the stages of dvc.lock."""
    clone = project.parent / "clone"
    for left in (clone, project.parent / "store"):
        shutil.rmtree(left, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(project), str(clone)], check=True)
    command = ["phi3", "build", "--scheduler", f"local:{workers}", *TARGETS] if workers else ["dvc", "repro", *TARGETS]
    click.echo(" ".join(command))
    started = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(clone)}
    log = project.parent / f"{workers}.log"
    with log.open("w") as stream:
        subprocess.run(command, cwd=clone, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=True)
    output = log.read_text("utf-8")
    figures = {"wall_s": round(time.monotonic() - started), "workers": workers}
    stages = {cell: float(s) for cell, s in re.findall(r"(\S+@\S+): done in ([\d.]+) s", output)}
    tasks = {cell: float(s) for cell, s in re.findall(r"^\[\d+/\d+\] (\S+): built in (\d+) s$", output, re.MULTILINE)}
    figures["stages"] = stages
    if tasks:
        overhead = [tasks[cell] - stages[cell] for cell in tasks]
        figures |= {"cells": len(tasks), "overhead_s": round(sum(overhead) / len(overhead), 1)}
    return figures, YAML(typ="safe").load(clone / "dvc.lock")["stages"]


def simulate(models: int, workers: int, bandwidth: float, overhead: float) -> dict[str, float]:
    """Return the seconds that `workers` take to build `models` models of Phi-3-mini's shape, and the bytes transferred.

    The cells and their order are DVC's, times and sizes those of `phi3 plan`. A free worker takes the ready cell with
    the longest chain of cells after it; it pulls the inputs that it has neither built nor pulled before, and pushes
    what it built. The remote serves one worker at a time with its whole `bandwidth` (bytes per second). `overhead` is
    added to each cell, in seconds.
    """
    params, config = load_params(ROOT / "params.yaml"), Widening(SMOL_PHI3, layers=32).config()
    one = read_graph(params)
    costs = {name: estimate(node.cell, params=params, config=config) for name, node in one.items()}
    way: dict[str, float] = {}  # seconds to the end of the longest chain of cells
    for name in reversed(one):
        way[name] = costs[name].seconds + max((way[after] for after in one if name in one[after].needs), default=0.0)
    waiting = {(model, name) for model in range(models) for name in one}
    done: dict[tuple[int, str], float] = {}
    free, held = [0.0] * workers, [set[tuple[int, str]]() for _ in range(workers)]
    remote = moved = 0.0
    while waiting:
        ready = {
            cell: max((done[cell[0], need] for need in one[cell[1]].needs), default=0.0)
            for cell in sorted(waiting)  # so that every run gives the same figures
            if all((cell[0], need) in done for need in one[cell[1]].needs)
        }
        worker = min(range(workers), key=free.__getitem__)
        now = max(free[worker], min(ready.values()))
        cell = max(
            (cell for cell, since in ready.items() if since <= now),
            key=lambda cell: (way[cell[1]], len(held[worker] & {(cell[0], need) for need in one[cell[1]].needs})),
        )
        inputs = {(cell[0], need) for need in one[cell[1]].needs} - held[worker]
        size = costs[cell[1]].disk + sum(costs[name].disk for _, name in inputs)
        moved += size
        remote = max(remote, now) + size / bandwidth
        done[cell] = free[worker] = remote + overhead + costs[cell[1]].seconds
        held[worker] |= inputs | {cell}
        waiting.remove(cell)
    return {
        "seconds": max(done.values()),
        "moved": moved,
        "chain": max(way.values()),
        "work": models * sum(c.seconds for c in costs.values()),
    }


def simulations(overhead: float) -> list[dict[str, Any]]:
    """Return the results of `simulate` for each of CATALOGUES and BANDWIDTHS."""
    return [
        {"models": models, "workers": workers, "remote": remote} | simulate(models, workers, bandwidth, overhead)
        for models, many in CATALOGUES
        for remote, bandwidth in BANDWIDTHS.items()
        for workers in many
    ]


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["# Clusters", ""]
    lines += [f"Made by `make bench-cluster` on {results['date']}: {results['machine']}; {results['versions']}.", ""]
    models = f"smol-phi3 and a model of Phi-3-mini's shape with {LAYERS} layers"
    lines += [f"## Measured: {models}, `{' '.join(TARGETS)}`", ""]
    lines += ["| | wall time | cells by workers | overhead per cell | dvc.lock |", "| --- | --- | --- | --- | --- |"]
    for row in results["measured"]:
        name = f"`local:{row['workers']}`" if row["workers"] else "`dvc repro`"
        more = (
            f"{row['cells']} | {row['overhead_s']} s | {', '.join(row['differing']) or 'the same'}"
            if row["workers"]
            else "| |"
        )
        lines += [f"| {name} | {row['wall_s']} s | {more} |"]
    lines += ["", "## Simulated: models of Phi-3-mini's shape, six variants each, all stages", ""]
    lines += ["| models | remote | workers | time | speed-up | moved |", "| --- | --- | --- | --- | --- | --- |"]
    for row in results["simulated"]:
        time, speedup = f"{row['seconds'] / 3600:.1f} h", f"{row['work'] / row['seconds']:.1f}"
        moved = f"{row['moved'] / 1e12:.2f} TB"
        figures = [row["models"], row["remote"], row["workers"], time, speedup, moved]
        lines += [f"| {' | '.join(map(str, figures))} |"]
    row = results["simulated"][0]
    chain, work = row["chain"] / 3600, row["work"] / row["models"] / 3600
    lines += ["", f"One model's longest chain is {chain:.1f} h, its work {work:.1f} h."]
    return "\n".join(lines)


@click.command()
def main() -> None:
    """Measure local clusters and simulate larger ones; write bench/cluster.md and .json.

    Example: make bench-cluster
    """
    folder = WORK.absolute() / "cluster"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    project = make_project(folder)
    builds = [measure(project, workers) for workers in (0, 1, 2, 4)]
    serial = builds[0][1]
    measured = [
        figures | {"differing": sorted(cell for cell in serial if lock[cell] != serial[cell])}
        for figures, lock in builds
    ]
    simulated = simulations(measured[1]["overhead_s"])
    results = made_by("distributed", "dvc") | {"measured": measured, "simulated": simulated}
    text = table(results)
    click.echo(text)
    replace_file(RESULTS, json.dumps(results, indent=2))
    replace_file(RESULTS.with_suffix(".md"), text)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

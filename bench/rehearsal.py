"""Run every stage with the default recipes at Phi-3-mini's full size, then publish and pull all variants.

Run it with `make bench-rehearsal`. The checkpoint is `smol-phi3`, widened to Phi-3-mini-4k's shape
(bench/make_checkpoint.py), so its answers are real. What its variants lose is not what those of Phi-3-mini lose.
A run that was interrupted goes on after the last step that it finished.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import click
from platformdirs import user_cache_path

from bench.full_size import MODEL, add_model, clone_project, plans
from bench.make_checkpoint import SHAPE, SMOL_PHI3, widen
from bench.measure import WORK, Cost, disk_used, made_by, measure, require_free
from pipeline.common.checkpoint import read_json
from pipeline.common.files import replace_file
from pipeline.common.params import load_params
from pipeline.graph import read_graph

RESULTS = Path(__file__).with_suffix(".json")
WHOLE = str(SHAPE["num_hidden_layers"])
SMALL = SMOL_PHI3.parent.name
ANSWERING = ("reference", "validate", "report")  # stages that need a model with answers
# How the plan is checked: the planned and the measured figure, the factor by which they may differ, and the difference,
# in seconds or GB, up to which they may always differ.
CHECKED = (("time", "seconds", "wall_s", 1.5, 5.0), ("memory", "memory_gb", "anonymous_gb", 1.15, 0.1))
FREE = 65e9  # bytes of disk that a run needs
GOALS = {"minutes": 90.0, "anonymous_gb": 8.0, "disk_ratio": 1.2}
NAMES = {
    "minutes": "wall time of all stages, minutes",
    "anonymous_gb": "anonymous memory of the largest process, GB",
    "disk_ratio": "disk, relative to artifacts and checkpoint",
}
FIGURES = ("passed", "size_bytes", "kl_mean", "kl_p99", "top1_agreement", "perplexity_ratio")


class Steps:
    """The steps of a rehearsal in `folder`; what each cost is kept in a file there, and none is repeated."""

    def __init__(self, folder: Path, project: Path) -> None:
        self._project, self._log, self._done = project, folder / "log", folder / "steps.json"
        self.costs = {name: Cost(**cost) for name, cost in read_json(self._done).items()} if self._done.exists() else {}
        # This cache has the NPU compiler that was fetched before, and no DirectML in software, which takes hours.
        cache = folder / "cache/phi3-pipeline"
        cache.mkdir(parents=True, exist_ok=True)
        for compiler in user_cache_path("phi3-pipeline").glob("npu-compiler-*/"):
            if not (cache / compiler.name).exists():
                (cache / compiler.name).symlink_to(compiler)
        self._environment = {"PYTHONPATH": str(project), "XDG_CACHE_HOME": str(folder / "cache")}

    def run(self, step: str, *command: str) -> None:
        """Run `command`, unless it is done, and measure it as `step`."""
        if step in self.costs:
            return
        click.echo(step)
        found = measure([*command], step=step, cwd=self._project, log=self._log, **self._environment)
        self.costs[step] = found[step]
        click.echo(f"  {found[step].figures()}")
        replace_file(self._done, json.dumps({name: vars(cost) for name, cost in self.costs.items()}))


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["# Every stage at Phi-3-mini's full size, with the default recipes", ""]
    lines += [f"Made by `make bench-rehearsal` on {results['date']}: {results['machine']}; {results['versions']}.", ""]
    lines += ["The checkpoint is `smol-phi3`, widened to Phi-3-mini-4k's shape. DirectML in software did not run.", ""]
    lines += ["| | reached | goal |", "| --- | --- | --- |"]
    lines += [f"| {NAMES[name]} | {results['reached'][name]:g} | {goal:g} |" for name, goal in GOALS.items()]
    lines += ["", "## Each step, beside what `phi3 plan` said", "", *steps_table(results)]
    lines += ["", "## What the variants lost", "", f"| variant | {' | '.join(FIGURES)} |"]
    lines += ["| --- " * (len(FIGURES) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[f]}' for f in FIGURES)} |" for name, row in results["metrics"].items()]
    for size, smaller in results.get("smaller", {}).items():
        title = size if size == SMALL else f"{size} layers of the same width"
        lines += ["", f"## {title}, on {smaller['date']}", "", *steps_table(smaller)]
    return "\n".join(lines)


def steps_table(results: dict[str, Any]) -> list[str]:
    """Return the lines of a table of what each step took and of what was planned, and what the plan missed."""
    lines = ["| step | wall_s | planned_s | cpu_s | anonymous_gb | planned_gb | written_gb |", "| --- " * 7 + "|"]
    for step, row in results["steps"].items():
        said = results["planned"].get(step, {})
        cells = (row["wall_s"], said.get("seconds", ""), row["cpu_s"], row["anonymous_gb"], said.get("memory_gb", ""))
        lines += [f"| {step} | {' | '.join(str(cell) for cell in (*cells, row['written_gb']))} |"]
    for what, figure, measured, factor, least in CHECKED:
        pairs = {step: (said[figure], results["steps"][step][measured]) for step, said in results["planned"].items()}
        missed = [step for step, two in pairs.items() if max(two) > factor * min(two) and max(two) - min(two) > least]
        lines += [
            "",
            f"The planned {what} is off by more than a factor of {factor} for: {', '.join(missed) or 'none'}.",
        ]
    planned = sum(said["disk_gb"] for said in results["planned"].values())
    used = f"{results['disk_gb']:.2f} GB in use" if "disk_gb" in results else "not measured in that run"
    lines += ["", f"Disk: {planned:.2f} GB planned, {used}."]
    return lines


@click.command()
@click.option(
    "--size",
    type=click.Choice([SMALL, "2", "6", WHOLE]),
    default=WHOLE,
    show_default=True,
    help="The small model, or layers of the widened one; 2 and 6 layers give no answers, so only builds are measured.",
)
def main(size: str) -> None:
    """Rehearse a build of Phi-3-mini and, at its full size, a publication; write bench/rehearsal.md and .json.

    Examples: make bench-rehearsal; python -m bench.rehearsal --size 6
    """
    folder = WORK.absolute() / f"rehearsal-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, project, model = folder / "checkpoint", folder / "project", SMALL if size == SMALL else MODEL
    if model == MODEL and not checkpoint.exists():
        require_free(folder, FREE * int(size) / int(WHOLE))
        widen(SMOL_PHI3, checkpoint, layers=int(size))
    if not project.exists():
        clone_project(project, plain=False)
        if model == MODEL:
            add_model(project, checkpoint, build=[MODEL])
    steps = Steps(folder, project)
    os.chdir(project)
    params = load_params()
    artifacts = project / "artifacts" / model
    cells = {
        " ".join(filter(None, vars(node.cell).values())): name
        for name, node in read_graph(params).items()
        if size in (SMALL, WHOLE) or node.cell.stage not in ANSWERING
    }
    for step, name in cells.items():
        steps.run(step, "dvc", "repro", "--single-item", name)
    planned = plans(project, artifacts / "source", {step: steps.costs[step] for step in cells})
    if size == WHOLE:
        publish(steps, folder, [*params.variants])
    used = disk_used(project)
    found = {
        "date": made_by()["date"],
        "steps": {step: cost.figures() for step, cost in steps.costs.items()},
        "planned": planned,
        "disk_gb": round(used / 1e9, 2),
    }
    results = read_json(RESULTS)
    if size == WHOLE:
        needed = sum(disk_used(artifacts / name) for name in (*params.variants, "blobs", "source"))
        results |= made_by("openvino", "nncf", "onnxruntime-genai", "onnxruntime", "torch", "dvc") | found
        results["metrics"] = {name: read_json(artifacts / f"metrics/{name}.json") for name in params.variants}
        results["reached"] = {
            "minutes": round(sum(steps.costs[step].wall for step in cells) / 60, 1),
            "anonymous_gb": round(max(cost.anonymous for cost in steps.costs.values()) / 1e9, 2),
            "disk_ratio": round(used / needed, 3),
        }
    else:
        results["smaller"] = results.get("smaller", {}) | {size: found}
    click.echo(table(results))
    replace_file(RESULTS, json.dumps(results, indent=2))
    replace_file(RESULTS.with_suffix(".md"), table(results))


def publish(steps: Steps, folder: Path, variants: list[str]) -> None:
    """Publish each of `variants` and pull it again, one after the other, since all would take twice as much disk."""
    registry, pulled = folder / "registry", folder / "pulled"
    for variant in variants:
        name = f"{MODEL}/{variant}"
        steps.run(f"publish {variant}", "phi3", "publish", name, "--to", f"dir:{registry}", "--version", "1.0.0")
        steps.run(f"pull {variant}", "phi3", "pull", f"dir:{registry}", name, "--to", str(pulled))
        for left in (registry, pulled):
            shutil.rmtree(left, ignore_errors=True)


if __name__ == "__main__":
    main()

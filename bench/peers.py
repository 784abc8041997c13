"""Build `smol-phi3` with this project and with other tools, and compare what it costs and what it loses.

Run it with `make bench-peers`. Each tool converts the same checkpoint by the command of its own documentation. The Hub
is switched off, so no recipe gets a data set from it. Every result is measured in the same way: by
pipeline/check/fidelity.py.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from transformers import AutoTokenizer

from bench.fidelity import MODEL, SMOL_PHI3
from bench.full_size import ROOT
from bench.measure import WORK, Cost, made_by, measure
from bench.peer_recipes import TARGETS, Recipe
from pipeline.check.fidelity import compare, read_distributions
from pipeline.check.measurement import load_runtime, load_scorer
from pipeline.check.reference import read_reference
from pipeline.common import paths
from pipeline.common.files import replace_file
from pipeline.common.params import load_params
from pipeline.convert.calibration import Calibration

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path("docs/compare.md")
START, END = "<!-- made by `make bench-peers`: -->\n", "<!-- end -->"
PINS = Path(__file__).with_suffix("")
FOLDER = WORK.absolute() / "peers"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
MESSAGE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception):\s+.+", re.MULTILINE)
ANSWERS = FOLDER / "answers.jsonl"  # this project's calibration answers, as a data set for Olive


def environment(name: str) -> Path:
    """Make the virtual environment of the pins bench/peers/`name`.txt and return its folder; torch comes first."""
    folder, pins = FOLDER / f"venv-{name}", PINS / f"{name}.txt"
    done = folder / "done"
    if not done.exists():
        click.echo(f"installing {name}")
        torch = re.search(r"^torch==.+$", pins.read_text("utf-8"), re.MULTILINE)
        assert torch
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for packages in ([torch[0]], ["--no-deps", "-r", pins]):
            subprocess.run([folder / "bin/pip", "install", "--quiet", *packages], check=True)
        done.touch()
    return folder


def own_stages(project: Path) -> dict[str, Cost]:
    """Build this project's INT4 variants in a clone of it from the checkpoint alone; return what each stage cost."""
    shutil.rmtree(project, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(project)], check=True)
    shutil.copytree(SMOL_PHI3.checkpoint, project / SMOL_PHI3.checkpoint)
    params, costs = load_params(), {}
    cells = [[variant.stage, MODEL, name] for name, variant in params.variants.items()]
    cells.insert(1, ["calibrate", MODEL])  # openvino-fp16 is the first variant, and answers for the calibration
    for cell in cells:
        stage, *arguments = cell
        step = " ".join(cell)
        click.echo(f"this project: {step}")
        command = [sys.executable, "-m", f"stages.{stage}", *arguments]
        log = project.with_suffix(".log")
        costs[step] = measure(command, step=step, cwd=project, log=log, PYTHONPATH=str(project))[step]
    return costs


def own_cost(costs: dict[str, Cost], variant: str) -> Cost:
    """Return what `variant` cost from the checkpoint on: the sum of its stages' times, the largest memory of any."""
    stage = load_params().get_variant(variant).stage
    steps = (f"export_openvino {MODEL} openvino-fp16", f"calibrate {MODEL}", f"{stage} {MODEL} {variant}")
    chosen = [costs[step] for step in steps]
    wall, cpu = (sum(getattr(cost, figure) for cost in chosen) for figure in ("wall", "cpu"))
    return Cost(wall=wall, cpu=cpu, anonymous=max(cost.anonymous for cost in chosen))


def write_config(recipe: Recipe, target: Path) -> Path:
    """Write the configuration with which Olive runs the passes of `recipe`, and return its path."""
    device, provider = recipe.provider
    files = {"data_name": "json", "data_files": str(ANSWERS), "split": "train"}
    text = {"text_cols": "text", "add_special_tokens": False, "max_seq_len": 2048, "max_samples": 128}
    data = {"name": "answers", "type": "HuggingfaceContainer"}
    system = {"type": "LocalSystem", "accelerators": [{"device": device, "execution_providers": [provider]}]}
    config = {
        "input_model": {"type": "HfModel", "model_path": str(SMOL_PHI3.checkpoint.absolute())},
        "systems": {"local_system": system},
        "target": "local_system",
        "data_configs": [data | {"load_dataset_config": files, "pre_process_data_config": text}],
        "passes": recipe.passes,
        "output_dir": str(target),
        "cache_dir": f"{target}-cache",
        "no_artifacts": True,
        "evaluate_input_model": False,
    }
    path = target.with_suffix(".config.json")
    path.write_text(json.dumps(config, indent=2), "utf-8")
    return path


def run_peer(recipe: Recipe, target: Path) -> Cost | str:
    """Run `recipe` into `target`. Returns what it cost, or the tool's own message when it makes no model."""
    folder = environment(recipe.environment) if recipe.environment else Path(sys.prefix)
    values = {"checkpoint": SMOL_PHI3.checkpoint.absolute(), "target": target}
    if recipe.passes:
        values["config"] = write_config(recipe, target)
    command, log = shlex.split(recipe.command.format(**values)), target.with_suffix(".log")
    log.unlink(missing_ok=True)
    variables = OFFLINE | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    try:
        cost = measure(command, step="whole", cwd=FOLDER, log=log, **variables)["whole"]
    except subprocess.CalledProcessError:
        cost = None
    if cost and (any(target.glob("*.onnx")) or any(target.glob("*.xml"))):
        return cost
    return " ".join(MESSAGE.findall(log.read_text("utf-8", "replace"))[-1].split())


def judge(directory: Path, variant: str, loads_in: str | None) -> dict[str, Any]:
    """Return the size of the model in `directory` in MB, its fidelity, and the runtime that loads it and answers.

    It is measured as `variant` is. Without a runtime on this machine, the IR that is inside the model is measured.
    """
    recipe, reference = load_params().get_variant(variant), read_reference(paths.reference(MODEL))
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    for inside in directory.glob("openvino_model_dy.*"):
        (directory / f"openvino_model{inside.suffix}").symlink_to(inside)
    scorer = load_scorer(directory, variant=recipe, context={})
    metrics = compare(scorer, reference.continuations, read_distributions(paths.distributions(MODEL))).metrics()
    del scorer
    if not loads_in:
        runtime = load_runtime(directory, variant=recipe, precision="default")
        answer = reference.answers[0]
        assert runtime.generate(answer.prompt_ids, max_new_tokens=len(answer.ids)).ids
        loads_in = f"{runtime.name}, {runtime.device}"
    return {
        "size_mb": round(size / 1e6, 1),
        "kl_mean": metrics["kl_mean"],
        "top1_agreement": metrics["top1_agreement"],
        "loads_in": loads_in,
    }


def table(results: dict[str, Any]) -> str:
    """Return the figures of all targets as Markdown; a model that was not made has the tool's own message."""
    lines = [f"Made by `make bench-peers` on {results['date']}: {results['machine']}; {results['versions']}."]
    for target, rows in results["targets"].items():
        lines += ["", f"### {target}", ""]
        lines += ["| tool | recipe | wall | CPU | memory | size | mean KL | top-1 |", "| --- " * 8 + "|"]
        for row in rows:
            figures = f"*{row['failed']}* | | | | |" if "failed" in row else ""
            if not figures:
                figures = f"{row['wall_s']:.0f} s | {row['cpu_s']:.0f} s | {row['anonymous_gb']:.2f} GB"
                figures += f" | {row['size_mb']:.0f} MB | {row['kl_mean']:.3f} | {row['top1_agreement']:.1%}"
            lines.append(f"| {row['tool']} | {row['label']} | {figures} |")
    return "\n".join(lines)


def commands(results: dict[str, Any]) -> str:
    """Return the command of each row, where it is documented, and what loads the result, as Markdown."""
    lines = ["", "## Commands", ""]
    for target, rows in results["targets"].items():
        lines += [f"### {target}: commands", ""]
        for row in rows:
            lines.append(f"- {row['tool']}, {row['label']} ({row['source']}): `{row['command']}`")
            if row.get("passes"):
                lines.append(f"  with the passes `{json.dumps(row['passes'])}`")
            if "loads_in" in row:
                lines.append(f"  Loads in: {row['loads_in']}.")
        lines.append("")
    return "\n".join(lines)


def versions() -> str:
    """Return the versions of the tools that have an environment of their own."""
    found = []
    for package, pins in {"olive-ai": "olive", "winml-cli": "winml-cli"}.items():
        pin = re.search(rf"^{package}==(.+)$", (PINS / f"{pins}.txt").read_text("utf-8"), re.MULTILINE)
        assert pin
        found.append(f"{package} {pin[1]}")
    return ", ".join(found)


@click.command()
def main() -> None:
    """Build `smol-phi3` with every tool and write bench/peers.json, bench/peers.md and the tables of the page.

    A run continues where an interrupted one ended.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(SMOL_PHI3.checkpoint)
    answers = Calibration(SMOL_PHI3.calibration, SMOL_PHI3.checkpoint).summary.answers
    ANSWERS.write_text("".join(json.dumps({"text": tokenizer.decode(ids)}) + "\n" for ids in answers), "utf-8")
    state, project = FOLDER / "state.json", FOLDER / "project"
    done: dict[str, Any] = json.loads(state.read_text("utf-8")) if state.exists() else {}
    if "own" not in done:
        done["own"] = {step: vars(cost) for step, cost in own_stages(project).items()}
        replace_file(state, json.dumps(done, indent=2))
    own = {step: Cost(**cost) for step, cost in done["own"].items()}
    targets: dict[str, list[dict[str, Any]]] = {}
    for target, (variants, recipes) in TARGETS.items():
        rows = targets[target] = []
        for variant in variants:
            row = {"tool": "this project", "label": f"`{variant}`", "source": "README.md", "command": "make repro"}
            key = f"{target}: {variant}"
            if key not in done:
                cost = own_cost(own, variant)
                done[key] = row | _costs(cost) | judge(project / paths.variant(MODEL, variant), variant, None)
                replace_file(state, json.dumps(done, indent=2))
            rows.append(done[key])
        for recipe in recipes:
            key = f"{target}: {recipe.tool}: {recipe.label}"
            if key not in done:
                click.echo(key)
                names = {"checkpoint": "CHECKPOINT", "target": "TARGET", "config": "CONFIG"}
                row = {"tool": recipe.tool, "label": recipe.label, "source": recipe.source}
                row["command"] = recipe.command.format(**names)
                directory = FOLDER / "built"
                shutil.rmtree(directory, ignore_errors=True)
                shutil.rmtree(directory.with_name("built-cache"), ignore_errors=True)
                result = run_peer(recipe, directory)
                more: dict[str, Any] = {"passes": recipe.passes} if recipe.passes else {}
                if isinstance(result, Cost):
                    more |= _costs(result) | judge(directory, variants[0], recipe.loads_in)
                else:
                    more["failed"] = result
                done[key] = row | more
                click.echo(done[key])
                replace_file(state, json.dumps(done, indent=2))
            rows.append(done[key])
    made = made_by("openvino", "nncf", "optimum-intel", "onnxruntime-genai", "torch")
    results = made | {"versions": f"{made['versions']}, {versions()}", "targets": targets}
    replace_file(RESULTS, json.dumps(results, indent=2) + "\n")
    replace_file(RESULTS.with_suffix(".md"), f"# {MODEL} by other tools\n\n{table(results)}\n{commands(results)}")
    before, _, rest = PAGE.read_text("utf-8").partition(START)
    replace_file(PAGE, f"{before}{START}\n{table(results)}\n{END}{rest.partition(END)[2]}")
    shutil.rmtree(FOLDER)


def _costs(cost: Cost) -> dict[str, float]:
    figures = cost.figures()
    return {name: figures[name] for name in ("wall_s", "cpu_s", "anonymous_gb")}


if __name__ == "__main__":
    main()

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from transformers import AutoTokenizer

from bench.fidelity import MODEL, SMOL_PHI3
from bench.full_size import ROOT
from bench.measure import WORK, Cost, made_by, measure
from pipeline.check.fidelity import compare, read_distributions
from pipeline.check.measurement import load_runtime, load_scorer
from pipeline.check.reference import read_reference
from pipeline.common import paths
from pipeline.common.manifest import replace_file
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
OPTIMUM = "optimum-cli export openvino --model {checkpoint} --task text-generation-with-past --weight-format int4"
ADJUST = "--group-size-fallback adjust"  # without it a width of 576 is an error
TUTORIAL = f"{OPTIMUM} --group-size 128 --ratio 0.6 --sym {ADJUST}"
CHANNELS = f"{OPTIMUM} --sym --group-size -1 --ratio 1.0"
BUILDER = "python -m onnxruntime_genai.models.builder -i {checkpoint} -o {target} -c {target}-cache -p int4"
OLIVE = "olive run --disable_telemetry --config {config}"
GUIDE = "OpenVINO's guide to NPUs"
COOKBOOK = "Microsoft's PhiCookBook"


@dataclass(frozen=True)
class Recipe:
    """How a tool makes a model: its command, with `{checkpoint}`, `{target}` and for Olive `{config}` to fill in.

    `environment` is the file of pins in bench/peers/, or None for the project's own. `loads_in` names a runtime that is
    not on this machine.
    """

    tool: str
    label: str
    command: str
    source: str
    environment: str | None = None
    passes: dict[str, Any] | None = None
    provider: tuple[str, str] = ("cpu", "CPUExecutionProvider")
    loads_in: str | None = None


def olive(
    label: str, source: str, passes: dict[str, Any], provider: tuple[str, str], loads_in: str | None = None
) -> Recipe:
    """Return a recipe of Olive with these passes."""
    return Recipe("Olive", label, OLIVE, source, "olive", passes, provider, loads_in)


def openvino_passes(device: str, **options: Any) -> dict[str, Any]:
    """Return the three passes by which Olive makes an IR for `device`, wrapped in an ONNX model."""
    return {
        "convert": {
            "type": "OpenVINOOptimumConversion",
            "extra_args": {"device": device, "task": "text-generation-with-past"},
            "ov_quant_config": {"weight_format": "int4", "ratio": 1} | options,
        },
        "update": {"type": "OpenVINOIoUpdate", "static": False, "reuse_cache": True},
        "wrap": {
            "type": "OpenVINOEncapsulation",
            "target_device": device,
            "keep_ov_dynamic_dims": True,
            "ov_version": "2025.1",
            "reuse_cache": True,
        },
    }


BUILD = {"type": "ModelBuilder", "precision": "int4"}
MIXED = {
    "choose": {"type": "SelectiveMixedPrecision", "algorithm": "k_quant_down"},
    "quantize": {"type": "Gptq", "bits": 4, "sym": False, "group_size": 32, "lm_head": True, "data_config": "answers"},
    "build": BUILD,
}
WRAPPED = "ONNX Runtime GenAI with the OpenVINO provider, which is not on this machine; the IR inside was measured"
# For each target this project's variants, and what other tools make for it.
TARGETS: dict[str, tuple[list[str], list[Recipe]]] = {
    "OpenVINO IR for CPU and GPU": (
        ["openvino-int4"],
        [
            Recipe("optimum-cli", "its defaults for INT4", f"{OPTIMUM} {{target}}", "optimum-intel's documentation"),
            Recipe(
                "optimum-cli",
                "group 128, ratio 0.6, symmetric",
                f"{TUTORIAL} {{target}}",
                COOKBOOK,
            ),
            Recipe(
                "optimum-cli",
                "the same, AWQ without data",
                f"{TUTORIAL} --awq {{target}}",
                "its --help",
            ),
            Recipe(
                "optimum-cli",
                "the same, AWQ and scale estimation on the model's own texts",
                f"{TUTORIAL} --awq --scale-estimation --dataset auto {{target}}",
                "its --help",
            ),
            olive(
                "group 64, ratio 1, asymmetric",
                "olive-recipes, microsoft-Phi-3-mini-4k-instruct/aitk/phi3_ov_config.json",
                openvino_passes("gpu", group_size=64),
                ("gpu", "OpenVINOExecutionProvider"),
                WRAPPED,
            ),
        ],
    ),
    "OpenVINO IR for NPUs": (
        ["npu-int4-channelwise", "npu-int4-group128"],
        [
            Recipe("optimum-cli", "channel-wise", f"{CHANNELS} {{target}}", GUIDE),
            Recipe(
                "optimum-cli",
                "channel-wise, AWQ and scale estimation on wikitext2",
                f"{CHANNELS} --awq --scale-estimation --dataset wikitext2 {{target}}",
                GUIDE,
                "olive",  # which has the same optimum-intel, and `datasets`
            ),
            Recipe(
                "optimum-cli",
                "channel-wise, AWQ and scale estimation on the model's own texts",
                f"{CHANNELS} --awq --scale-estimation --dataset auto {{target}}",
                "its --help",
            ),
            Recipe(
                "optimum-cli",
                "group 128",
                f"{OPTIMUM} --sym --group-size 128 --ratio 1.0 {ADJUST} {{target}}",
                GUIDE,
            ),
            olive(
                "group 128 on wikitext2",
                "olive-recipes, microsoft-Phi-3-mini-4k-instruct/aitk/phi3_ov_npu_config.json",
                openvino_passes(
                    "npu",
                    group_size=128,
                    dataset="wikitext2",
                    awq=False,
                    scale_estimation=False,
                    sym=True,
                    trust_remote_code=True,
                    backup_precision="int8_asym",
                    sensitivity_metric="weight_quantization_error",
                ),
                ("npu", "OpenVINOExecutionProvider"),
                WRAPPED,
            ),
        ],
    ),
    "ONNX Runtime on the CPU": (
        ["onnx-cpu-int4"],
        [
            Recipe("onnxruntime-genai's builder", "its defaults", f"{BUILDER} -e cpu", "its README"),
            Recipe(
                "onnxruntime-genai's builder",
                "k_quant_mixed",
                f"{BUILDER} -e cpu --extra_options algo_config=k_quant_mixed",
                "its --help",
            ),
            Recipe(
                "Olive",
                "GPTQ on wikitext2",
                "olive optimize --disable_telemetry --model_name_or_path {checkpoint} --device cpu"
                " --provider CPUExecutionProvider --precision int4 --output_path {target}",
                "Olive's page on `olive optimize`",
                "olive",
            ),
            olive(
                "k_quant_down and GPTQ, on this project's calibration answers in place of wikitext2",
                "olive-recipes, microsoft-Phi-3.5-mini-instruct/olive/mixed.json",
                MIXED,
                ("cpu", "CPUExecutionProvider"),
            ),
            Recipe(
                "winml-cli",
                "for onnxruntime-genai",
                "winml build -m {checkpoint} -o {target} --export-type optimized",
                "winml-cli's page on `winml build`",
                "winml-cli",
            ),
        ],
    ),
    "ONNX Runtime with DirectML": (
        ["onnx-directml-int4"],
        [
            Recipe("onnxruntime-genai's builder", "its defaults", f"{BUILDER} -e dml", "its README"),
            olive(
                "model builder",
                "olive-recipes, microsoft-Phi-3.5-mini-instruct/aitk/phi3_5_dml_config.json",
                {"build": BUILD},
                ("gpu", "DmlExecutionProvider"),
            ),
        ],
    ),
}


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

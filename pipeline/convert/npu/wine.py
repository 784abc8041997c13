"""The vendor's NPU compiler for Windows, run under Wine on Linux x86-64.

The openvino wheel for Windows includes the compiler, the wheel for Linux does not. A small driver program, built from
driver.c with Zig, calls it through OpenVINO's C API. Everything that is fetched and built stays in the user's cache
directory, with a Wine prefix of its own.
"""

import os
import platform
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from pipeline.common.errors import PipelineError
from pipeline.common.programs import stream_lines
from pipeline.common.progress import say
from pipeline.common.wheel import fetch_wheel
from pipeline.common.zig import ZIG, build_program

OPENVINO = "2026.4.1"
WHEELS = {
    "openvino": (OPENVINO, "bfddae6d6d3ad240157b946f180c33d0ddfaaae7487995d929a4e6b4bc12b283", "win_amd64"),
    "ziglang": ZIG,
}
SOURCE = Path(__file__).with_name("driver.c")
# The functions that the driver takes from Windows' own C runtime.
IMPORTS = ("__acrt_iob_func", "__p___argc", "__p___argv", "_configure_narrow_argv", "exit", "fflush", "fputs", "puts")
INSTALL = "sudo apt-get install --no-install-recommends wine64"


def find_wine() -> Path | None:
    """Return the path of Wine's loader, which Debian and Ubuntu keep outside PATH; None when Wine is not installed."""
    for name in ("wine64", "/usr/lib/wine/wine64", "wine"):
        if path := shutil.which(name):
            return Path(path)
    return None


def unavailable() -> str | None:
    """Return why this compiler cannot work here and what to do, or None when it can."""
    import openvino

    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64":
        return f"the NPU compiler runs on Windows, and under Wine on Linux x86-64, not on {machine}: compile there"
    if not openvino.__version__.startswith(OPENVINO):
        return f"the pinned compiler is of openvino {OPENVINO}, installed is {openvino.__version__}: install {OPENVINO}"
    return None if find_wine() else f"there is no Wine: {INSTALL}"


def install() -> None:
    """Fetch the compiler and build the driver, unless both are in the cache; raise PipelineError when that fails."""
    tools = _tools()
    with _lock():
        if (tools / "driver.exe").exists() and (tools / SOURCE.name).read_bytes() == SOURCE.read_bytes():
            return
        say(f"fetching the NPU compiler of openvino {OPENVINO} for Windows, and Zig (190 MB, once)")
        shutil.rmtree(tools, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".npu-compiler-", dir=tools.parent) as directory:
            build = Path(directory)
            for package, (version, sha256, tag) in WHEELS.items():
                wheel = fetch_wheel(package, version, sha256, directory=build, platform=tag)
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(build)
                wheel.unlink()
            say("building the driver")
            libs = build / "openvino/libs"
            build_program(
                SOURCE,
                build / "driver.exe",
                zig=build / "ziglang/zig",
                imports={"ucrtbase": IMPORTS},
                include=(build / "openvino/include",),
                libraries=(libs / "openvino_c.lib",),
            )
            (build / "driver.exe").rename(libs / "driver.exe")
            shutil.copyfile(SOURCE, libs / SOURCE.name)
            libs.rename(tools)


def compile_blob(ir: Path, target: Path, *, properties: dict[str, str]) -> None:
    """Compile the IR file `ir` for the NPU with OpenVINO's `properties` and write the blob to the file `target`.

    Each user can have one compilation at a time; a second one waits. Raises RuntimeError with the compiler's output
    when it fails.
    """
    output = []
    arguments = [_windows(ir), _windows(target), "NPU", *(text for pair in properties.items() for text in pair)]
    with _lock(), _wine(_tools() / "prefix") as (wine, environment):
        try:
            for line in stream_lines([str(wine), str(_tools() / "driver.exe"), *arguments], env=environment):
                output.append(line)
        except PipelineError as error:
            raise RuntimeError("".join(output)) from error


def _tools() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("phi3-pipeline", ensure_exists=True) / f"npu-compiler-{OPENVINO}"


def _lock() -> FileLock:
    return FileLock(_tools().with_suffix(".lock"))


@contextmanager
def _wine(prefix: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    wine = find_wine()
    assert wine is not None
    environment = os.environ | {"WINEPREFIX": str(prefix), "WINEDEBUG": "-all", "WINEDLLOVERRIDES": "mscoree,mshtml="}
    try:
        yield wine, environment
    finally:
        # Wine's server and services would outlive the program by some seconds.
        server = shutil.which("wineserver", path=f"{wine.resolve().parent}{os.pathsep}{os.environ['PATH']}")
        if server:
            subprocess.run([server, "-k"], env=environment, check=False, capture_output=True)


def _windows(path: Path) -> str:
    return "Z:" + str(path.absolute()).replace("/", "\\")

"""DirectML in software on Linux: Wine runs ONNX Runtime and turns Direct3D 12 into Vulkan, which Mesa runs on the CPU.

Wine and Mesa come from Debian 13 in a chroot, since those of many systems are too old. The chroot stays in the user's
cache directory; it also holds the DLLs from PyPI, a driver program built from driver.c, and Xvfb, the display that Wine
needs.
"""

import os
import platform
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from pipeline.common.errors import PipelineError
from pipeline.common.programs import stream_lines
from pipeline.common.progress import say
from pipeline.common.wheel import fetch_wheel
from pipeline.common.zig import ZIG, build_program
from pipeline.convert.variant import WINDOWSML

SUITE, PACKAGES = "trixie", ("wine64", "mesa-vulkan-drivers", "xvfb")
WHEELS = {
    "onnxruntime-windowsml": (
        WINDOWSML,
        "be0a35e93d79f0ef4885ebde5d984cc6768465f0fd7784ac326cdb71c2c767e7",
        "win_amd64",
    ),
    "onnxruntime-genai-directml": (
        "0.14.1",
        "c779d0a63e5d38a76aeeae3b0a3c01dd7d6c5192e19e4652ef9d75c63267c10c",
        "win_amd64",
    ),
    "ziglang": ZIG,
}
DLLS = (
    "onnxruntime/capi/onnxruntime.dll",
    "onnxruntime/capi/DirectML.dll",
    "onnxruntime_genai/onnxruntime-genai.dll",
)
SOURCE, ENTER = (Path(__file__).with_name(name) for name in ("driver.c", "enter.sh"))
# The functions that the driver takes from Windows' own libraries.
IMPORTS = {
    "ucrtbase": (
        *("__acrt_iob_func", "__p___argc", "__p___argv", "_configure_narrow_argv", "exit", "fflush", "fopen", "fputs"),
        *("fread", "fwrite", "malloc", "puts", "strcmp"),
    ),
    "kernel32": ("GetProcAddress", "LoadLibraryA", "VirtualProtect"),
    "user32": ("wsprintfA",),
}
NEW_NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child")


def unavailable() -> str | None:
    """Return why DirectML cannot run here and what to do, or None when `install` was done."""
    if reason := _unsupported():
        return reason
    return None if _is_current(_home()) else "DirectML is not set up here: run `make directml`"


def install() -> None:
    """Set everything up in the user's cache, unless it is there already.

    Raises PipelineError with what is missing here, or with the last lines of what failed.
    """
    if reason := _unsupported():
        raise PipelineError(f"{reason}.")
    if not shutil.which("debootstrap"):
        raise PipelineError("there is no debootstrap: apt-get install debootstrap debian-archive-keyring.")
    home = _home()
    with _lock():
        if _is_current(home):
            return
        build = home.with_name(f".{home.name}.partial")
        for old in (build, home):
            shutil.rmtree(old, ignore_errors=True)
        build.mkdir()
        root, program = build / "root", build / "root/opt/directml"
        say("setting up Debian 13 with Wine and a Vulkan driver in software (1.8 GB, once)")
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root), _mirror()]
        for _ in stream_lines([*NEW_NAMESPACES, *command]):
            pass
        say("fetching ONNX Runtime, DirectML and onnxruntime-genai for Windows, and Zig (140 MB, once)")
        for package, (version, sha256, tag) in WHEELS.items():
            wheel = fetch_wheel(package, version, sha256, directory=build, platform=tag)
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(build)
            wheel.unlink()
        program.mkdir()
        for dll in DLLS:
            (build / dll).rename(program / Path(dll).name)
        build_program(SOURCE, build / "driver.exe", zig=build / "ziglang/zig", imports=IMPORTS)
        (build / "driver.exe").rename(program / "driver.exe")
        for _ in _enter(root, "wineboot", "--init", work=build):
            pass
        for path in build.iterdir():
            if path != root:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copyfile(SOURCE, build / SOURCE.name)
        build.rename(home)


def run(model: Path, *, work: Path) -> Iterator[str]:
    """Yield what the driver prints for the model in the directory `model` and the prompts in `work`/prompts.

    Each user can have one run at a time; a second run waits.

    Raises PipelineError with the driver's last lines when it fails.
    """
    with _lock():
        program = ("driver.exe", *(rf"Z:\mnt\{path}" for path in ("model", r"work\prompts", r"work\logits")))
        yield from _enter(_home() / "root", *program, model=model, work=work)


def _enter(root: Path, *program: str, work: Path, model: Path | None = None) -> Iterator[str]:
    paths = [str(path.absolute()) for path in (root, model or work, work)]
    return stream_lines([*NEW_NAMESPACES, "sh", str(ENTER), *paths, *program])


def _unsupported() -> str | None:
    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64":
        return f"DirectML is run in software on Linux x86-64, not on {machine}"
    if os.geteuid() != 0:
        return "DirectML in software needs a chroot, which only root can enter"
    return None


def _is_current(home: Path) -> bool:
    return (home / SOURCE.name).exists() and (home / SOURCE.name).read_bytes() == SOURCE.read_bytes()


def _mirror() -> str:
    # Return the mirror from which apt gets Debian's packages; mirrors of other systems have no Debian 13.
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Identifier: Packages", "Label: Debian"]
    found = subprocess.run(command, check=False, capture_output=True, text=True).stdout.split()
    if not found:
        raise PipelineError("apt has no source of Debian's packages: add one, and run apt-get update.")
    return found[0]


def _home() -> Path:
    import platformdirs

    version = WINDOWSML.rsplit(".", 1)[0]
    return platformdirs.user_cache_path("phi3-pipeline", ensure_exists=True) / f"directml-{version}"


def _lock() -> FileLock:
    return FileLock(_home().with_name(f"{_home().name}.lock"))

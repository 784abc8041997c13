"""Small programs for Windows, built from C with Zig and without a C runtime of their own."""

import os
from pathlib import Path

from pipeline.common.programs import stream_lines

# The package ziglang: version, SHA-256, and platform tag, which is empty because the wheel is for this machine.
ZIG = ("0.17.1", "ea6cc5d87b033cf0aedfbc8f9549a908cae6c50ac31f1698188fa48a74524b54", "")


def build_program(
    source: Path,
    target: Path,
    *,
    zig: Path,
    imports: dict[str, tuple[str, ...]],
    include: tuple[Path, ...] = (),
    libraries: tuple[Path, ...] = (),
) -> None:
    """Build the x86-64 program `target` from `source`, whose entry point is `start`, with the Zig compiler `zig`.

    `imports` lists the functions that the program takes from each DLL; to build MinGW's runtime instead would take Zig
    two minutes. Intermediate files are left beside `target`.

    Raises PipelineError with the compiler's last lines when that fails.
    """
    build = target.parent
    zig.chmod(0o755)
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(build / "zig-cache")}
    cc = "cc -target x86_64-windows-gnu"
    commands = []
    for dll, functions in imports.items():
        (build / f"{dll}.def").write_text("\n".join([f"LIBRARY {dll}.dll", "EXPORTS", *functions, ""]))
        commands.append(["dlltool", "-m", "i386:x86-64", "-d", f"{dll}.def", "-l", f"{dll}.lib"])
    compile_ = f"{cc} -O1 -fno-sanitize=all -fno-builtin -c -o program.obj".split()
    commands.append([*compile_, *(f"-I{path}" for path in include), str(source)])
    link = [*f"{cc} -s -nostdlib -Wl,-e,start -o {target.name} program.obj".split(), *(f"{dll}.lib" for dll in imports)]
    commands.append([*link, *map(str, libraries)])
    for command in commands:
        for _ in stream_lines([str(zig), *command], env=environment, cwd=build):
            pass

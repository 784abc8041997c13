"""Write a file or a directory so that it is whole or not there at all, and compare files by their hashes."""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, Field

from pipeline.common.paths import MANIFEST

WAITS = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds before each further attempt to rename a directory
# Files that Finder and Explorer leave in folders that somebody looks at. They belong to no artifact.
STRAY = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini")


class File(BaseModel, extra="forbid", frozen=True):
    """One file of an artifact: size in bytes and SHA-256 in hexadecimal."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


@contextmanager
def building(target: Path, *, resume: bool = False, last: str = MANIFEST) -> Iterator[Path]:
    """Yield a hidden sibling of `target` to build in; it becomes `target` when the block ends.

    `last` is the file without which the directory counts as unfinished: the manifest, which `seal` writes.

    Files that an earlier, killed build left there are removed, unless `resume` is true. After an error the sibling is
    removed, unless `resume` is true.
    """
    build = target.with_name(f".{target.name}.partial")
    if not resume:
        shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True, exist_ok=True)
    try:
        yield build
        if not (build / last).exists():
            raise AssertionError(f"{target} was built without {last}")
        if target.exists():
            (target / last).unlink(missing_ok=True)
            shutil.rmtree(target)
        rename(build, target)
        flush(target.parent)
    except BaseException:
        if not resume:
            shutil.rmtree(build, ignore_errors=True)
        raise


def rename(directory: Path, target: Path) -> None:
    """Rename `directory` to `target`, in some seconds if not at once.

    Windows refuses while a program, such as a virus scanner, has a file in the directory open. Raises PermissionError
    when it still refuses in the end.
    """
    for wait in WAITS:
        with suppress(PermissionError):
            directory.rename(target)
            return
        time.sleep(wait)
    directory.rename(target)


def replace_file(path: Path, text: str) -> None:
    """Write `text` and a newline to `path` so that a reader sees the old or the new content, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text + "\n", "utf-8", newline="\n")
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def compare_files(directory: Path, files: dict[str, File], *, besides: set[str]) -> list[str]:
    """Return a sentence for each difference between `directory` and `files`, sorted; the paths `besides` are ignored.

    Every file is hashed. A link or a device in the place of a file counts as a change, a directory as a missing file.
    What Finder and Explorer leave is ignored, so a file of `files` with such a name counts as missing.
    """
    present = set(list_files(directory)) - besides
    faults = [f"{path} is missing" for path in files.keys() - present]
    faults += [f"{path} is not listed" for path in present - files.keys()]
    faults += [
        f"{path} has changed"
        for path in present & files.keys()
        if not is_regular(directory / path)
        or (directory / path).stat().st_size != files[path].size
        or digest(directory / path) != files[path]
    ]
    return sorted(faults)


def is_regular(path: Path) -> bool:
    """Return whether `path` is a regular file, not a link to one and not a device."""
    return path.is_file() and not path.is_symlink()


def digest(path: Path) -> File:
    """Return size and SHA-256 of the file `path`."""
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(size=path.stat().st_size, sha256=sha256)


def list_files(directory: Path) -> list[str]:
    """Return the paths of all files below `directory`, relative to it and with '/', sorted; see STRAY."""
    found = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(directory).as_posix() for path in found if not STRAY.fullmatch(path.name))


def flush(path: Path) -> None:
    """Wait until the disk has the content of the file `path`, or the names in the directory `path`."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a directory to flush its entries
    # Windows flushes only what is open for writing. Without O_BINARY it would cut a last byte 0x1A off the file.
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0) if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

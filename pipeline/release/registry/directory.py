"""A registry in a directory, also on a network share.

```
blobs/sha256/<first two digits>/<sha256>                  contents, each stored once
releases/<model>/<variant>/<version>/release.json         and release.sig; the version exists once this file does
releases/<model>/<variant>/aliases/<alias>                the version that it points to
```
"""

import io
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.common.errors import PipelineError
from pipeline.common.files import File, digest, is_regular, rename
from pipeline.release.registry.interface import Entry
from pipeline.release.release import MAX_RELEASE, NAME, RELEASE, SIGNATURE, VERSION, Release

CHUNK = 1 << 20
UNFINISHED = ".put-"  # how the name of a file begins that is being written
ABANDONED = 24 * 3600  # seconds without a write, after which nobody writes it any more


class DirectoryRegistry:
    """The registry below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self.url = f"dir:{self._root}"

    def entries(self) -> list[Entry]:
        found = []
        with self._reading():
            for path in self._releases().glob(f"*/*/*/{RELEASE}"):
                model, variant, version = path.parts[-4:-1]
                if not re.fullmatch(VERSION, version):  # such as a copy that somebody made by hand
                    continue
                aliases = [alias for alias in self._aliases(f"{model}/{variant}") if alias[1] == version]
                found.append(Entry(f"{model}/{variant}", version, sorted(alias for alias, _ in aliases)))
        return sorted(found, key=lambda entry: entry.order)

    def resolve(self, name: str, version: str) -> str | None:
        with self._reading():
            if re.fullmatch(VERSION, version):
                return version if (self._versions(name) / version / RELEASE).exists() else None
            return dict(self._aliases(name)).get(version)

    def read(self, name: str, version: str) -> tuple[bytes, bytes | None] | None:
        with self._reading():
            directory = self._versions(name) / version
            content = _small(directory / RELEASE)
            return None if content is None else (content, _small(directory / SIGNATURE))

    def prepare(self, name: str) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        # Remove what killed publishers left. The file of a live one grows all the time.
        for left in self._root.glob(f"blobs/sha256/*/{UNFINISHED}*"):
            with suppress(OSError):  # it has just been published, or is another user's
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()

    def has(self, name: str, file: File) -> bool:
        content = self._content(file)
        return content.is_file() and digest(content) == file

    def upload(self, name: str, path: str, local: Path, file: File) -> None:
        with local.open("rb") as content:
            _put(self._content(file), content)

    def publish(self, release: Release, signature: bytes | None) -> None:
        versions, version = self._versions(release.name), release.version
        versions.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".publish-", dir=versions, ignore_cleanup_errors=True) as directory:
            build = Path(directory) / version
            build.mkdir()
            (build / RELEASE).write_bytes(release.content())
            if signature is not None:
                (build / SIGNATURE).write_bytes(signature)
            try:
                rename(build, versions / version)  # fails if the version exists, since it is not empty
            except OSError as error:
                if (versions / version).exists():
                    raise FileExistsError(version) from error
                raise

    def point(self, name: str, alias: str, version: str) -> None:
        _put(self._versions(name) / "aliases" / alias, io.BytesIO(version.encode()))

    def download(self, release: Release, path: str, *, offset: int) -> Iterator[bytes]:
        content = self._content(release.files[path])
        with self._reading():
            if not is_regular(content):
                raise PipelineError(f"{self.url}: {path} is missing, or no plain file: nothing was installed.")
            with content.open("rb") as stream:
                stream.seek(offset)
                while chunk := stream.read(CHUNK):
                    yield chunk

    def address(self, release: Release, path: str = "") -> str:
        return (self._content(release.files[path]) if path else self._versions(release.name) / release.version).as_uri()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        # A share that was disconnected causes errors of many kinds, after which a pull takes what it has.
        try:
            yield
        except OSError as error:
            raise PipelineError(
                f"{self.url} cannot be read ({error.strerror}): check its disk, or the connection to its share."
            ) from error

    def _releases(self) -> Path:
        # A directory that is not there is no empty registry: the path may be misspelt, or the share not mounted.
        if not self._root.is_dir():
            raise PipelineError(f"{self.url} is not there: is the share mounted?")
        return self._root / "releases"

    def _versions(self, name: str) -> Path:
        return self._releases() / name

    def _content(self, file: File) -> Path:
        return self._root / "blobs" / "sha256" / file.sha256[:2] / file.sha256

    def _aliases(self, name: str) -> list[tuple[str, str]]:
        files = [path for path in self._versions(name).glob("aliases/*") if re.fullmatch(NAME, path.name)]
        return [(path.name, (_small(path) or b"").decode("utf-8", "replace").strip()) for path in files]


def _small(path: Path) -> bytes | None:
    # Return the content of a small file, or None when it is no regular file. Of a large file it returns the beginning,
    # which is still too long to be valid.
    if not is_regular(path):
        return None
    with path.open("rb") as stream:
        return stream.read(MAX_RELEASE + 1)


def _put(path: Path, content: BinaryIO) -> None:
    # Write `content` to `path` in one step, even when others do the same at the same time.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            shutil.copyfileobj(content, stream, CHUNK)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

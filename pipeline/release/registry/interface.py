"""The interface that every kind of registry implements."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pipeline.common.errors import PipelineError
from pipeline.common.files import File
from pipeline.release.release import Release, read_release


@dataclass(frozen=True)
class Entry:
    """A published version of `name` (`<model>/<variant>`) and the aliases that point to it."""

    name: str
    version: str
    aliases: list[str] = field(default_factory=list)

    @property
    def order(self) -> tuple[str, list[int]]:
        """The key for sorting entries: the name, then the version by its numbers."""
        return self.name, [int(part) for part in self.version.split(".")]


class Registry(Protocol):
    """What publishing and pulling need of a registry. Nothing that it returns is trusted.

    Every method raises PipelineError when the registry fails or cannot be reached.
    """

    url: str

    def entries(self) -> list[Entry]:
        """Return every published version, sorted by name and version."""

    def resolve(self, name: str, version: str) -> str | None:
        """Return `version` of `name`, or the version that it is an alias of; None when there is none."""

    def read(self, name: str, version: str) -> tuple[bytes, bytes | None] | None:
        """Return release.json and its signature, if it has one, of a version; None when it is not published."""

    def prepare(self, name: str) -> None:
        """Make the registry if it is not there. A publication calls this before any other method.

        Raises PipelineError when the registry is reserved for another artifact than `name`.
        """

    def has(self, name: str, file: File) -> bool:
        """Return whether the complete content of `file` is there already, from this or another version of `name`."""

    def upload(self, name: str, path: str, local: Path, file: File) -> None:
        """Store the content of the file `local` as `path` of a release; readers see it once that is published."""

    def publish(self, release: Release, signature: bytes | None) -> None:
        """Make an uploaded release visible in one step; raise FileExistsError when its version exists."""

    def point(self, name: str, alias: str, version: str) -> None:
        """Let `alias` stand for `version` of `name`."""

    def download(self, release: Release, path: str, *, offset: int) -> Iterator[bytes]:
        """Yield the content of the file `path` of a release from byte `offset` on."""

    def address(self, release: Release, path: str = "") -> str:
        """Return the URI of the file `path` of a release, or without `path` of the release, for other programs.

        Raises PipelineError when no program can get a file from a URI alone.
        """


def require_own(release: bytes | None, name: str, *, url: str) -> None:
    """Raise PipelineError when `release`, the release.json in a registry for one artifact, is not of `name`."""
    if release is not None and (other := read_release(release, origin=url).name) != name:
        raise PipelineError(f"{url} is the registry of {other}: give {name} a repository of its own.")

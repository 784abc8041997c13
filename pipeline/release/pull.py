"""Pull a published artifact and check each file's hash before it gets its final name. Imports no ML library."""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from pipeline.common.errors import PipelineError
from pipeline.common.files import building, compare_files, digest, is_regular, replace_file
from pipeline.common.manifest import Manifest, verify
from pipeline.release.device import Target, choose_release
from pipeline.release.registry.interface import Registry
from pipeline.release.release import RELEASE, SIGNATURE, VERSION, Release, read_release, split_name
from pipeline.release.signing import require_signature

logger = logging.getLogger(__name__)
CACHE_VARIABLE = "PHI3_CACHE"
Progress = Callable[[int, int, str], None]  # bytes so far, bytes in all, file


def cache() -> Path:
    """Return the directory of the cache: PHI3_CACHE, or the system's cache directory for this user."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_path("phi3-pipeline", appauthor=False))


def pull(
    registry: Registry,
    name: str,
    *,
    version: str = "latest",
    to: Path | None = None,
    key: Path | None = None,
    progress: Progress = lambda done, total, file: None,
) -> Path:
    """Return the directory of the release `version` (or an alias of one) of `name`, complete and verified.

    Without `to` the directory is in the cache, and is installed again when its files have changed. The cache stores
    contents by their hash, so none is fetched twice, and files with the same content share disk space where the file
    system has hard links. When the registry cannot be reached to resolve an alias, it stands for the same version as
    last time.

    If `key`, a file with a public key, is given, only a release that the owner of the key signed is accepted.

    Raises PipelineError, and installs nothing, when anything is missing or differs from release.json.
    """
    split_name(name)
    asked = version
    if not re.fullmatch(VERSION, version):
        version = _resolve(registry, name, version)
    target = to or _home(registry, name) / version
    if _is_installed(target, name, version, key=key, cached=not to):  # a version never changes: no registry is needed
        return target
    if not target.name:
        raise PipelineError(f"'{target}' cannot be replaced: give the path of a directory to make.")
    content = registry.read(name, version)
    if content is None:
        raise _unknown(registry, name, asked)
    release = read_release(content[0], origin=registry.url)
    if (release.name, release.version) != (name, version):
        raise PipelineError(
            f"{registry.url} has {release.name} {release.version}, not {name} {version}: it is refused."
        )
    if key:
        require_signature(content[0], content[1], key, origin=f"{registry.url}: {name} {version}")
    # Beside `target` the lock would stay, and in some folders, such as C:\, Windows lets users make no file.
    lock = cache() / "locks" / hashlib.sha256(os.fsencode(target.absolute())).hexdigest()[:16]
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if _is_installed(target, name, version, key=key, cached=not to):  # another process was faster
            return target
        if to and to.exists() and any(to.iterdir()):
            raise PipelineError(f"{target} is not empty: give another directory.")
        _install(registry, release, content, target, progress=progress)
    return target


def suggest(registry: Registry, model: str, *, version: str, target: Target, say: Callable[[str], None]) -> str:
    """Return the name of the release of `model` in `registry` that suits `target`, and say why.

    Without `model` the registry must hold only one model. Raises PipelineError when the choice is not clear.
    """
    releases = releases_of(registry, f"{model}/" if model else "", version=version)
    if len(models := sorted({release.model for release in releases})) > 1:
        raise PipelineError(f"{registry.url} has {', '.join(models)}: name the one you want.")
    if not releases:
        raise PipelineError(f"{registry.url} has no {model or 'release'} {version}: see `phi3 list {registry.url}`.")
    release, reason = choose_release(releases, target)
    say(f"{release.name}: {reason}")
    return release.name


def releases_of(registry: Registry, prefix: str, *, version: str) -> list[Release]:
    """Return the releases whose name begins with `prefix`, each in `version` (or an alias of one), sorted by name."""
    releases = []
    for name in sorted({entry.name for entry in registry.entries() if entry.name.startswith(prefix)}):
        resolved = registry.resolve(name, version)
        content = registry.read(name, resolved) if resolved else None
        if content is not None:
            releases.append(read_release(content[0], origin=registry.url))
    return releases


def read_file(registry: Registry, release: Release, path: str) -> bytes:
    """Return the content of a small file of `release`, which is hashed; it stays in the cache.

    Raises PipelineError when the registry has other bytes than release.json says.
    """
    return _fetch(registry, release, path, progress=lambda size: None).read_bytes()


def verify_any(directory: Path, *, key: Path | None = None) -> Release | Manifest:
    """Return the release of the pulled, or the manifest of the built artifact in `directory`, after hashing every file.

    `verify_release` verifies a pulled artifact, `pipeline.common.manifest.verify` a built one. With `key` it is always
    `verify_release`, since only pulled artifacts can be signed.

    Raises PipelineError when either does.
    """
    return verify_release(directory, key=key) if key or (directory / RELEASE).exists() else verify(directory)


def verify_release(directory: Path, *, key: Path | None = None) -> Release:
    """Return the release in `directory` after hashing every file and, given a public key, verifying the signature.

    Raises PipelineError that lists all files which are missing, changed or not listed in the release.
    """
    path = directory / RELEASE
    if not path.is_file():
        raise PipelineError(f"{path} is missing: {directory} was not pulled from a registry.")
    release = read_release(path.read_bytes(), origin=str(directory))
    if key:
        signature = directory / SIGNATURE
        signed = signature.read_bytes() if is_regular(signature) else None
        require_signature(path.read_bytes(), signed, key, origin=str(directory))
    if faults := compare_files(directory, release.files, besides={RELEASE, SIGNATURE}):
        raise PipelineError(f"{directory}: {'; '.join(faults)}. Remove it and pull it again.")
    return release


def _install(
    registry: Registry, release: Release, content: tuple[bytes, bytes | None], target: Path, *, progress: Progress
) -> None:
    done = 0
    with building(target, last=RELEASE) as build:
        for path, file in release.files.items():
            cached = _fetch(registry, release, path, progress=partial(_report, progress, done, release.size, path))
            (build / path).parent.mkdir(parents=True, exist_ok=True)
            _link(cached, build / path)
            done += file.size
        (build / RELEASE).write_bytes(content[0])
        if content[1] is not None:
            (build / SIGNATURE).write_bytes(content[1])


def _report(progress: Progress, before: int, total: int, path: str, size: int) -> None:
    progress(before + size, total, path)


def _fetch(registry: Registry, release: Release, path: str, *, progress: Callable[[int], None]) -> Path:
    # Return the cached file with the content. It is hashed before it is used, and after a download before it gets its
    # final name.
    file = release.files[path]
    cached = cache() / "blobs" / file.sha256[:2] / file.sha256
    cached.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cached.with_name(f".{cached.name}.lock")):
        if cached.is_file() and digest(cached) == file:
            return cached
        part = cached.with_name(f".{cached.name}.partial")
        have = part.stat().st_size if part.exists() else 0
        if have > file.size:
            part.unlink()
            have = 0
        _require_space(part.parent, file.size - have)
        with part.open("ab") as stream:
            # A pull that was killed while it hashed has left all bytes, and registries refuse to send none.
            for chunk in registry.download(release, path, offset=have) if have < file.size else ():
                have += len(chunk)
                if have > file.size:
                    break
                stream.write(chunk)
                progress(have)
        if digest(part) != file:
            part.unlink()
            raise PipelineError(
                f"{registry.url} gave other bytes for {path} than {RELEASE} says: nothing was installed; try again, "
                "and tell whoever keeps the registry when it stays so."
            )
        part.replace(cached)
    return cached


def _resolve(registry: Registry, name: str, alias: str) -> str:
    known = _home(registry, name) / f"{alias}.alias"
    try:
        version = registry.resolve(name, alias)
    except PipelineError as error:
        if not known.exists():
            raise
        version = known.read_text("utf-8").strip()
        logger.warning("%s Taking %s %s as it was: %s.", error, name, alias, version)
        return version
    if version is None or not re.fullmatch(VERSION, version):
        raise _unknown(registry, name, alias)
    known.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(known.with_name(f".{known.name}.lock")):  # another pull may record it at the same time
        replace_file(known, version)
    return version


def _unknown(registry: Registry, name: str, version: str) -> PipelineError:
    return PipelineError(f"{registry.url} has no {name} {version}: see `phi3 list {registry.url}`.")


def _home(registry: Registry, name: str) -> Path:
    # Each registry has its own directory, since releases of the same name and version may differ between registries.
    return cache() / "releases" / hashlib.sha256(registry.url.encode()).hexdigest()[:16] / name


def _is_installed(target: Path, name: str, version: str, *, key: Path | None, cached: bool) -> bool:
    # Return whether `target` has the release. In the cache a damaged copy counts as none; anywhere else it is an error.
    if not (target / RELEASE).exists():
        return False
    try:
        found = verify_release(target, key=key)
    except PipelineError:
        if cached:
            return False
        raise
    if (found.name, found.version) != (name, version):
        raise PipelineError(
            f"{target} has {found.name} {found.version}, not {name} {version}: remove it or give another directory."
        )
    return True


def _link(cached: Path, target: Path) -> None:
    try:
        target.hardlink_to(cached)
    except OSError:
        shutil.copyfile(cached, target)


def _require_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise PipelineError(
            f"{directory} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed: free some space, or set "
            f"{CACHE_VARIABLE} to a directory on a larger disk."
        )

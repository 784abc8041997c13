"""A checkpoint from the Hugging Face Hub: a pinned commit, an allow-list of files, every byte checked."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.common.checkpoint import check_architecture, is_wanted, read_json
from pipeline.common.errors import PipelineError, lines
from pipeline.common.files import digest
from pipeline.common.manifest import HubOrigin
from pipeline.common.params import COMMIT, HubSource
from pipeline.common.progress import Bar, say

CACHED_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def fetch(source: HubSource, target: Path) -> HubOrigin:
    """Download the checkpoint of `source` into the directory `target` and return its origin with the resolved commit.

    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE have the same meaning as in huggingface_hub; offline, the snapshot in its
    cache is used. Files that are already in `target` with the right hash are not fetched again. A file that an earlier
    run left incomplete is fetched from its beginning, since huggingface_hub 1.21 continues a file within one run only.

    Raises PipelineError when the repository cannot be reached or read, lists a hostile path, has no safetensors or
    another architecture than Phi-3, does not fit on the disk, serves a file whose hash differs from the listing's, or
    has trusted code that is to come from another repository.
    """
    from huggingface_hub import constants

    origin = _from_cache(source, target) if constants.HF_HUB_OFFLINE else _from_hub(source, target)
    if source.trust_remote_code:
        _refuse_code_of_others(source, target)
    return origin


def _from_hub(source: HubSource, target: Path) -> HubOrigin:
    from huggingface_hub import HfApi, constants, hf_hub_download

    with _sentences(source):
        info = HfApi().model_info(
            source.repo, revision=source.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    siblings = info.siblings or []
    for sibling in siblings:
        _refuse_hostile_path(source, sibling.rfilename)
    if (
        not info.sha
        or not COMMIT.fullmatch(info.sha)
        or (COMMIT.fullmatch(source.revision) and info.sha != source.revision)
    ):
        raise PipelineError(f"{source.repo}: asked for {source.revision}, the Hub answered with commit {info.sha}.")
    wanted = [s for s in siblings if is_wanted(s.rfilename, code=source.trust_remote_code)]
    if not any(sibling.rfilename.endswith(".safetensors") for sibling in wanted):
        raise PipelineError(
            f"{source.repo} at {info.sha} has no safetensors weights; pickle weights (.bin, .pt) are never loaded, "
            "since they can run code: choose a revision or a conversion with safetensors."
        )
    _remove_stale(target, {sibling.rfilename for sibling in wanted})
    missing = [sibling for sibling in wanted if not _is_intact(target / sibling.rfilename, sibling)]
    _check_space(target, sum(sibling.size or 0 for sibling in missing))
    missing.sort(key=lambda sibling: sibling.rfilename.endswith(".safetensors"))
    for number, sibling in enumerate(missing, start=1):
        if sibling.rfilename.endswith(".safetensors"):
            check_architecture(target)  # before gigabytes arrive
        say(f"{source.repo}: {sibling.rfilename} ({(sibling.size or 0) / 1e6:.1f} MB, {number} of {len(missing)})")
        (target / sibling.rfilename).unlink(missing_ok=True)  # damaged: the client would keep it without a check
        with _sentences(source):
            hf_hub_download(source.repo, sibling.rfilename, revision=info.sha, local_dir=target, tqdm_class=Bar)
        if not _is_intact(target / sibling.rfilename, sibling):
            (target / sibling.rfilename).unlink()
            raise PipelineError(
                f"{source.repo}: {sibling.rfilename} arrived with another hash than the Hub lists; it was deleted. Run "
                "again; if it happens twice, the server, a proxy or the Hugging Face cache damages it."
            )
    return HubOrigin(hub=source.repo, revision=str(info.sha))


def fetch_config(source: HubSource) -> dict[str, Any]:
    """Return the config of the checkpoint of `source`, without its weights; raise PipelineError as `fetch` does."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    with _sentences(source):
        if not constants.HF_HUB_OFFLINE:  # fails at once with the reason if the Hub cannot be reached
            HfApi().model_info(source.repo, revision=source.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return read_json(Path(hf_hub_download(source.repo, "config.json", revision=source.revision)))


def _from_cache(source: HubSource, target: Path) -> HubOrigin:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(source.repo, revision=source.revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise PipelineError(
            f"HF_HUB_OFFLINE is set and {source.repo} at {source.revision} is not in the Hugging Face cache: unset it, "
            f"or run `hf download {source.repo} --revision {source.revision}` while online."
        ) from error
    paths = [path for path in sorted(snapshot.iterdir()) if is_wanted(path.name, code=source.trust_remote_code)]
    _remove_stale(target, {path.name for path in paths})
    for path in paths:
        say(f"{source.repo}: {path.name} from the Hugging Face cache")
        shutil.copyfile(path, target / path.name)
        # In the cache a file is a link to a blob that is named by its SHA-256, or by git's hash of a small file. Blobs
        # from a mirror of the Hub may have other names, and where links are not possible the cache has no hashes.
        blob, copy = path.resolve().name, target / path.name
        if CACHED_BLOB.fullmatch(blob) and blob != (digest(copy).sha256 if len(blob) == 64 else _git_hash(copy)):
            raise PipelineError(f"{path} is damaged in the Hugging Face cache: delete it and download it again.")
    return HubOrigin(hub=source.repo, revision=snapshot.name)


def _refuse_code_of_others(source: HubSource, checkpoint: Path) -> None:
    # A class such as `other/repository--module.Class` would be fetched from the newest commit of that repository.
    for name in ("config.json", "tokenizer_config.json"):
        classes = read_json(checkpoint / name).get("auto_map", {}) if (checkpoint / name).exists() else {}
        if other := re.search(r"[\w.-]+/[\w.-]+--", json.dumps(classes)):
            raise PipelineError(
                f"{source.repo}: {name} takes Python code from {other[0][:-2]}, whose commit nothing pins: copy that "
                "code into the repository, or remove trust_remote_code from params.yaml."
            )


def _refuse_hostile_path(source: HubSource, name: str) -> None:
    # huggingface_hub before 1.26 writes outside local_dir when a server lists such names.
    parts = re.split(r"[/\\]", name)
    if "\\" in name or ":" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise PipelineError(
            f"{source.repo} lists the file {name!r}, a path that leads out of its folder: nothing was downloaded."
        )


def _remove_stale(target: Path, wanted: set[str]) -> None:
    # Remove what an interrupted run left: files of another commit, if a branch has moved since, and incomplete files of
    # a killed client, which it never uses again.
    for path in target.iterdir():
        if not path.name.startswith(".") and path.name not in wanted:
            path.unlink()
    for path in (target / ".cache").rglob("*.incomplete"):
        path.unlink()


def _is_intact(path: Path, sibling: Any) -> bool:
    if not path.is_file():
        return False
    if sibling.lfs:
        return digest(path).sha256 == str(sibling.lfs.sha256)
    return _git_hash(path) == str(sibling.blob_id)


def _git_hash(path: Path) -> str:
    hashed = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashed).hexdigest()


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if needed > free:
        raise PipelineError(
            f"the checkpoint needs {needed / 1e9:.1f} GB more and the disk has {free / 1e9:.1f} GB free: make room."
        )


@contextmanager
def _sentences(source: HubSource) -> Iterator[None]:
    import httpx
    from huggingface_hub import constants, errors

    what = f"{source.repo} at {source.revision}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise PipelineError(
            f"{source.repo} is gated: accept its terms on {constants.ENDPOINT}/{source.repo}, then set HF_TOKEN or run "
            "`hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise PipelineError(
            f"{source.repo} does not exist on {constants.ENDPOINT}, or is private: correct `repo` in params.yaml, "
            "or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise PipelineError(f"{what} does not exist: correct `revision` in params.yaml.") from error
    except errors.LocalEntryNotFoundError as error:
        raise PipelineError(
            f"{what}: {constants.ENDPOINT} cannot be reached; check the network, then run again."
        ) from error
    except (httpx.HTTPError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk failed, not the Hub
        reason = lines(error)[0]
        raise PipelineError(
            f"{what}: {constants.ENDPOINT} cannot be reached or failed ({reason}); run again to continue where it "
            "stopped."
        ) from error

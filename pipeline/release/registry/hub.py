"""A repository of the Hugging Face Hub as the registry of one artifact: a commit and a tag per version.

Aliases are in aliases.json on the main branch, since the Hub cannot move a tag in one step.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    errors,
    hf_hub_url,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from pipeline.common.errors import PipelineError, lines
from pipeline.common.files import File
from pipeline.release.registry.interface import Entry, require_own
from pipeline.release.release import NAME, RELEASE, SIGNATURE, VERSION, Release, read_release

ALIASES = "aliases.json"
MAIN = "main"
CHUNK = 1 << 20  # more than a release.json may have
ALIAS_TRIES = 5


class HubRegistry:
    """The repository `repo` of the Hub or of the server in HF_ENDPOINT; HF_TOKEN gives access to private ones."""

    def __init__(self, repo: str) -> None:
        self.url = f"hf:{repo}"
        self._repo, self._api = repo, HfApi()
        self._uploads: dict[str, CommitOperationAdd] = {}

    def entries(self) -> list[Entry]:
        found = []
        aliases = self._aliases()
        for version in self._versions():
            content = self._file(RELEASE, version)
            if content is not None:
                release = read_release(content, origin=self.url)
                found.append(Entry(release.name, version, sorted(a for a, v in aliases.items() if v == version)))
        return sorted(found, key=lambda entry: entry.order)

    def resolve(self, name: str, version: str) -> str | None:
        if re.fullmatch(VERSION, version):
            return version if version in self._versions() else None
        return self._aliases().get(version)

    def read(self, name: str, version: str) -> tuple[bytes, bytes | None] | None:
        content = self._file(RELEASE, version)
        return None if content is None else (content, self._file(SIGNATURE, version))

    def prepare(self, name: str) -> None:
        self._uploads = {}  # a failed publication may have left some
        with self._sentences():
            self._api.create_repo(self._repo, private=True, exist_ok=True)
        require_own(self._file(RELEASE, MAIN), name, url=self.url)

    def has(self, name: str, file: File) -> bool:
        return False  # the client itself asks the Hub, and sends only contents that it lacks

    def upload(self, name: str, path: str, local: Path, file: File) -> None:
        with self._sentences():
            operation = CommitOperationAdd(path_in_repo=path, path_or_fileobj=local)
            self._api.preupload_lfs_files(self._repo, [operation], free_memory=False)
        self._uploads[path] = operation

    def publish(self, release: Release, signature: bytes | None) -> None:
        documents = {RELEASE: release.content()} | ({} if signature is None else {SIGNATURE: signature})
        operations: list[Any] = [*self._uploads.values()]
        operations += [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in documents.items()
        ]
        with self._sentences(), _races():
            head = self._api.repo_info(self._repo, revision=MAIN)
            kept = {operation.path_in_repo for operation in operations} | {ALIASES, ".gitattributes"}
            old = [sibling.rfilename for sibling in head.siblings or [] if sibling.rfilename not in kept]
            operations += [CommitOperationDelete(path_in_repo=path) for path in old]
            commit = self._api.create_commit(
                self._repo,
                operations,
                commit_message=f"{release.name} {release.version}",
                parent_commit=head.sha,
            )
            self._api.create_tag(self._repo, tag=release.version, revision=commit.oid)

    def point(self, name: str, alias: str, version: str) -> None:
        for _ in range(ALIAS_TRIES):
            with self._sentences(), suppress(FileExistsError), _races():  # another alias moved: look again
                head = self._api.repo_info(self._repo, revision=MAIN).sha
                aliases = self._aliases()
                if aliases.get(alias) == version:
                    return
                content = json.dumps(aliases | {alias: version}, indent=2, sort_keys=True) + "\n"
                self._api.create_commit(
                    self._repo,
                    [CommitOperationAdd(path_in_repo=ALIASES, path_or_fileobj=content.encode())],
                    commit_message=f"{alias} is {version}",
                    parent_commit=head,
                )
        if self._aliases().get(alias) != version:
            raise PipelineError(f"others publish to {self.url} all the time: run again to move {alias}.")

    def download(self, release: Release, path: str, *, offset: int) -> Iterator[bytes]:
        with self._sentences():
            yield from self._stream(path, release.version, offset=offset)

    def address(self, release: Release, path: str = "") -> str:
        address: str = hf_hub_url(self._repo, path, revision=release.version, endpoint=self._api.endpoint)
        return address.rstrip("/")

    def _versions(self) -> list[str]:
        with self._sentences():
            refs = self._api.list_repo_refs(self._repo)
        return [tag.name for tag in refs.tags if re.fullmatch(VERSION, tag.name)]

    def _aliases(self) -> dict[str, str]:
        content = self._file(ALIASES, MAIN)
        try:
            aliases = json.loads(content or b"{}")
            return {a: v for a, v in aliases.items() if re.fullmatch(NAME, a) and re.fullmatch(VERSION, v)}
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise PipelineError(f"{self.url}: {ALIASES} is not valid: pull a version by its number.") from error

    def _file(self, path: str, revision: str) -> bytes | None:
        # Return the content of a small file, or the beginning of a large one, which is too long to be valid.
        with self._sentences():
            try:
                return next(self._stream(path, revision, offset=0), b"")
            except (errors.EntryNotFoundError, errors.RevisionNotFoundError):
                return None

    def _stream(self, path: str, revision: str, *, offset: int) -> Iterator[bytes]:
        # This does not use hf_hub_download, because its cache returns old content when the Hub fails.
        address = hf_hub_url(self._repo, path, revision=revision, endpoint=self._api.endpoint)
        headers = build_hf_headers() | ({"Range": f"bytes={offset}-", "Accept-Encoding": "identity"} if offset else {})
        # It waits and asks again while the Hub is busy or limits the rate. It must not do so for exceptions, because
        # huggingface_hub 1.x would then begin the body of a broken response again, and fail with another error.
        with http_stream_backoff(
            "GET",
            address,
            retry_on_exceptions=(),
            headers=headers,
            follow_redirects=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:
            hf_raise_for_status(response)
            if offset and response.status_code != httpx.codes.PARTIAL_CONTENT:
                raise httpx.RequestError("it cannot continue a download")
            yield from response.iter_bytes(CHUNK)

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise
        except errors.RepositoryNotFoundError as error:
            raise PipelineError(
                f"{self.url} does not exist, or is private: check its name, and that HF_TOKEN may read it."
            ) from error
        except (errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # the disk failed, not the Hub
            reason = lines(error)[0]
            raise PipelineError(
                f"{self.url}: {constants.ENDPOINT} failed ({reason}): check the network and HF_TOKEN, then run again."
            ) from error


@contextmanager
def _races() -> Iterator[None]:
    # Raise FileExistsError for the Hub's answers to the slower of two publishers: another commit came first, or the tag
    # exists.
    try:
        yield
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (httpx.codes.CONFLICT, httpx.codes.PRECONDITION_FAILED):
            raise FileExistsError from error
        raise

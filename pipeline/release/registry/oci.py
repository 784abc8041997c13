"""A repository of an OCI registry as the registry of one artifact: a tag per version or alias, a layer per file."""

import functools
import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import requests
from oras.auth import TokenAuth, auth_backends
from oras.container import Container
from oras.provider import Registry as Provider
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from pipeline.common.errors import PipelineError, lines
from pipeline.common.files import File, digest
from pipeline.common.manifest import VariantManifest
from pipeline.common.paths import MANIFEST
from pipeline.release.registry.interface import Entry, require_own
from pipeline.release.registry.modelpack import (
    FILEPATH,
    MANIFEST_SCHEMA,
    MANIFEST_TYPE,
    describe,
    make_config,
    make_manifest,
)
from pipeline.release.release import MAX_RELEASE, NAME, RELEASE, SIGNATURE, VERSION, Release, read_release

CONFIG = "config.json"  # of the source checkpoint
UPLOAD_CHUNK, DOWNLOAD_CHUNK = 64 << 20, 1 << 20
TOKEN_LIFETIME = 60  # seconds at least: https://distribution.github.io/distribution/spec/auth/token/
TIMEOUT = 120  # seconds without an answer; a registry may take long to move a large content to its place


class _Adapter(HTTPAdapter):
    # oras-py sets no timeout, so a registry that stalls would keep the command waiting for ever.
    def send(self, *arguments: Any, **options: Any) -> requests.Response:
        return super().send(*arguments, **options | {"timeout": TIMEOUT})


class _Client(Provider):  # type: ignore[misc]
    # With its own retries, oras-py takes two minutes to report that a host does not answer.
    do_request = Provider.do_request.__wrapped__


class _Tokens(TokenAuth):  # type: ignore[misc]
    # A registry refuses a token that has expired, or that lacks the scope of a request, and names the scope that it
    # wants. oras-py would send the refused token again; this asks for another one. It also does so in time, since a
    # registry may close the connection while it is sent a large chunk with an expired token.

    def authenticate_request(self, original: requests.Response, headers: dict[str, str], refresh: bool = False) -> Any:
        self._challenge, self._renew = original, time.monotonic() + TOKEN_LIFETIME / 2
        return super().authenticate_request(original, headers, refresh=True)

    def get_auth_header(self) -> Any:
        if time.monotonic() >= self._renew:
            self.authenticate_request(self._challenge, {})
        return super().get_auth_header()


auth_backends["tokens"] = _Tokens


class OciRegistry:
    """The repository `HOST/NAME`; credentials are those of `docker login`. On the loopback it speaks plain HTTP."""

    def __init__(self, repository: str) -> None:
        self.url = f"oci:{repository}"
        logging.getLogger("oras").setLevel(logging.CRITICAL)  # this class reports errors itself, in one sentence
        self._repository = repository

    @functools.cached_property
    def _client(self) -> Any:
        return _client(self._container("latest"), url=self.url)

    def entries(self) -> list[Entry]:
        tags = self._tags()
        digests = {tag: self._digest(tag) for tag in tags}
        found = []
        for version in tags:
            if re.fullmatch(VERSION, version) and (content := self.read("", version)):
                release = read_release(content[0], origin=self.url)
                aliases = [tag for tag in tags if tag != version and digests[tag] == digests[version]]
                found.append(Entry(release.name, version, sorted(tag for tag in aliases if re.fullmatch(NAME, tag))))
        return sorted(found, key=lambda entry: entry.order)

    def resolve(self, name: str, version: str) -> str | None:
        content = self.read(name, version)
        return read_release(content[0], origin=self.url).version if content else None

    def read(self, name: str, version: str) -> tuple[bytes, bytes | None] | None:
        manifest = self._manifest(version)
        if manifest is None:
            return None
        layers = {layer.get("annotations", {}).get(FILEPATH): layer for layer in manifest["layers"]}
        if RELEASE not in layers:
            raise PipelineError(f"{self.url}:{version} is no model that this pipeline published: it has no {RELEASE}.")
        contents = [self._small(layers[path]) if path in layers else None for path in (RELEASE, SIGNATURE)]
        return contents[0] or b"", contents[1]

    def prepare(self, name: str) -> None:
        version = next((tag for tag in self._tags() if re.fullmatch(VERSION, tag)), None)
        content = self.read(name, version) if version else None
        require_own(content[0] if content else None, name, url=self.url)

    def has(self, name: str, file: File) -> bool:
        with _sentences(self.url):
            return bool(self._client.blob_exists(describe(file, ""), self._container("latest")))

    def upload(self, name: str, path: str, local: Path, file: File) -> None:
        self._upload(local, file)

    def publish(self, release: Release, signature: bytes | None) -> None:
        layers = [describe(file, path) for path, file in release.files.items()]
        documents = {RELEASE: release.content()} | ({} if signature is None else {SIGNATURE: signature})
        contents = {layer["annotations"][FILEPATH]: layer for layer in layers}
        made, shape = (self._small(contents[path]) for path in (MANIFEST, CONFIG))
        config = make_config(release, VariantManifest.model_validate_json(made), json.loads(shape), layers)
        with tempfile.TemporaryDirectory(prefix="phi3-oci-") as folder:
            for path, content in documents.items():
                layers.append(self._upload_bytes(Path(folder) / path, content, path))
            configuration = self._upload_bytes(Path(folder) / "config.json", json.dumps(config).encode(), "")
        manifest = make_manifest(configuration, layers)
        if self._manifest(release.version) is not None:
            raise FileExistsError(release.version)
        self._put(manifest, release.version)
        # A tag cannot be created exclusively: of two simultaneous publishers the last wins, the other gets an error.
        if self._manifest(release.version) != manifest:
            raise FileExistsError(release.version)

    def point(self, name: str, alias: str, version: str) -> None:
        manifest = self._manifest(version)
        if manifest is None:
            raise PipelineError(f"{self.url} has no {version} for {alias} to stand for: publish it again.")
        self._put(manifest, alias)

    def download(self, release: Release, path: str, *, offset: int) -> Iterator[bytes]:
        file = release.files[path]
        with _sentences(self.url):
            container = self._container(release.version)
            address = f"{self._client.prefix}://{container.get_blob_url(f'sha256:{file.sha256}')}"
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            with self._client.do_request(address, "GET", headers=headers, stream=True) as response:
                response.raise_for_status()
                if offset and response.status_code != requests.codes.partial_content:
                    raise requests.RequestException("the registry cannot continue a download")
                yield from response.iter_content(DOWNLOAD_CHUNK)

    def address(self, release: Release, path: str = "") -> str:
        raise PipelineError(
            f"{self.url} gives its files only to clients of OCI registries, not to a program that has their addresses: "
            "publish to hf: or dir: as well."
        )

    def _container(self, tag: str) -> Container:
        return Container(f"{self._repository}:{tag}")

    def _tags(self) -> list[str]:
        with _sentences(self.url):
            address = f"{self._client.prefix}://{self._container('latest').tags_url()}"
            if self._client.do_request(address, "GET").status_code == requests.codes.not_found:
                return []
            return [str(tag) for tag in self._client.get_tags(self._container("latest"))]

    def _response(self, tag: str) -> requests.Response | None:
        address = f"{self._client.prefix}://{self._container(tag).manifest_url()}"
        response: requests.Response = self._client.do_request(address, "GET", headers={"Accept": MANIFEST_TYPE})
        if response.status_code == requests.codes.not_found:
            return None
        response.raise_for_status()
        return response

    def _digest(self, tag: str) -> str | None:
        with _sentences(self.url):
            response = self._response(tag)
            return None if response is None else hashlib.sha256(response.content).hexdigest()

    def _manifest(self, tag: str) -> dict[str, Any] | None:
        with _sentences(self.url):
            response = self._response(tag)
            if response is None:
                return None
            manifest: dict[str, Any] = response.json()
            jsonschema.validate(manifest, MANIFEST_SCHEMA)
            return manifest

    def _put(self, manifest: dict[str, Any], tag: str) -> None:
        with _sentences(self.url):
            self._client.upload_manifest(manifest, self._container(tag)).raise_for_status()

    def _small(self, layer: dict[str, Any]) -> bytes:
        with _sentences(self.url):
            response = self._client.get_blob(self._container("latest"), layer["digest"], stream=True)
            response.raise_for_status()
            content: bytes = next(response.iter_content(MAX_RELEASE + 1), b"")
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != layer["digest"]:
            raise PipelineError(f"{self.url} gave other bytes than its manifest says: nothing was installed.")
        return content

    def _upload(self, local: Path, file: File) -> None:
        with _sentences(self.url):
            self._client.upload_blob(
                str(local), self._container("latest"), describe(file, ""), do_chunked=True, chunk_size=UPLOAD_CHUNK
            ).raise_for_status()

    def _upload_bytes(self, local: Path, content: bytes, path: str) -> dict[str, Any]:
        local.write_bytes(content)
        file = digest(local)
        self._upload(local, file)
        return describe(file, path)


@contextmanager
def _sentences(url: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except (requests.RequestException, jsonschema.ValidationError, ValueError) as error:
        reason = lines(error)[0]
        raise PipelineError(
            f"{url} failed ({reason}): check the network and `docker login`, then run again."
        ) from error


def _client(container: Container, *, url: str) -> Any:
    # Return oras-py's client, set up for the kind of login that the registry asks for; oras-py cannot find that out.
    insecure = container.registry.split(":")[0] in ("localhost", "127.0.0.1")
    # A registry answers with status 500 while somebody else writes a tag, and with 400 to a manifest while somebody
    # else writes one of its contents.
    retry = Retry(total=3, backoff_factor=0.5, status_forcelist=(400, 500, 502, 503, 504), raise_on_status=False)
    adapter = _Adapter(max_retries=retry)
    with _sentences(url), requests.Session() as session:
        prefix = "http" if insecure else "https"
        session.mount(f"{prefix}://", adapter)
        challenge = session.get(f"{prefix}://{container.registry}/v2/").headers.get("Www-Authenticate", "")
    basic = challenge.casefold().startswith("basic")
    client = _Client(hostname=container.registry, insecure=insecure, auth_backend="basic" if basic else "tokens")
    client.session.mount(f"{prefix}://", adapter)
    client.auth.load_configs(container)
    if basic and not hasattr(client.auth, "_basic_auth"):
        raise PipelineError(f"{url} wants a password: run `docker login {container.registry}` first.")
    return client

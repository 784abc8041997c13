"""release.json: a published version's name, and the hash of every file in it."""

import re
import unicodedata
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.common.errors import PipelineError
from pipeline.common.files import File

RELEASE = "release.json"
SIGNATURE = "release.sig"
NAME = r"^[a-z0-9][a-z0-9-]{0,99}$"
VERSION = r"^(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})$"
MAX_FILES, MAX_BYTES, MAX_RELEASE = 1000, 10**12, 10**6
# Names that Windows reserves for devices, with any file extension.
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[\d¹²³]|lpt[\d¹²³])(\..*)?", re.IGNORECASE)


def split_name(name: str) -> tuple[str, str]:
    """Return the model and the variant of `name`; raise PipelineError when it is not MODEL/VARIANT."""
    model, _, variant = name.partition("/")
    if not (re.fullmatch(NAME, model) and re.fullmatch(NAME, variant)):
        raise PipelineError(f"'{name}' is no name: give MODEL/VARIANT.")
    return model, variant


class Release(BaseModel):
    """The content of release.json, checked as something that may come from a hostile registry."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = 1
    model: str = Field(pattern=NAME)
    variant: str = Field(pattern=NAME)
    version: str = Field(pattern=VERSION)
    devices: list[Literal["CPU", "GPU", "NPU"]] = Field(description="what it is made for")
    requires: dict[str, str] = Field(description="packages that load it, with their versions")
    files: dict[str, File] = Field(min_length=1, max_length=MAX_FILES, description="by path with '/'")

    @field_validator("files")
    @classmethod
    def _safe(cls, files: dict[str, File]) -> dict[str, File]:
        for path in files:
            if reason := unsafe(path):
                raise ValueError(f"the path {path!r} {reason}")
        # Windows and macOS do not tell upper from lower case, and macOS not the two forms of an accented letter.
        folded = {unicodedata.normalize("NFC", path).casefold() for path in files}
        if len(folded) < len(files):
            raise ValueError("two paths differ in upper and lower case or in the form of their letters only")
        if both := sorted(folded & {str(folder) for path in folded for folder in PurePosixPath(path).parents}):
            raise ValueError(f"{both[0]!r} is a file and a folder")
        return files

    @model_validator(mode="after")
    def _bounded(self) -> "Release":
        if self.size > MAX_BYTES:
            raise ValueError(f"the files have {self.size / 1e9:.0f} GB")
        return self

    @property
    def name(self) -> str:
        """The name `<model>/<variant>`."""
        return f"{self.model}/{self.variant}"

    @property
    def size(self) -> int:
        """The size of all files together, in bytes."""
        return sum(file.size for file in self.files.values())

    def content(self) -> bytes:
        """Return the bytes of release.json; the same release always gives the same bytes."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def read_release(content: bytes, *, origin: str) -> Release:
    """Return the release that `content` describes; raise PipelineError that names `origin` when it is not one."""
    if len(content) > MAX_RELEASE:
        raise PipelineError(f"{origin}: {RELEASE} is larger than a megabyte: it is not what this pipeline publishes.")
    try:
        return Release.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:100]
        message = first["msg"].removeprefix("Value error, ")
        if where == "schema_version":
            message = "is of another schema; install the phi3-pipeline that published it"
        raise PipelineError(f"{origin}: {RELEASE} is refused ({where}: {message}).") from error


def unsafe(path: str) -> str | None:
    """Return why it is unsafe, on some system, to write a file of this path below a directory; None when it is safe."""
    parts = path.split("/")
    if not path or len(path.encode("utf-8", "surrogatepass")) > 200 or PurePosixPath(path).is_absolute():
        return "is empty, long or absolute"
    if any(part in ("", ".", "..") for part in parts):
        return "leaves the directory"
    if re.search(r"[\\:*?\"<>|\x00-\x1f\x7f]", path):
        return "has a character that file names must not have"
    if any(part[-1] in ". " or DEVICES.fullmatch(part) for part in parts):
        return "is a name that Windows treats specially"
    if parts[0].casefold() in (RELEASE, SIGNATURE):
        return "is the release's own"
    return None

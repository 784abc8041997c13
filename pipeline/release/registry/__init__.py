"""Model registries behind one interface: a directory, the Hugging Face Hub, an OCI registry."""

import re
from pathlib import Path

from pipeline.common.errors import PipelineError
from pipeline.release.registry.interface import Registry


def open_registry(url: str) -> Registry:
    """Return the registry at `url`: `dir:PATH`, `hf:OWNER/REPOSITORY` or `oci:HOST/NAME`.

    Raises PipelineError for any other kind.
    """
    kind, _, rest = url.partition(":")
    if kind == "hf" and re.fullmatch(r"[\w.-]+/[\w.-]+", rest):
        from pipeline.release.registry.hub import HubRegistry

        return HubRegistry(rest)
    if kind == "dir" and rest:
        from pipeline.release.registry.directory import DirectoryRegistry

        return DirectoryRegistry(Path(rest))
    if kind == "oci" and re.fullmatch(r"[\w.-]+(:\d+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+", rest):
        from pipeline.release.registry.oci import OciRegistry

        return OciRegistry(rest)
    raise PipelineError(f"'{url}' is no registry: give dir:PATH, hf:OWNER/REPOSITORY or oci:HOST/NAME.")

"""The releases of a registry as a model catalogue, from which Windows ML downloads what suits the machine."""

from typing import Any

from pydantic import ValidationError

from pipeline.common.checkpoint import LICENCE_FILES
from pipeline.common.errors import PipelineError
from pipeline.common.manifest import HubOrigin, PypiOrigin, VariantManifest
from pipeline.common.paths import MANIFEST
from pipeline.release.pull import read_file, releases_of
from pipeline.release.registry.interface import Registry
from pipeline.release.release import Release

# By the package that loads a release; the first of these that it requires decides.
PROVIDERS = {
    "openvino-genai": "OpenVINOExecutionProvider",
    "onnxruntime-genai-winml": "DmlExecutionProvider",
    "onnxruntime-genai": "CPUExecutionProvider",
}


def catalogue(registry: Registry) -> dict[str, Any]:
    """Return the catalogue of the releases in `registry` that the alias `latest` stands for.

    Only releases with an ONNX model are in it, since Windows ML loads no others, and of each the files that are in no
    folder, since the catalogue names files without one; only the blobs for NPUs are in folders.

    Raises PipelineError when the registry has no addresses for other programs, or when a release cannot be read.

    Format: https://learn.microsoft.com/windows/ai/new-windows-ml/model-catalog/model-catalog-source
    """
    releases = releases_of(registry, "", version="latest")
    return {"models": [_model(registry, release, name) for release in releases if (name := _provider(release))]}


def _provider(release: Release) -> str | None:
    # The execution provider that loads a release; None when none does.
    if not any(path.endswith(".onnx") for path in release.files):
        return None
    return next((provider for package, provider in PROVIDERS.items() if package in release.requires), None)


def _model(registry: Registry, release: Release, provider: str) -> dict[str, Any]:
    uri = registry.address(release)
    manifest = _manifest(registry, release)
    files = {path: file for path, file in release.files.items() if "/" not in path}
    licences = [path for path in LICENCE_FILES if path in files]
    spdx = f"https://spdx.org/licenses/{manifest.license}"
    return {
        "id": f"{release.model}-{release.variant}",
        "name": release.model,
        "version": release.version,
        "publisher": _publisher(manifest),
        "executionProviders": [{"name": provider}],
        "modelSizeBytes": sum(file.size for file in files.values()),
        "license": manifest.license,
        "licenseUri": registry.address(release, licences[0]) if licences else spdx,
        "uri": uri,
        "files": [
            {"name": path, "uri": registry.address(release, path), "sha256": file.sha256}
            for path, file in files.items()
        ],
    }


def _manifest(registry: Registry, release: Release) -> VariantManifest:
    try:
        return VariantManifest.model_validate_json(read_file(registry, release, MANIFEST))
    except (KeyError, ValidationError) as error:
        raise PipelineError(
            f"{registry.url}: {release.name} {release.version} has no {MANIFEST} that says its licence and source: it "
            "is not what this pipeline publishes."
        ) from error


def _publisher(manifest: VariantManifest) -> str:
    # Who made the source model.
    source = manifest.source
    if isinstance(source, HubOrigin):
        return source.hub.split("/")[0]
    return source.pypi if isinstance(source, PypiOrigin) else source.path

"""Publish a validated artifact to a registry: complete, immutable, and visible in one step."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline.common import paths
from pipeline.common.checkpoint import LICENCE_FILES, read_json
from pipeline.common.errors import PipelineError
from pipeline.common.files import digest
from pipeline.common.manifest import BlobManifest, HubOrigin, Manifest, VariantManifest, read_manifest, verify
from pipeline.common.params import load_params
from pipeline.common.paths import MANIFEST
from pipeline.release.documents import write_documents
from pipeline.release.openvino_ep import write_openvino_ep
from pipeline.release.registry.interface import Registry
from pipeline.release.release import NAME, VERSION, Release, read_release
from pipeline.release.signing import sign
from pipeline.run.blobs import RELEASED_BLOBS, asked_lengths, belongs


def publish(
    model: str,
    variant: str,
    *,
    registry: Registry,
    version: str,
    aliases: tuple[str, ...],
    key: Path | None = None,
    progress: Callable[[str], None],
) -> Release:
    """Publish the artifact `variant` of `model` as `version`, then let `aliases` point to it; return the release.

    The release of an NPU variant includes its blobs. If `key`, a file with a private key, is given, the release is
    signed.

    Publishing the same bytes again changes only the aliases. Files that an interrupted publication uploaded are reused.

    Raises PipelineError when the artifact in its present state has not passed validation, or when the version is
    already published with other bytes.
    """
    if not re.fullmatch(VERSION, version):
        raise PipelineError(f"'{version}' is no version: give three numbers, such as 1.0.0.")
    if wrong := [alias for alias in aliases if not re.fullmatch(NAME, alias)]:
        raise PipelineError(f"'{wrong[0]}' is no alias: use small letters, digits and hyphens.")
    directory = paths.variant(model, variant)
    progress(f"hashing {directory}")
    manifest = verify(directory, VariantManifest)
    _require_validation(model, variant)
    blobs = _blobs(directory, manifest, progress=progress)
    with tempfile.TemporaryDirectory(prefix="phi3-release-") as folder:
        added = Path(folder)
        write_documents(added, model=model, variant=variant, version=version)
        if manifest.runtime.openvino:
            write_openvino_ep(added, directory, manifest, npu_lengths=asked_lengths(blobs.values()))
        files = [*_of_source(model), *_files(directory, manifest), *added.iterdir()]
        contents = {path.name: path for path in files} | {
            f"{RELEASED_BLOBS}/{platform}/{path.name}": path
            for platform, blob in blobs.items()
            if not blob.not_compiled
            for path in _files(paths.blob(directory, platform), blob)
        }
        release = Release(
            model=model,
            variant=variant,
            version=version,
            devices=manifest.runtime.devices,
            requires=manifest.runtime.requires,
            files={name: digest(path) for name, path in sorted(contents.items())},
        )
        signature = sign(release.content(), key) if key else None
        registry.prepare(release.name)
        if _is_published(release, registry, signed=key is not None):
            progress(f"{release.name} {version} is there already, with the same bytes")
        else:
            for name, file in release.files.items():
                if not registry.has(release.name, file):
                    progress(f"uploading {name}, {file.size / 1e6:.1f} MB")
                    registry.upload(release.name, name, contents[name], file)
            try:
                registry.publish(release, signature)
            except FileExistsError:
                # Another publisher was faster, which is fine if it published the same bytes.
                if not _is_published(release, registry, signed=key is not None):
                    raise PipelineError(
                        f"another publisher is at work on {registry.url}: run again when it has ended."
                    ) from None
    for alias in aliases:
        registry.point(release.name, alias, version)
    return release


def full_url(url: str, *, model: str, variant: str) -> str:
    """Return `url`, but for `hf:OWNER` the URL of OWNER's repository with the usual name for this artifact.

    The name says the checkpoint, then weights and runtime: as in https://huggingface.co/OpenVINO for IRs, where `cw`
    is channel-wise and `gq` is group-quantized for NPUs, and as in https://huggingface.co/microsoft for ONNX models.

    Raises PipelineError when there is no such artifact.
    """
    if not re.fullmatch(r"hf:[\w.-]+", url):
        return url
    manifest = read_manifest(paths.variant(model, variant), VariantManifest)
    checkpoint = manifest.source.hub.split("/")[1] if isinstance(manifest.source, HubOrigin) else manifest.model
    return f"{url}/{checkpoint}-{_ending(manifest)}"


def _ending(manifest: VariantManifest) -> str:
    recipe = manifest.recipe.asked
    if recipe["stage"] == "build_onnx":
        return "onnx-directml" if recipe["execution_provider"] == "dml" else "onnx-cpu"
    if recipe["stage"] == "export_openvino":
        return "fp16-ov"
    if recipe["group_size"] == -1:
        return "int4-cw-ov"
    return "int4-gq-ov" if manifest.runtime.devices == ["NPU"] else "int4-ov"


def _is_published(release: Release, registry: Registry, *, signed: bool) -> bool:
    published = registry.read(release.name, release.version)
    if published is None:
        return False
    theirs = read_release(published[0], origin=registry.url)
    if theirs == release and (published[1] is not None or not signed):
        return True
    if theirs == release:
        raise PipelineError(f"{registry.url} has {release.name} {release.version} unsigned: sign a new version.")
    ours = release.files
    differing = sorted(name for name in ours.keys() | theirs.files.keys() if ours.get(name) != theirs.files.get(name))
    raise PipelineError(
        f"{registry.url} has {release.name} {release.version} with other bytes ({', '.join(differing)[:200]}), and a "
        "version never changes: publish under a new one."
    )


def _require_validation(model: str, variant: str) -> None:
    evidence_file = paths.validation(model, variant)
    remedy = f"run `dvc repro validate@{model}-{variant}` first"
    if not evidence_file.exists():
        raise PipelineError(f"{model}/{variant} has not been validated: {remedy}.")
    evidence = read_json(evidence_file)
    if evidence.get("failures"):
        raise PipelineError(f"{model}/{variant} did not pass validation ({evidence['failures'][0]}): it stays here.")
    if evidence.get("manifest_sha256") != digest(paths.variant(model, variant) / MANIFEST).sha256:
        raise PipelineError(f"{model}/{variant} was built anew since it was validated: {remedy}.")


def _blobs(directory: Path, ir: VariantManifest, *, progress: Callable[[str], None]) -> dict[str, BlobManifest]:
    # Return the manifests of the blobs by their platforms, and report blobs that were not compiled. The platforms are
    # those of params.yaml, because blobs of platforms that it no longer names may still be there.
    blobs: dict[str, BlobManifest] = {}
    for platform in map(str, load_params().npu_platforms):
        path = paths.blob(directory, platform)
        if not path.exists():
            if "NPU" in ir.runtime.devices:
                raise PipelineError(f"{path} is not built: run `dvc repro compile_npu` first.")
            continue
        blob = blobs[platform] = verify(path, BlobManifest)
        if blob.not_compiled:
            progress(f"without a blob for NPU {platform}: {blob.not_compiled}")
        elif not belongs(blob, ir):
            raise PipelineError(f"{path} was compiled from another IR: run `dvc repro compile_npu` first.")
    return blobs


def _files(directory: Path, manifest: Manifest) -> list[Path]:
    # Return the files of an artifact, without what Finder or Explorer left beside them.
    return [directory / name for name in (*manifest.files, MANIFEST)]


def _of_source(model: str) -> list[Path]:
    # The Hub counts the downloads of config.json, which ONNX models lack.
    return [path for path in paths.source(model).iterdir() if path.name in (*LICENCE_FILES, "config.json")]

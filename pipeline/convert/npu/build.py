"""The directory of an NPU blob: the blob and its manifest, or only a manifest that says why there is none."""

from pathlib import Path

from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.common.files import building
from pipeline.common.manifest import (
    BlobManifest,
    BlobRecipe,
    BlobRuntime,
    Compiled,
    IrOrigin,
    Nothing,
    Shapes,
    VariantManifest,
    read_manifest,
    seal,
    tool_versions,
    verify,
)
from pipeline.common.params import Npu
from pipeline.common.progress import say
from pipeline.convert.npu import compiler
from pipeline.convert.npu.blob import read_blob
from pipeline.convert.openvino_format import MODEL


def build_blob(model: str, variant: str, platform: str, *, params: Npu) -> BlobManifest:
    """Compile the IR of `variant` for `platform`, read the blob back, and return the manifest of its directory.

    Without a compiler, or when it refuses the model, the directory has only a manifest, with the reason in
    `not_compiled`; with `params.required` that is a PipelineError instead.

    Raises PipelineError when the IR breaks a rule of the NPU, when the compiler cannot be set up, or when the blob is
    not what was asked for.
    """
    directory = paths.variant(model, variant)
    ir = read_manifest(directory, VariantManifest)
    compiler.lint(ir, params)
    hashes = {name: ir.files[name].sha256 for name in MODEL}
    tools = tool_versions("openvino")
    name = compiler.blob_name(params, platform, tools["openvino"])
    achieved: Compiled | Nothing = Nothing()
    reason = None
    with building(paths.blob(directory, platform)) as build:
        try:
            verify(directory)
            used = compiler.compile_blob(
                directory / MODEL[0],
                build / name,
                properties=compiler.properties(params, platform=platform, bank=hashes[MODEL[1]][:32]),
            )
            blob = read_blob(build / name)
            _check(build / name, platform, blob.platform, tools["openvino"], blob.openvino)
            if not params.weightless and (build / name).stat().st_size < ir.files[MODEL[1]].size:
                raise compiler.NotCompiledError(
                    "without an NPU the compiler leaves weights out of a weight-bearing blob: set weightless: true"
                )
            achieved = blob
            say(f"{name}: {(build / name).stat().st_size / 1e6:.1f} MB, {blob.compatibility}, compiler {used}")
        except compiler.NotCompiledError as error:
            if params.required:
                raise
            (build / name).unlink(missing_ok=True)
            reason = str(error)
            say(f"not compiled: {reason}")
        manifest = BlobManifest(
            name=f"{model}/{variant}-{platform}",
            model=model,
            variant=variant,
            source=IrOrigin(variant=ir.name, files=hashes, checkpoint=ir.source),
            license=ir.license,
            recipe=BlobRecipe(asked=Shapes(**params.model_dump(exclude={"required"})), achieved=achieved),
            eos_token_ids=ir.eos_token_ids,
            context=ir.context | params.model_dump(include={"max_prompt_len", "min_response_len"}),
            runtime=BlobRuntime(requires=tool_versions("openvino-genai"), devices=["NPU"], platform=platform),
            not_compiled=reason,
            tools=tools,
        )
        seal(build, manifest)
    return manifest


def _check(path: Path, *pairs: str) -> None:
    for expected, actual in zip(pairs[::2], pairs[1::2], strict=True):
        # The installed version is that of the release, followed by a build number.
        if not expected.startswith(actual):
            raise PipelineError(f"{path.name} should be for {expected}, it says {actual}: this compiler is not usable.")

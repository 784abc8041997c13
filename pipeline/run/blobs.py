"""For applications: choose between the blob and the IR of an NPU variant, on the machine at hand."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.common import paths
from pipeline.common.context import NPU_PROMPT, pipeline_options
from pipeline.common.errors import PipelineError
from pipeline.common.manifest import BlobManifest, Nothing, VariantManifest, read_manifest, verify
from pipeline.run.openvino import STATIC_ON_CPU

RELEASED_BLOBS = "blobs"
LENGTHS = ("MAX_PROMPT_LEN", "MIN_RESPONSE_LEN")
# What openvino-genai sets for a language model on the NPU.
LANGUAGE_MODEL = {"NPU_USE_NPUW": "YES", "NPUW_LLM": "YES", "NPUW_LLM_BATCH_DIM": "0", "NPUW_LLM_SEQ_LEN_DIM": "2"}


@dataclass(frozen=True)
class Choice:
    """How to load an NPU variant, as openvino_genai.LLMPipeline(directory, device, **options), and the reason."""

    device: str
    options: dict[str, str | int]
    reason: str
    lengths: dict[str, int] = field(default_factory=dict)  # options to compile the IR with, if the blob is refused

    @property
    def longest_prompt(self) -> int | None:
        """The most tokens that a prompt may have on an NPU; None on other devices, where only the model limits it."""
        asked = (self.lengths | self.options).get("MAX_PROMPT_LEN", NPU_PROMPT)
        return int(asked) if self.device == "NPU" else None


def choose(directory: Path, *, architecture: str | None = None, openvino: str | None = None) -> Choice:
    """Return how to load the NPU variant in `directory`: its blob where one fits, else its IR, compiled on loading.

    Blobs are looked for in `blobs/<platform>`, where a release has them, and in `../blobs/<variant>-<platform>`, where
    they are built. A blob fits when it is for this NPU's `architecture` (such as "4000"), was made by this version of
    `openvino`, and was compiled from exactly this IR. If `architecture` or `openvino` is not given, OpenVINO is asked
    for it. Without an NPU the IR is loaded on the CPU.

    Raises PipelineError when the directory is no finished artifact or the blob's bytes have changed.
    """
    if architecture is None or openvino is None:
        import openvino as ov

        openvino = openvino or ov.__version__
        core = ov.Core()
        if architecture is None and "NPU" in core.available_devices:
            architecture = str(core.get_property("NPU", "DEVICE_ARCHITECTURE"))
    ir = read_manifest(directory, VariantManifest)
    if not architecture:
        return Choice("CPU", {}, "this machine has no NPU, or no driver for it: the IR runs on the CPU")
    places = (directory / RELEASED_BLOBS / architecture, paths.blob(directory, architecture))
    blob_directory = next((place for place in places if place.is_dir()), None)
    lengths = asked_lengths(_compiled_from(directory, ir))
    if blob_directory is None:
        return Choice("NPU", {**lengths}, f"there is no blob for NPU {architecture}: the IR is compiled on loading")
    blob = verify(blob_directory, BlobManifest)
    if reason := _mismatch(blob, ir, openvino):
        return Choice(
            "NPU", {**lengths}, f"the blob for NPU {architecture} does not fit, {reason}: the IR is compiled on loading"
        )
    if sys.platform == "win32" and not str(blob_directory).isascii():
        reason = (
            f"on Windows openvino-genai cannot open the blob in {blob_directory}, only in a folder of plain letters"
        )
        remedy = "set PHI3_CACHE, or --to of `phi3 pull`, to one"
        return Choice("NPU", {**lengths}, f"{reason} ({remedy}): the IR is compiled on loading")
    (name,) = blob.files
    options: dict[str, str | int] = {"BLOB_PATH": str(blob_directory / name)}
    if blob.recipe.asked.weightless:
        options["WEIGHTS_PATH"] = str(directory / "openvino_model.bin")
    made_by = openvino.split("-")[0]
    return Choice("NPU", options, f"the blob is for NPU {architecture} and OpenVINO {made_by}", lengths)


def static_on_cpu(directory: Path) -> Choice:
    """Return how to load the NPU variant in `directory` in the NPU's static pipeline, compiled for the CPU."""
    lengths = asked_lengths(_compiled_from(directory, read_manifest(directory, VariantManifest)))
    return Choice("NPU", {**lengths, **STATIC_ON_CPU}, "the NPU's static pipeline, compiled for it")


def asked_lengths(blobs: Iterable[BlobManifest]) -> dict[str, int]:
    """Return the static lengths in tokens that params.yaml asks for, which each of the `blobs` of one IR states.

    They are the options MAX_PROMPT_LEN and MIN_RESPONSE_LEN. Without any blob the dictionary is empty.
    """
    for blob in blobs:
        asked = blob.recipe.asked
        return {"MAX_PROMPT_LEN": asked.max_prompt_len, "MIN_RESPONSE_LEN": asked.min_response_len}
    return {}


def _compiled_from(directory: Path, ir: VariantManifest) -> Iterator[BlobManifest]:
    # Yield the manifests of the blobs that were compiled from `ir` in `directory`; others may be there from earlier.
    for path in (*directory.glob(f"{RELEASED_BLOBS}/*/"), *directory.parent.glob(f"blobs/{directory.name}-*")):
        if belongs(blob := read_manifest(path, BlobManifest), ir):
            yield blob


def _mismatch(blob: BlobManifest, ir: VariantManifest, openvino: str) -> str | None:
    if isinstance(blob.recipe.achieved, Nothing):
        return f"it was not compiled ({blob.not_compiled})"
    made_by = blob.recipe.achieved.openvino
    if openvino.split("-")[0] != made_by:
        return f"it was made by OpenVINO {made_by} and this is {openvino}"
    return None if belongs(blob, ir) else "it belongs to another IR"


def belongs(blob: BlobManifest, ir: VariantManifest) -> bool:
    """Return whether `blob` was compiled from exactly the files of `ir`."""
    return all(ir.files[name].sha256 == sha256 for name, sha256 in blob.source.files.items())


def load_pipeline(directory: Path, **options: str | int) -> tuple[object, str]:
    """Return an openvino_genai.LLMPipeline for the NPU variant in `directory`, and how it was loaded and why.

    When the driver refuses the blob the IR is loaded instead, compiled for the lengths that the blob was asked for.
    `options` go to the pipeline in either case, such as MAX_PROMPT_LEN for the IR.

    Raises PipelineError when `choose` does, or when the IR cannot be loaded.
    """
    return load_chosen(directory, choose(directory), **options)


def load_chosen(directory: Path, choice: Choice, **options: str | int) -> tuple[object, str]:
    """Return what `load_pipeline` does, when `choose` has been called already; raise PipelineError like it."""
    import openvino_genai

    given = choice.options | ({} if choice.device == "NPU" else pipeline_options(directory))
    try:
        return openvino_genai.LLMPipeline(directory, choice.device, **given | options), choice.reason
    except RuntimeError as error:
        if "BLOB_PATH" not in choice.options:
            raise PipelineError(f"{directory} cannot be loaded on {choice.device}: {error}") from error
        why = f"the driver refused the blob ({str(error).splitlines()[-1]}): the IR was compiled on loading"
        return load_chosen(directory, Choice(choice.device, {**choice.lengths}, why), **options)


def compile_chosen(directory: Path, choice: Choice) -> Any:
    """Return the openvino.CompiledModel that LLMPipeline has inside when `load_chosen` loads `choice`, an NPU's."""
    import openvino

    core, options = openvino.Core(), dict(choice.options)
    if blob := options.pop("BLOB_PATH", None):
        try:
            return core.import_model(Path(str(blob)).read_bytes(), "NPU", options)
        except RuntimeError:  # the driver refused the blob
            options = {**choice.lengths}
    # openvino-genai has other names for the lengths than the plugin.
    given = {f"NPUW_LLM_{name}" if name in LENGTHS else name: str(value) for name, value in options.items()}
    return core.compile_model(directory / "openvino_model.xml", "NPU", LANGUAGE_MODEL | given)

"""All paths of the project, spelled here only; they are relative to the folder of dvc.yaml."""

from pathlib import Path

PARAMS_FILE = Path("params.yaml")
ARTIFACTS = Path("artifacts")
MANIFEST = "manifest.json"
FP16 = "openvino-fp16"  # a variant that every build has
RESERVED_NAMES = frozenset(
    {"source", "reference", "calibration", "validation", "metrics", "measured", "logs", "report", "blobs"}
)


def source(model: str) -> Path:
    """Return the directory of the source checkpoint."""
    return ARTIFACTS / model / "source"


def reference(model: str) -> Path:
    """Return the file with the source model's token ids, rendered chats and answers."""
    return ARTIFACTS / model / "reference.json"


def distributions(model: str) -> Path:
    """Return the file with the source model's next-token distributions along its answers."""
    return ARTIFACTS / model / "reference.safetensors"


def calibration(model: str) -> Path:
    """Return the directory of the calibration data: answers, and statistics of the inputs of all matrices."""
    return ARTIFACTS / model / "calibration"


def variant(model: str, name: str) -> Path:
    """Return the directory of a variant, which an application loads."""
    return ARTIFACTS / model / name


def fp16(model: str) -> Path:
    """Return the directory of the FP16 IR, which answers for the source model and is made into the INT4 IRs."""
    return variant(model, FP16)


def blob(directory: Path, platform: str) -> Path:
    """Return the directory of the NPU blob for a platform, given the directory of its variant."""
    return directory.parent / "blobs" / f"{directory.name}-{platform}"


def blobs(model: str) -> Path:
    """Return the directory of all NPU blobs."""
    return ARTIFACTS / model / "blobs"


def report(model: str) -> Path:
    """Return the directory of the report and its plots."""
    return ARTIFACTS / "report" / model


def metrics(model: str, name: str) -> Path:
    """Return the file with a variant's metrics, which are the same on every machine."""
    return ARTIFACTS / model / "metrics" / f"{name}.json"


def measured(model: str, name: str) -> Path:
    """Return the file with a variant's measurements on this machine; neither git nor DVC tracks it."""
    return ARTIFACTS / model / "measured" / f"{name}.json"


def validation(model: str, name: str) -> Path:
    """Return the file with a variant's answers and the checks that it passed."""
    return ARTIFACTS / model / "validation" / f"{name}.json"


def log(cell: str) -> Path:
    """Return the log file of a cell of dvc.yaml, with what the cell and its tools printed."""
    return ARTIFACTS / "logs" / f"{cell}.log"

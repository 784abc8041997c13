"""What a recipe does to each weight matrix: expected from the checkpoint's shapes, or read back from a built file."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pipeline.common.manifest import Stored

CHANNEL_WISE = -1
Role = Literal["embedding", "head", "layer"]


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of shape (rows, columns); each row is multiplied with the input vector.

    `bits` is 16 or 32 for an uncompressed matrix, `group_size` is the number of weights along a row that share a scale.
    """

    name: str
    role: Role
    rows: int
    columns: int
    bits: int = 16
    group_size: int = CHANNEL_WISE
    symmetric: bool = True

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def format(self) -> str:
        """A name such as `int4-sym-g128`, `int8-asym-channel` or `f16`."""
        if self.bits >= 16:
            return f"f{self.bits}"
        group = "channel" if self.group_size == CHANNEL_WISE else f"g{self.group_size}"
        return f"int{self.bits}-{'sym' if self.symmetric else 'asym'}-{group}"

    def size(self, *, scale_bytes: int = 2) -> float:
        """Return the bytes of weights, scales and zero points."""
        if self.bits >= 16:
            return self.elements * self.bits / 8
        groups = self.rows * (1 if self.group_size == CHANNEL_WISE else -(-self.columns // self.group_size))
        zero_points = 0 if self.symmetric else groups * self.bits / 8
        return self.elements * self.bits / 8 + groups * scale_bytes + zero_points


def role(name: str) -> Role:
    """Return what a matrix does in the model, by its `name` in a checkpoint, an IR or an ONNX model."""
    if "embed_tokens" in name:
        return "embedding"
    return "head" if "lm_head" in name else "layer"


def matrices(shapes: dict[str, list[int]]) -> list[Matrix]:
    """Return the weight matrices of a Phi-3 checkpoint, sorted by name, from the shapes of its tensors by name.

    In a checkpoint without a head of its own the embedding is the head, too; it is then listed once.
    """
    return [
        Matrix(name, role(name), rows=shape[0], columns=shape[1])
        for name, shape in sorted(shapes.items())
        if len(shape) == 2
    ]


def int4_ratio(built: Iterable[Matrix]) -> float:
    """Return the share of the layers' weights that are INT4."""
    layers = [matrix for matrix in built if matrix.role == "layer"]
    return sum(matrix.elements for matrix in layers if matrix.bits == 4) / sum(matrix.elements for matrix in layers)


def summary(built: list[Matrix]) -> Stored:
    """Return what the manifest states of a built file: share of all weights by format, and each matrix's format."""
    weights = Counter[str]()
    for matrix in built:
        weights[matrix.format] += matrix.elements
    return Stored(
        int4_ratio=round(int4_ratio(built), 4),
        formats={name: round(count / weights.total(), 4) for name, count in sorted(weights.items())},
        matrices={matrix.name: matrix.format for matrix in sorted(built, key=lambda matrix: matrix.name)},
    )

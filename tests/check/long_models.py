"""Tiny models with a window of 15 or 31 tokens, or with LongRoPE's limit at 64, in all variants."""

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.check.fidelity import Distributions, concatenate, distributions
from pipeline.check.long_context import ROWS, Found, answer, choose, compare, make_prompts
from pipeline.check.measurement import load_runtime, load_scorer
from pipeline.check.reference import LongContext
from pipeline.common.checkpoint import read_json
from pipeline.common.context import limits
from pipeline.common.params import Limits, Npu, OnnxInt4, OpenvinoFp16, OpenvinoInt4
from pipeline.convert import onnx_genai, openvino
from pipeline.run.source_model import Torch
from tests.checkpoints import LONGROPE, make_checkpoint
from tests.helpers import built_once

FACTORS = {"long_factor": [16.0] * 16, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}
MODELS = {
    "window-15": ("phi-3-4k", {"sliding_window": 15}),
    "window-31": ("phi-3-4k", {"sliding_window": 31}),
    "longrope": ("phi-3-128k", {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE | FACTORS}),
}
GATES = Limits(kl_mean=0.01, kl_p99=0.05, top1_agreement=0.9, perplexity_ratio=1.1)
ONNX = {
    "stage": "build_onnx",
    "limits": GATES,
    "symmetric": False,
    "block_size": 32,
    "algorithm": "rtn",
    "int8": ["last_matmul"],
}
INT4 = {"stage": "quantize_openvino", "limits": GATES, "symmetric": True, "group_size": -1, "ratio": 1.0}
VARIANTS = {
    "fp16": OpenvinoFp16(stage="export_openvino", limits=GATES),
    "npu": OpenvinoInt4(**INT4, npu=Npu(max_prompt_len=256, min_response_len=64)),
    "cpu": OnnxInt4(**ONNX, execution_provider="cpu"),
    "dml": OnnxInt4(**ONNX, execution_provider="dml"),
}
NEAR = 0.25  # in nats: the runtimes' logits may differ from the source's by as much


@dataclass(frozen=True)
class Tiny:
    """A tiny model's directories by variant, its source in torch, and the source's distributions after long prompts."""

    name: str
    root: Path
    source: Torch
    prompts: LongContext
    ends: Distributions

    def limits(self) -> dict[str, int]:
        """The model's limits."""
        return limits(read_json(self.root / "checkpoint/config.json"), directml=False)

    def found(self, variant: str, *, directory: Path | None = None) -> list[Found]:
        """The findings of the check on a variant, or on a broken copy of it in `directory`."""
        directory = directory or self.root / variant
        most = 256 if variant == "npu" else 512
        chosen = choose(self.limits(), most=most)
        said = answer(load_runtime(directory, variant=VARIANTS[variant]), self.prompts, chosen)
        scorer = load_scorer(directory, variant=VARIANTS[variant], context=self.limits())
        return compare(scorer, self.prompts, said, self.ends)

    def departure(self, prompt: list[int], said: list[int]) -> float:
        """The most by which the source's logits, all tokens read at once, prefer another token to one of `said`."""
        logits = self.source.logits(prompt + said[:-1], last=len(said))
        return float((logits.max(axis=1) - logits[np.arange(len(said)), said]).max())


def load(name: str, factory: pytest.TempPathFactory) -> Tiny:
    """Return the model `name`, in a folder of this process: a validation writes beside the artifact."""
    built = built_once(factory, name, functools.partial(build, name))
    root = shutil.copytree(built, factory.mktemp(name) / name, copy_function=os.link)
    source = Torch(root / "checkpoint")
    prompts = make_prompts(source.encode, limits(read_json(root / "checkpoint/config.json"), directml=False))
    rows = [distributions(source.logits(prompts.ids[:length], last=ROWS)) for length in prompts.lengths]
    ends = concatenate(rows)
    return Tiny(name, root, source, prompts, ends)


def build(name: str, root: Path) -> None:
    """Build the model `name` with all its variants in `root`."""
    style, changes = MODELS[name]
    checkpoint = make_checkpoint(root / "checkpoint", style, on_grid=True, **changes)
    for variant in VARIANTS:
        (root / variant).mkdir()
    openvino.export_fp16(checkpoint, root / "fp16")
    openvino.quantize_int4(
        root / "fp16", root / "npu", recipe=VARIANTS["npu"], adjust_group_size=False, calibration=None
    )
    for variant in ("cpu", "dml"):
        onnx_genai.build_int4(
            checkpoint, root / variant, recipe=VARIANTS[variant], trust_remote_code=False, calibration=None
        )

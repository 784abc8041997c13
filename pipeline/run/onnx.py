"""ONNX models in onnxruntime-genai."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.common.checkpoint import read_json
from pipeline.common.errors import writing_to
from pipeline.run.interface import Generation, Message, Precision
from pipeline.run.pieces import pieces

ERRORS = 3  # ONNX Runtime's level of messages that says errors only


class OnnxGenai:
    """onnxruntime-genai on the CPU provider, whatever provider the model was built for; with `directml`, on DirectML.

    `precision` does not change how it computes: in the model's own types, with accuracy_level 4. With "f32", which is
    for judging, it uses all processors and takes less memory: it has no arena, and a model for CPUs maps weights that
    ONNX Runtime packed for this processor from a file. The results are the same.
    `original` is the original limit of a model with LongRoPE. DirectML reads a text at once, the CPU in pieces.

    Raises RuntimeError when the runtime cannot load the model, and OSError when the disk has no room for the packed
    weights.
    """

    name = "onnxruntime-genai"

    def __init__(
        self, directory: Path, *, precision: Precision = "f32", original: int | None = None, directml: bool = False
    ) -> None:
        import onnxruntime_genai

        self._original, self._directml = original, directml
        self.device = "DirectML" if directml else "CPUExecutionProvider"
        config = onnxruntime_genai.Config(str(directory))
        if not directml:
            config.clear_providers()
        if precision == "f32":
            # By default onnxruntime-genai leaves half of the processors idle, since they may be hyperthreads.
            _overlay(
                config,
                {"session_options": {"enable_cpu_mem_arena": False, "intra_op_num_threads": os.cpu_count()}},
            )
        decoder = read_json(directory / "genai_config.json")["model"]["decoder"]
        # ONNX Runtime 1.31.1 packs float16 models wrongly. Windows cannot delete a file that is mapped.
        if precision == "f32" and not decoder["session_options"]["provider_options"] and sys.platform != "win32":
            packed = directory.with_name(f".packed-{directory.name}")
            shutil.rmtree(packed, ignore_errors=True)  # a killed validation may have left it
            packed.mkdir()
            try:
                model = _pack(directory / "model.onnx", packed)
                _overlay(config, {"filename": os.path.relpath(model, directory)})  # onnxruntime-genai joins the two
                self._model = onnxruntime_genai.Model(config)
            finally:
                shutil.rmtree(packed)
        else:
            self._model = onnxruntime_genai.Model(config)
        self._tokenizer = onnxruntime_genai.Tokenizer(self._model)

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)]

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))

    def render_chat(self, messages: list[Message]) -> str:
        return str(self._tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True))

    def eos_token_ids(self) -> list[int]:
        return sorted(int(token) for token in self._tokenizer.eos_token_ids)

    def generate(self, ids: list[int], *, max_new_tokens: int) -> Generation:
        generator = self._generator(len(ids) + max_new_tokens)
        started = time.perf_counter()
        generator.append_tokens(ids)
        generated: list[int] = []
        first = started
        while not generator.is_done():
            generator.generate_next_token()
            generated.append(int(generator.get_next_tokens()[0]))
            if len(generated) == 1:
                first = time.perf_counter()
        rest = time.perf_counter() - first
        return Generation(
            ids=generated,
            stopped=bool(generated) and generated[-1] in self.eos_token_ids(),
            time_to_first_token=first - started,
            time_per_token=rest / max(len(generated) - 1, 1),
        )

    def logits(self, ids: list[int], *, last: int) -> Any:
        import numpy as np

        generator = self._generator(len(ids))
        whole = [(0, len(ids))]  # DirectML takes no second piece of a text
        for start, end in whole if self._directml else pieces(len(ids), last=last, original=self._original):
            generator.append_tokens(ids[start:end])
        return np.asarray(generator.get_output("logits")[0, -last:], dtype=np.float32)

    def _generator(self, max_length: int) -> Any:
        import onnxruntime_genai

        parameters = onnxruntime_genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=max_length, do_sample=False)
        return onnxruntime_genai.Generator(self._model, parameters)


def _overlay(config: Any, decoder: dict[str, Any]) -> None:
    config.overlay(json.dumps({"model": {"decoder": decoder}}))


def _pack(model: Path, target: Path) -> Path:
    # Write `model` with its weights in the order in which this processor reads them, and return the new model's path.
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS  # it warns that the written model is for this machine only
    options.optimized_model_filepath = str(target / model.name)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{model.name}.data")
    with writing_to(target):
        try:
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no other type in common
            raise RuntimeError(str(error)) from error
    return target / model.name

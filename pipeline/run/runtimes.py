"""The runtimes that load an artifact or the source model, behind two protocols: one generates, one gives logits.

An artifact is judged in float32 on the CPU, whatever the runtime's defaults are, so that the verdict is the same on
every machine. What an application will see is measured with the runtime's defaults.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline.common.checkpoint import read_json
from pipeline.common.context import is_longrope, pipeline_options
from pipeline.common.params import Npu
from pipeline.run.ir_inputs import model_inputs

Message = dict[str, str]
Precision = Literal["f32", "default"]
# By default OpenVINO's CPU plugin computes in bfloat16 where the CPU has it, keeps the KV cache in 8 bits, and
# quantizes the activations that meet compressed weights. A 16-bit cache costs the FP16 IR no measurable accuracy.
# https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html
F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
# The settings of the usual OpenVINO tutorial for a single user on a laptop.
LATENCY = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "CACHE_DIR": ""}

ERRORS = 3  # ONNX Runtime's level of messages that says errors only
# The most tokens that a model reads at a time, since a layer's results for all of them, and the logits, are in memory.
PIECE = 256


@dataclass(frozen=True)
class Generation:
    """Greedily generated token ids, without the prompt; times in seconds."""

    ids: list[int]
    stopped: bool  # by an eos token, not by the limit
    time_to_first_token: float
    time_per_token: float  # of the tokens after the first


class Runtime(Protocol):
    """What the checks need of a loaded model."""

    name: str
    device: str

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, with no special tokens added."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids` without special tokens."""

    def render_chat(self, messages: list[Message]) -> str:
        """Return `messages` in the chat template, ready for the assistant's turn."""

    def eos_token_ids(self) -> list[int]:
        """Return the ids that end generation, sorted."""

    def generate(self, ids: list[int], *, max_new_tokens: int) -> Generation:
        """Continue `ids` greedily."""


class Scorer(Protocol):
    """What a comparison needs of a loaded model."""

    def logits(self, ids: list[int], *, last: int) -> Any:
        """Return the float32 logits at the last `last` positions of `ids`, shape (last, vocabulary)."""


class OpenvinoGenai:
    """openvino-genai on a device; with `npu` it runs the NPU's static-shape pipeline, compiled for the CPU."""

    name = "openvino-genai"

    def __init__(self, directory: Path, *, device: str, npu: Npu | None = None, precision: Precision = "f32") -> None:
        import openvino_genai

        options: dict[str, Any] = dict(F32) if precision == "f32" else {}
        self.device = device
        if npu:
            self.device = "CPU (NPU static pipeline)"
            options |= {
                "NPUW_DEVICES": "CPU",
                "NPU_USE_NPUW": "YES",
                "NPUW_ONLINE_PIPELINE": "NONE",
                "MAX_PROMPT_LEN": npu.max_prompt_len,
                "MIN_RESPONSE_LEN": npu.min_response_len,
            }
        else:
            options |= pipeline_options(directory)
        self._pipeline = openvino_genai.LLMPipeline(directory, "NPU" if npu else device, **options)
        self._tokenizer = self._pipeline.get_tokenizer()

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).input_ids.data[0]
        return [int(token) for token in ids]

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))

    def render_chat(self, messages: list[Message]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    def eos_token_ids(self) -> list[int]:
        return sorted(self._pipeline.get_generation_config().stop_token_ids)

    def generate(self, ids: list[int], *, max_new_tokens: int) -> Generation:
        import numpy as np
        import openvino
        import openvino_genai

        config = self._pipeline.get_generation_config()
        config.max_new_tokens, config.do_sample = max_new_tokens, False
        prompt = np.array([ids], dtype=np.int64)
        result = self._pipeline.generate(
            openvino_genai.TokenizedInputs(openvino.Tensor(prompt), openvino.Tensor(np.ones_like(prompt))), config
        )
        return Generation(
            ids=list(result.tokens[0]),
            stopped=result.finish_reasons[0] == openvino_genai.GenerationFinishReason.STOP,
            time_to_first_token=result.perf_metrics.get_ttft().mean / 1000,
            time_per_token=result.perf_metrics.get_tpot().mean / 1000,
        )


class OpenvinoLogits:
    """The logits of an IR, which openvino-genai does not return; its NPU pipeline computes the same."""

    def __init__(self, directory: Path, *, device: str, precision: Precision = "f32") -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(directory / "openvino_model.xml")
        _keep_last(model)
        options = F32 if precision == "f32" else {}
        self._request = core.compile_model(model, device, options).create_infer_request()
        self._at_once = is_longrope(read_json(directory / "config.json"))

    def logits(self, ids: list[int], *, last: int) -> Any:
        import numpy as np

        self._request.reset_state()
        for start, end in _pieces(len(ids), last=last, at_once=self._at_once):
            result = self._request.infer(model_inputs(ids[:end], start=start) | {"last": np.array([-last])})
        return np.array(result["logits"][0], dtype=np.float32)


def _pieces(tokens: int, *, last: int, at_once: bool) -> list[tuple[int, int]]:
    # The starts and ends of the pieces in which a text is read, of which the last has the text's `last` tokens. With
    # LongRoPE the keys of a piece depend on the length of the text so far, so all of it is read at once.
    piece = tokens if at_once else piece_size(tokens)
    ends = [*range(piece, tokens - last, piece), tokens]
    return list(zip([0, *ends], ends, strict=False))


def piece_size(tokens: int) -> int:
    """Return how many of `tokens` a model should read at a time: at most PIECE, and so that its cache wastes no memory.

    When its cache of keys and values is full, OpenVINO's CPU plugin makes one of twice the length. With pieces of equal
    size the caches have room for 2, 6, 14, 30... pieces. With one of these numbers of pieces the last cache is just as
    long as the text.
    """
    pieces = 1
    while -(-tokens // pieces) > PIECE:
        pieces = 2 * pieces + 2 if pieces > 1 else 2
    return -(-tokens // pieces)


def _keep_last(model: Any) -> None:
    # Give the head the hidden states of the last positions only, since the logits of a prompt of thousands of tokens
    # take gigabytes. The new input `last` is minus the number of these positions.
    import numpy as np
    from openvino import Type, opset15

    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    last = opset15.parameter([1], Type.i64, name="last")
    last.output(0).set_names({"last"})
    end, step, axis = (np.array([value]) for value in (np.iinfo(np.int64).max, 1, 1))
    node.input(0).replace_source_output(opset15.slice(node.input_value(0), last, end, step, axis).output(0))
    model.add_parameters([last])
    model.validate_nodes_and_infer_types()


class OnnxGenai:
    """onnxruntime-genai on the CPU provider, whatever provider the model was built for.

    It computes in float32 with either `precision`. With "f32", which is for judging, it takes less memory: it has no
    arena, and a model for CPUs maps weights that ONNX Runtime packed for this processor from a file. The results are
    the same.
    `at_once` says how `logits` reads a text: at once, which LongRoPE needs, or in pieces, which needs less memory.
    """

    name = "onnxruntime-genai"
    device = "CPUExecutionProvider"

    def __init__(self, directory: Path, *, precision: Precision = "f32", at_once: bool = True) -> None:
        import onnxruntime_genai

        self._at_once = at_once
        config = onnxruntime_genai.Config(str(directory))
        config.clear_providers()
        if precision == "f32":
            _overlay(config, {"session_options": {"enable_cpu_mem_arena": False}})
        decoder = read_json(directory / "genai_config.json")["model"]["decoder"]
        # ONNX Runtime 1.31.1 packs float16 models wrongly. Windows cannot delete a file that is mapped.
        if precision == "f32" and not decoder["session_options"]["provider_options"] and sys.platform != "win32":
            with tempfile.TemporaryDirectory(prefix=".packed-", dir=directory.parent) as packed:
                model = _pack(directory / "model.onnx", Path(packed))
                _overlay(config, {"filename": os.path.relpath(model, directory)})  # onnxruntime-genai joins the two
                self._model = onnxruntime_genai.Model(config)
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
        for start, end in _pieces(len(ids), last=last, at_once=self._at_once):
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
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return target / model.name


class Transformers:
    """What the two runtimes with transformers' interface share."""

    model: Any

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def render_chat(self, messages: list[Message]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def eos_token_ids(self) -> list[int]:
        eos = self.model.generation_config.eos_token_id
        return [eos] if isinstance(eos, int) else sorted(eos or [])

    def generate(self, ids: list[int], *, max_new_tokens: int) -> Generation:
        import torch

        times = [time.perf_counter()]

        class Clock:
            def put(self, value: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None: ...

        prompt = torch.tensor([ids], device=self.model.device)
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=Clock(),
        )
        generated = [int(token) for token in output[0, len(ids) :]]
        started, first = times[0], times[2]  # the streamer is first given the prompt
        return Generation(
            ids=generated,
            stopped=bool(generated) and generated[-1] in self.eos_token_ids(),
            time_to_first_token=first - started,
            time_per_token=(times[-1] - first) / max(len(generated) - 1, 1),
        )

    def logits(self, ids: list[int], *, last: int) -> Any:
        import numpy as np
        import torch

        prompt = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode():
            output = self.model(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                position_ids=torch.arange(len(ids), device=prompt.device)[None],
                logits_to_keep=last,
            )
        return np.asarray(output.logits[0, -last:].float().cpu(), dtype=np.float32)


class OptimumIntel(Transformers):
    """The tutorial's route to an IR: OVModelForCausalLM with a latency configuration."""

    name = "optimum-intel"

    def __init__(self, directory: Path, *, device: str) -> None:
        from optimum.intel import OVModelForCausalLM

        super().__init__(directory)
        self.device = device
        self.model = OVModelForCausalLM.from_pretrained(
            str(directory), export=False, device=device, ov_config=LATENCY | F32, local_files_only=True
        )

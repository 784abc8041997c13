"""IRs in openvino-genai, in OpenVINO itself for their logits, and in optimum-intel."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.common.checkpoint import read_json
from pipeline.common.context import ORIGINAL, limits, pipeline_options
from pipeline.common.params import Npu
from pipeline.common.progress import Bar
from pipeline.run.interface import Generation, Message, Precision
from pipeline.run.pieces import pieces
from pipeline.run.transformers import Transformers

# By default OpenVINO's CPU plugin computes in bfloat16 where the CPU has it, keeps the KV cache in 8 bits, and
# quantizes the activations that meet compressed weights. A 16-bit cache costs the FP16 IR no measurable accuracy.
# https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html
F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
# The settings of the usual OpenVINO tutorial for a single user on a laptop.
LATENCY = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "CACHE_DIR": ""}
# The NPU's static pipeline, compiled for the CPU. With folding, which shares what layers have in common and has nothing
# to do in a pipeline of one part, the CPU's plugin unpacks all INT4 weights: 22.7 GB for Phi-3-mini's size.
STATIC_ON_CPU = {"NPUW_DEVICES": "CPU", "NPU_USE_NPUW": "YES", "NPUW_ONLINE_PIPELINE": "NONE", "NPUW_FOLD": "NO"}
BATCH, BATCH_TOKENS = 32, 4096  # prompts that are answered at a time, and the tokens that the KV cache has room for
BLOCK = 32  # tokens in a block of the KV cache on a CPU


class LoadedPipeline:
    """A pipeline of openvino-genai that is loaded already, on `device`."""

    name = "openvino-genai"

    def __init__(self, pipeline: Any, *, device: str) -> None:
        self.device = device
        self._pipeline, self._tokenizer = pipeline, pipeline.get_tokenizer()

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


class OpenvinoGenai(LoadedPipeline):
    """openvino-genai on a device; with `npu` it runs the NPU's static-shape pipeline, compiled for the CPU."""

    def __init__(self, directory: Path, *, device: str, npu: Npu | None = None, precision: Precision = "f32") -> None:
        import openvino_genai

        options: dict[str, Any] = dict(F32) if precision == "f32" else {}
        if npu:
            options |= STATIC_ON_CPU
            options |= {"MAX_PROMPT_LEN": npu.max_prompt_len, "MIN_RESPONSE_LEN": npu.min_response_len}
        else:
            options |= pipeline_options(directory)
        pipeline = openvino_genai.LLMPipeline(directory, "NPU" if npu else device, **options)
        super().__init__(pipeline, device="CPU (NPU static pipeline)" if npu else device)


def answer_together(directory: Path, prompts: Sequence[list[int]], *, max_new_tokens: Sequence[int]) -> list[list[int]]:
    """Return the ids with which the IR in `directory` continues each of `prompts` greedily, in float32 on the CPU.

    An answer ends with an eos id, or when it has as many tokens as `max_new_tokens` says for its prompt. Each pass
    through the model reads the weights once for BATCH prompts (continuous batching: Yu et al., Orca, OSDI 2022).

    With LongRoPE no prompt and its answer may be longer than the original limit, because the IR would then use the
    factors for long texts for all prompts that it reads at the same time.
    """
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.enable_prefix_caching = BATCH, False
    longest = max(len(prompt) + most for prompt, most in zip(prompts, max_new_tokens, strict=True))
    scheduler.num_kv_blocks = -(-max(BATCH_TOKENS, longest) // BLOCK) + BATCH
    # Prompts are read at once, so that one with LongRoPE is read as the source reads it (see pipeline_options).
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, *map(len, prompts))
    pipeline = openvino_genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", F32)
    handles = []
    for index, (prompt, most) in enumerate(zip(prompts, max_new_tokens, strict=True)):
        config = pipeline.get_config()
        config.max_new_tokens, config.do_sample = most, False
        handles.append(pipeline.add_request(index, openvino.Tensor(np.array([prompt], dtype=np.int64)), config))
    with Bar(desc="answering prompts", total=len(prompts)) as bar:
        while pipeline.has_non_finished_requests():
            pipeline.step()
            ended = sum(handle.get_status() == openvino_genai.GenerationStatus.FINISHED for handle in handles)
            bar.update(ended - bar.n)
    return [list(handle.read_all()[0].generated_ids) for handle in handles]


class OpenvinoLogits:
    """The logits of an IR, which openvino-genai does not return; its NPU pipeline computes the same."""

    def __init__(self, directory: Path, *, device: str, precision: Precision = "f32") -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(directory / "openvino_model.xml")
        _keep_last(model)
        options = F32 if precision == "f32" else {}
        self._request = core.compile_model(model, device, options).create_infer_request()
        self._original = limits(read_json(directory / "config.json"), directml=False).get(ORIGINAL)

    def logits(self, ids: list[int], *, last: int) -> Any:
        import numpy as np

        self._request.reset_state()
        for start, end in pieces(len(ids), last=last, original=self._original):
            result = self._request.infer(model_inputs(ids[:end], start=start) | {"last": np.array([-last])})
        return np.array(result["logits"][0], dtype=np.float32)


class StaticLogits:
    """The logits of an IR in the NPU's static pipeline, which returns those of the last position alone.

    `compiled` is what `pipeline.run.blobs.compile_chosen` returns.
    """

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()

    def logits(self, ids: list[int], *, last: int) -> Any:
        import numpy as np

        self._request.reset_state()
        rows, start = [], 0
        for end in range(len(ids) - last + 1, len(ids) + 1):  # a prompt, then one token at a time
            rows.append(np.array(self._request.infer(model_inputs(ids[:end], start=start))["logits"][0, -1]))
            start = end
        return np.array(rows, dtype=np.float32)


def model_inputs(ids: list[int], *, start: int = 0) -> dict[str, Any]:
    """Return the inputs for one sequence from position `start` on; the model's state holds the part before it.

    The arrays have shape (1, len(ids) - start), except `attention_mask`, (1, len(ids)), and `beam_idx`, (1,).
    """
    import numpy as np

    tokens = np.array([ids], dtype=np.int64)
    return {
        "input_ids": tokens[:, start:],
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.arange(start, len(ids), dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }


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

"""Published IRs have what OpenVINO Model Server loads, and openvino-genai takes its calls on them.

Its files: docs/llm/reference.md; its options: src/cli_parser.cpp and src/graph_export/graph_cli_parser.cpp; its calls:
src/llm/language_model, all in https://github.com/openvinotoolkit/model_server/tree/v2026.3
"""

import re

import openvino_genai
import pytest

from pipeline.run.openvino import STATIC_ON_CPU
from tests.helpers import ANSWER, QUESTION, ROOT

SECTION = (ROOT / "docs/programs.md").read_text("utf-8").split("## OpenVINO Model Server")[1].split("\n## ")[0]
SERVER = {"model_path", "model_name", "rest_port", "target_device", "task", "source_model", "model_repository_path"}
TASK = {"max_prompt_len", "enable_prefix_caching", "max_num_batched_tokens"}
OTHERS = {"rm", "device", "group-add", "to"}  # of docker and phi3
FILES = {f"openvino_{part}.{kind}" for part in ("model", "tokenizer", "detokenizer") for kind in ("bin", "xml")}
FILES |= {"chat_template.jinja", "config.json", "generation_config.json", "tokenizer_config.json"}


def test_the_options_exist():
    """The documented commands have no option that the server does not know."""
    assert set(re.findall(r"--([a-z][\w-]+)", SECTION)) == SERVER | TASK | OTHERS


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["openvino-fp16", "openvino-int4"])
def test_continuous_batching(released, variant):
    """A release of a CPU and GPU variant has the server's files, and answers in the pipeline that the server makes."""
    directory = released(variant)
    assert {path.name for path in directory.iterdir()} >= FILES
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens, scheduler.max_num_seqs, scheduler.cache_size = 256, 256, 0
    scheduler.dynamic_split_fuse = scheduler.enable_prefix_caching = True
    streams = {"NUM_STREAMS": 2, "PERFORMANCE_HINT": "THROUGHPUT"}  # of the tokenizer
    pipeline = openvino_genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", {}, streams)
    tokenizer = pipeline.get_tokenizer()
    tokenizer.set_chat_template((directory / "chat_template.jinja").read_text("utf-8"))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    config = openvino_genai.GenerationConfig(directory / "generation_config.json")
    config.max_new_tokens, config.apply_chat_template = 64, False
    (result,) = pipeline.generate([prompt], [config])
    assert result.m_generation_ids == [ANSWER]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["npu-int4-channelwise", "npu-int4-group128"])
def test_the_stateful_pipeline(released, variant):
    """A release of an NPU variant has the server's files, and the pipeline that the server makes for an NPU answers.

    The pipeline runs with the NPU's static shapes, on the CPU.
    """
    directory = released(variant)
    assert {path.name for path in directory.iterdir()} >= FILES
    options = STATIC_ON_CPU | {"MAX_PROMPT_LEN": 256, "ATTENTION_BACKEND": "SDPA"}
    pipeline = openvino_genai.LLMPipeline(directory, "NPU", **options)
    assert "Tokyo" in pipeline.generate(QUESTION, max_new_tokens=64)

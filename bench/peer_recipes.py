"""How other tools make INT4 models of a Phi-3 checkpoint, by the commands of their own documentation."""

from dataclasses import dataclass
from typing import Any

OPTIMUM = "optimum-cli export openvino --model {checkpoint} --task text-generation-with-past --weight-format int4"
ADJUST = "--group-size-fallback adjust"  # without it a width of 576 is an error
TUTORIAL = f"{OPTIMUM} --group-size 128 --ratio 0.6 --sym {ADJUST}"
CHANNELS = f"{OPTIMUM} --sym --group-size -1 --ratio 1.0"
BUILDER = "python -m onnxruntime_genai.models.builder -i {checkpoint} -o {target} -c {target}-cache -p int4"
OLIVE = "olive run --disable_telemetry --config {config}"
GUIDE = "OpenVINO's guide to NPUs"
COOKBOOK = "Microsoft's PhiCookBook"


@dataclass(frozen=True)
class Recipe:
    """How a tool makes a model: its command, with `{checkpoint}`, `{target}` and for Olive `{config}` to fill in.

    `environment` is the file of pins in bench/peers/, or None for the project's own. `loads_in` names a runtime that is
    not on this machine.
    """

    tool: str
    label: str
    command: str
    source: str
    environment: str | None = None
    passes: dict[str, Any] | None = None
    provider: tuple[str, str] = ("cpu", "CPUExecutionProvider")
    loads_in: str | None = None


def olive(
    label: str, source: str, passes: dict[str, Any], provider: tuple[str, str], loads_in: str | None = None
) -> Recipe:
    """Return a recipe of Olive with these passes."""
    return Recipe("Olive", label, OLIVE, source, "olive", passes, provider, loads_in)


def openvino_passes(device: str, **options: Any) -> dict[str, Any]:
    """Return the three passes by which Olive makes an IR for `device`, wrapped in an ONNX model."""
    return {
        "convert": {
            "type": "OpenVINOOptimumConversion",
            "extra_args": {"device": device, "task": "text-generation-with-past"},
            "ov_quant_config": {"weight_format": "int4", "ratio": 1} | options,
        },
        "update": {"type": "OpenVINOIoUpdate", "static": False, "reuse_cache": True},
        "wrap": {
            "type": "OpenVINOEncapsulation",
            "target_device": device,
            "keep_ov_dynamic_dims": True,
            "ov_version": "2025.1",
            "reuse_cache": True,
        },
    }


BUILD = {"type": "ModelBuilder", "precision": "int4"}
MIXED = {
    "choose": {"type": "SelectiveMixedPrecision", "algorithm": "k_quant_down"},
    "quantize": {"type": "Gptq", "bits": 4, "sym": False, "group_size": 32, "lm_head": True, "data_config": "answers"},
    "build": BUILD,
}
WRAPPED = "ONNX Runtime GenAI with the OpenVINO provider, which is not on this machine; the IR inside was measured"
# For each target this project's variants, and what other tools make for it.
TARGETS: dict[str, tuple[list[str], list[Recipe]]] = {
    "OpenVINO IR for CPU and GPU": (
        ["openvino-int4"],
        [
            Recipe("optimum-cli", "its defaults for INT4", f"{OPTIMUM} {{target}}", "optimum-intel's documentation"),
            Recipe(
                "optimum-cli",
                "group 128, ratio 0.6, symmetric",
                f"{TUTORIAL} {{target}}",
                COOKBOOK,
            ),
            Recipe(
                "optimum-cli",
                "the same, AWQ without data",
                f"{TUTORIAL} --awq {{target}}",
                "its --help",
            ),
            Recipe(
                "optimum-cli",
                "the same, AWQ and scale estimation on the model's own texts",
                f"{TUTORIAL} --awq --scale-estimation --dataset auto {{target}}",
                "its --help",
            ),
            olive(
                "group 64, ratio 1, asymmetric",
                "olive-recipes, microsoft-Phi-3-mini-4k-instruct/aitk/phi3_ov_config.json",
                openvino_passes("gpu", group_size=64),
                ("gpu", "OpenVINOExecutionProvider"),
                WRAPPED,
            ),
        ],
    ),
    "OpenVINO IR for NPUs": (
        ["npu-int4-channelwise", "npu-int4-group128"],
        [
            Recipe("optimum-cli", "channel-wise", f"{CHANNELS} {{target}}", GUIDE),
            Recipe(
                "optimum-cli",
                "channel-wise, AWQ and scale estimation on wikitext2",
                f"{CHANNELS} --awq --scale-estimation --dataset wikitext2 {{target}}",
                GUIDE,
                "olive",  # which has the same optimum-intel, and `datasets`
            ),
            Recipe(
                "optimum-cli",
                "channel-wise, AWQ and scale estimation on the model's own texts",
                f"{CHANNELS} --awq --scale-estimation --dataset auto {{target}}",
                "its --help",
            ),
            Recipe(
                "optimum-cli",
                "group 128",
                f"{OPTIMUM} --sym --group-size 128 --ratio 1.0 {ADJUST} {{target}}",
                GUIDE,
            ),
            olive(
                "group 128 on wikitext2",
                "olive-recipes, microsoft-Phi-3-mini-4k-instruct/aitk/phi3_ov_npu_config.json",
                openvino_passes(
                    "npu",
                    group_size=128,
                    dataset="wikitext2",
                    awq=False,
                    scale_estimation=False,
                    sym=True,
                    trust_remote_code=True,
                    backup_precision="int8_asym",
                    sensitivity_metric="weight_quantization_error",
                ),
                ("npu", "OpenVINOExecutionProvider"),
                WRAPPED,
            ),
        ],
    ),
    "ONNX Runtime on the CPU": (
        ["onnx-cpu-int4"],
        [
            Recipe("onnxruntime-genai's builder", "its defaults", f"{BUILDER} -e cpu", "its README"),
            Recipe(
                "onnxruntime-genai's builder",
                "k_quant_mixed",
                f"{BUILDER} -e cpu --extra_options algo_config=k_quant_mixed",
                "its --help",
            ),
            Recipe(
                "Olive",
                "GPTQ on wikitext2",
                "olive optimize --disable_telemetry --model_name_or_path {checkpoint} --device cpu"
                " --provider CPUExecutionProvider --precision int4 --output_path {target}",
                "Olive's page on `olive optimize`",
                "olive",
            ),
            olive(
                "k_quant_down and GPTQ, on this project's calibration answers in place of wikitext2",
                "olive-recipes, microsoft-Phi-3.5-mini-instruct/olive/mixed.json",
                MIXED,
                ("cpu", "CPUExecutionProvider"),
            ),
            Recipe(
                "winml-cli",
                "for onnxruntime-genai",
                "winml build -m {checkpoint} -o {target} --export-type optimized",
                "winml-cli's page on `winml build`",
                "winml-cli",
            ),
        ],
    ),
    "ONNX Runtime with DirectML": (
        ["onnx-directml-int4"],
        [
            Recipe("onnxruntime-genai's builder", "its defaults", f"{BUILDER} -e dml", "its README"),
            olive(
                "model builder",
                "olive-recipes, microsoft-Phi-3.5-mini-instruct/aitk/phi3_5_dml_config.json",
                {"build": BUILD},
                ("gpu", "DmlExecutionProvider"),
            ),
        ],
    ),
}

"""Stage build_onnx."""

from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.common.params import OnnxInt4, load_params
from pipeline.convert import onnx_format, onnx_genai
from pipeline.convert.calibration import open_calibration
from pipeline.convert.variant import building_variant
from pipeline.process import stage_command


@stage_command
def main(model: str, variant: str) -> None:
    """Build the INT4 ONNX Runtime GenAI model VARIANT from the source checkpoint of MODEL."""
    params = load_params()
    recipe = params.get_variant(variant)
    if not isinstance(recipe, OnnxInt4):
        raise PipelineError(f"variants.{variant} is made by the stage {recipe.stage}, not by this one.")
    calibration = open_calibration(model, recipe)
    with building_variant(params, model=model, name=variant, read_matrices=onnx_format.read_matrices) as build:
        onnx_genai.build_int4(
            paths.source(model),
            build,
            recipe=recipe,
            trust_remote_code=params.get_model(model).source.trust_remote_code,
            calibration=calibration,
        )


if __name__ == "__main__":
    main()

"""Stage quantize_openvino."""

from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.common.params import OpenvinoInt4, load_params
from pipeline.convert import openvino, openvino_format
from pipeline.convert.calibration import open_calibration
from pipeline.convert.variant import building_variant
from pipeline.process import stage_command


@stage_command
def main(model: str, variant: str) -> None:
    """Quantize the FP16 IR of MODEL to the INT4 recipe of VARIANT."""
    params = load_params()
    recipe = params.get_variant(variant)
    if not isinstance(recipe, OpenvinoInt4):
        raise PipelineError(f"variants.{variant} is made by the stage {recipe.stage}, not by this one.")
    calibration = open_calibration(model, recipe)
    with building_variant(params, model=model, name=variant, read_matrices=openvino_format.read_matrices) as build:
        openvino.build_int4(
            paths.source(model),
            paths.fp16(model),
            build,
            recipe=recipe,
            adjust_group_size=params.get_model(model).group_size_fallback == "adjust",
            trust_remote_code=params.get_model(model).source.trust_remote_code,
            calibration=calibration,
        )


if __name__ == "__main__":
    main()

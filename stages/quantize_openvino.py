"""Stage quantize_openvino."""

from pipeline import openvino, paths
from pipeline.artifact import building_variant
from pipeline.calibration import Calibration
from pipeline.errors import PipelineError
from pipeline.params import OpenvinoInt4, load_params
from pipeline.process import stage_command

FP16 = "openvino-fp16"


@stage_command
def main(model: str, variant: str) -> None:
    """Quantize the FP16 IR of MODEL to the INT4 recipe of VARIANT."""
    params = load_params()
    recipe = params.get_variant(variant)
    if not isinstance(recipe, OpenvinoInt4):
        raise PipelineError(f"variants.{variant} is made by the stage {recipe.stage}, not by this one.")
    calibration = Calibration(paths.calibration(model), paths.source(model)) if recipe.calibrated else None
    with building_variant(params, model=model, name=variant, read_matrices=openvino.read_matrices) as build:
        openvino.quantize_int4(
            paths.variant(model, FP16),
            build,
            recipe=recipe,
            adjust_group_size=params.get_model(model).group_size_fallback == "adjust",
            calibration=calibration,
        )


if __name__ == "__main__":
    main()

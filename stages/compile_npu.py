"""Stage compile_npu."""

from pipeline.common.errors import PipelineError
from pipeline.common.params import OpenvinoInt4, load_params
from pipeline.convert.npu.build import build_blob
from pipeline.process import stage_command


@stage_command
def main(model: str, variant: str, platform: str) -> None:
    """Compile VARIANT of MODEL for the NPUs of PLATFORM."""
    recipe = load_params().get_variant(variant)
    if not isinstance(recipe, OpenvinoInt4) or not recipe.npu:
        raise PipelineError(f"variants.{variant} has no npu block: it is not for the NPU.")
    build_blob(model, variant, platform, params=recipe.npu)


if __name__ == "__main__":
    main()

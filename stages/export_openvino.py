"""Stage export_openvino."""

from pipeline.common import paths
from pipeline.common.params import load_params
from pipeline.convert import openvino, openvino_format
from pipeline.convert.variant import building_variant
from pipeline.process import stage_command


@stage_command
def main(model: str, variant: str) -> None:
    """Export the source checkpoint of MODEL to the FP16 IR."""
    params = load_params()
    source = params.get_model(model).source
    with building_variant(params, model=model, name=variant, read_matrices=openvino_format.read_matrices) as build:
        openvino.export_fp16(paths.source(model), build, trust_remote_code=source.trust_remote_code)


if __name__ == "__main__":
    main()

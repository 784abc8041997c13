"""Stage calibrate."""

from pipeline.common import paths
from pipeline.common.params import load_params
from pipeline.common.progress import say
from pipeline.convert.hessians import hessians, make_calibration, write_calibration
from pipeline.process import stage_command
from pipeline.run.prompts import load_prompts
from pipeline.run.source_model import Torch


@stage_command
def main(model: str) -> None:
    """Record H = X'X of the source model's matrices of MODEL on calibration answers, which its FP16 IR writes.

    When no variant uses calibration, the model is not asked.
    """
    params, target = load_params(), paths.calibration(model)
    if not any(variant.calibrated for variant in params.variants.values()):
        say("no variant is calibrated: the model is not asked")
        write_calibration(target, answers=[], layers=())
        return
    source = Torch(paths.source(model), trust_remote_code=params.get_model(model).source.trust_remote_code)
    answers = make_calibration(
        source,
        paths.fp16(model),
        load_prompts("calibration"),
        max_new_tokens=params.calibrate.max_new_tokens,
    )
    write_calibration(target, answers=answers, layers=hessians(source, answers))


if __name__ == "__main__":
    main()

"""Stage calibrate."""

import json

from pipeline import paths
from pipeline.calibration import make_calibration
from pipeline.manifest import replace_file
from pipeline.params import OpenvinoInt4, load_params
from pipeline.process import stage_command
from pipeline.progress import say
from pipeline.prompts import load_prompts
from pipeline.source_model import Torch


@stage_command
def main(model: str) -> None:
    """Let the source checkpoint of MODEL answer the calibration prompts, unless no variant is calibrated."""
    params = load_params()
    if not any(isinstance(variant, OpenvinoInt4) and variant.calibrated for variant in params.variants.values()):
        say("no variant is calibrated: the model is not asked")
        replace_file(paths.calibration(model), "[]")
        return
    sequences = make_calibration(
        Torch(paths.source(model), trust_remote_code=params.get_model(model).source.trust_remote_code),
        load_prompts("calibration"),
        max_new_tokens=params.calibrate.max_new_tokens,
    )
    replace_file(paths.calibration(model), json.dumps(sequences))


if __name__ == "__main__":
    main()

"""Stage validate."""

import json

from pipeline.check.fidelity import read_distributions
from pipeline.check.reference import read_reference
from pipeline.check.validation import validate
from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.common.files import replace_file
from pipeline.common.params import load_params
from pipeline.process import stage_command


@stage_command
def main(model: str, variant: str) -> None:
    """Validate VARIANT of MODEL: load it, let it answer, and compare it with the source model."""
    params = load_params()
    metrics, evidence, measured = validate(
        paths.variant(model, variant),
        variant=params.get_variant(variant),
        model=params.get_model(model),
        source=paths.source(model),
        reference=read_reference(paths.reference(model)),
        distributions=read_distributions(paths.distributions(model)),
        params=params.validate_,
    )
    replace_file(paths.validation(model, variant), json.dumps(evidence, indent=2, ensure_ascii=False))
    replace_file(paths.metrics(model, variant), json.dumps(metrics, indent=2))
    replace_file(paths.measured(model, variant), json.dumps(measured, indent=2))
    if evidence["failures"]:
        raise PipelineError("\n  ".join(evidence["failures"]))


if __name__ == "__main__":
    main()

"""Stage validate."""

import json

from pipeline import paths
from pipeline.errors import PipelineError
from pipeline.fidelity import read_distributions
from pipeline.manifest import replace_file
from pipeline.params import load_params
from pipeline.process import stage_command
from pipeline.reference import read_reference
from pipeline.validation import validate


@stage_command
def main(model: str, variant: str) -> None:
    """Validate VARIANT of MODEL: load it, let it answer, and compare it with the source model."""
    params = load_params()
    metrics, evidence, measured = validate(
        paths.variant(model, variant),
        variant=params.get_variant(variant),
        model=params.get_model(model),
        limits=params.limits[variant],
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

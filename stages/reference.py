"""Stage reference."""

import numpy as np

from pipeline.check.fidelity import write_distributions
from pipeline.check.recording import record
from pipeline.common import paths
from pipeline.common.checkpoint import read_json
from pipeline.common.context import limits
from pipeline.common.files import replace_file
from pipeline.common.manifest import read_manifest
from pipeline.common.params import load_params
from pipeline.common.progress import say
from pipeline.process import stage_command
from pipeline.run.source_model import Torch


@stage_command
def main(model: str) -> None:
    """Record the answers of the source checkpoint of MODEL, and its probabilities for the alternatives."""
    params, source = load_params(), paths.source(model)
    reference, found = record(
        Torch(source, trust_remote_code=params.get_model(model).source.trust_remote_code),
        paths.fp16(model),
        params=params,
        limits=limits(read_json(source / "config.json"), directml=False),
        eos_token_ids=read_manifest(source).eos_token_ids,
    )
    tail = float(np.exp(found.log_probs[:, -1]).mean())
    say(f"{len(found.ids)} tokens; {tail:.1e} of the probability is beyond the tokens kept for each")
    write_distributions(paths.distributions(model), found)
    replace_file(paths.reference(model), reference.model_dump_json(indent=2))


if __name__ == "__main__":
    main()

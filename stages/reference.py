"""Stage reference."""

from typing import Any

import numpy as np

from pipeline.check.fidelity import Distributions, concatenate, distributions, write_distributions
from pipeline.check.long_context import record
from pipeline.check.reference import answer_questions, make_reference
from pipeline.common import paths
from pipeline.common.checkpoint import read_json
from pipeline.common.context import limits
from pipeline.common.manifest import read_manifest, replace_file
from pipeline.common.params import load_params
from pipeline.common.progress import say
from pipeline.process import stage_command
from pipeline.run.source_model import Torch


@stage_command
def main(model: str) -> None:
    """Record the answers of the source checkpoint of MODEL, and its probabilities for the alternatives."""
    params = load_params()
    kept: dict[int, Distributions] = {}

    def keep(index: int, logits: Any) -> None:
        kept[index] = distributions(logits)

    source = Torch(paths.source(model), trust_remote_code=params.get_model(model).source.trust_remote_code)
    answers, near_ties = answer_questions(source, params=params)
    long_context, ends = record(source, limits(read_json(paths.source(model) / "config.json"), directml=False))
    reference = make_reference(
        source,
        params=params,
        answers=answers,
        near_ties=near_ties,
        long_context=long_context,
        eos_token_ids=read_manifest(paths.source(model)).eos_token_ids,
        on_logits=keep,
    )
    found = concatenate([*(kept[index] for index in range(len(kept))), ends])
    tail = float(np.exp(found.log_probs[:, -1]).mean())
    say(f"{len(found.ids)} tokens; {tail:.1e} of the probability is beyond the tokens kept for each")
    write_distributions(paths.distributions(model), found)
    replace_file(paths.reference(model), reference.model_dump_json(indent=2))


if __name__ == "__main__":
    main()

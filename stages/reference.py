"""Stage reference."""

import click

from pipeline import paths
from pipeline.fidelity import source_distributions, write_distributions
from pipeline.manifest import read_manifest, replace_file
from pipeline.params import load_params
from pipeline.process import stage_command
from pipeline.reference import make_reference
from pipeline.source_model import Torch


@stage_command
def main(model: str) -> None:
    """Record what the source checkpoint of MODEL says, and how probable it finds the alternatives."""
    params = load_params()
    source = Torch(paths.source(model), trust_remote_code=params.get_model(model).source.trust_remote_code)
    reference = make_reference(
        source, params=params, eos_token_ids=read_manifest(paths.source(model)).eos_token_ids, progress=click.echo
    )
    distributions, tail = source_distributions(source, reference.continuations, progress=click.echo)
    click.echo(f"{len(distributions.ids)} tokens; {tail:.1e} of the probability is beyond the tokens kept for each")
    write_distributions(paths.distributions(model), distributions)
    replace_file(paths.reference(model), reference.model_dump_json(indent=2))


if __name__ == "__main__":
    main()

"""Stage reference."""

import click

from pipeline import paths
from pipeline.manifest import read_manifest, replace_file
from pipeline.params import load_params
from pipeline.process import stage_command
from pipeline.reference import make_reference
from pipeline.runtimes import Torch


@stage_command
def main(model: str) -> None:
    """Record what the source checkpoint of MODEL says."""
    params = load_params()
    source = paths.source(model)
    reference = make_reference(
        Torch(source, trust_remote_code=params.get_model(model).source.trust_remote_code),
        prompts=params.validate_.prompts,
        max_new_tokens=params.validate_.max_new_tokens,
        eos_token_ids=read_manifest(source).eos_token_ids,
        progress=click.echo,
    )
    replace_file(paths.reference(model), reference.model_dump_json(indent=2))


if __name__ == "__main__":
    main()

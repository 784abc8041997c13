"""The `phi3` command; parses, prints and sets exit codes, nothing else."""

import json
from pathlib import Path
from typing import Any

import click

from pipeline.errors import PipelineError
from pipeline.manifest import verify
from pipeline.params import json_schema, load_params
from pipeline.paths import PARAMS_FILE


class _Sentences(click.Group):
    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except PipelineError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Sentences)
@click.version_option(package_name="phi3-pipeline")
def main() -> None:
    """Work with the artifacts of phi3-pipeline. `dvc repro` builds them."""


@main.command("verify")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
def verify_command(directory: Path) -> None:
    """Hash every file of the artifact in DIRECTORY and compare it with the manifest.

    Example: phi3 verify artifacts/smol-phi3/openvino-int4
    """
    manifest = verify(directory)
    total = sum(file.size for file in manifest.files.values())
    click.echo(f"{manifest.name}: {len(manifest.files)} files, {total / 1e6:.1f} MB, all as in the manifest")


@main.command("params")
@click.option("--schema", is_flag=True, help="Print the JSON Schema instead, for editors.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), default=PARAMS_FILE)
def params_command(file: Path, schema: bool) -> None:
    """Check FILE (by default params.yaml) and say what it builds.

    Example: phi3 params
    """
    if schema:
        click.echo(json.dumps(json_schema(), indent=2))
        return
    params = load_params(file)
    click.echo(f"builds {', '.join(params.build)} as {', '.join(params.variants)}")

"""The `phi3` command: this module only parses arguments, prints results and sets exit codes."""

import contextlib
import json
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

import click
from tqdm import tqdm

from pipeline.common.errors import REINSTALL, PipelineError, full_disk, lines
from pipeline.common.files import replace_file
from pipeline.common.params import json_schema, load_params
from pipeline.common.paths import PARAMS_FILE
from pipeline.dvc_yaml import DVC_FILE, render
from pipeline.release.device import TARGETS, Target
from pipeline.release.foundry import INFERENCE_MODEL, registration
from pipeline.release.pull import pull, suggest, verify_any
from pipeline.release.registry import open_registry
from pipeline.release.release import split_name

KEY = click.Path(exists=True, dir_okay=False, path_type=Path)


class _Sentences(click.Group):
    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except PipelineError as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            raise click.ClickException(
                f"{error.name} is not installed: this command needs the build environment, which `make repro` sets up."
            ) from error
        except ImportError as error:
            raise click.ClickException(f"a package does not load ({lines(error)[-1]}): {REINSTALL}.") from error
        except BrokenPipeError:
            raise  # whoever reads the output has enough, and click ends without a word
        except OSError as error:
            sentence = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            raise click.ClickException(full_disk(error) or sentence) from error


@click.group(cls=_Sentences)
@click.version_option(package_name="phi3-pipeline")
def main() -> None:
    """Work with the artifacts of phi3-pipeline. `dvc repro` builds them."""
    # A pipe on Windows takes the characters of one code page only, and a model may answer with others.
    cast(TextIOWrapper, sys.stdout).reconfigure(errors="replace")


@main.command("verify")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--key", type=KEY, help="Public key (PEM) of whoever must have signed it; for what was pulled.")
def verify_command(directory: Path, key: Path | None) -> None:
    """Hash every file of the built or pulled artifact in DIRECTORY and compare it with the recorded hash.

    Example: phi3 verify artifacts/smol-phi3/openvino-int4
    """
    sealed = verify_any(directory, key=key)
    total = sum(file.size for file in sealed.files.values())
    click.echo(f"{sealed.name}: {len(sealed.files)} files, {total / 1e6:.1f} MB, all as in the manifest")


@main.command("publish")
@click.argument("artifact", metavar="MODEL/VARIANT")
@click.option("--to", "url", required=True, help="The registry: dir:PATH, hf:OWNER[/REPOSITORY] or oci:HOST/NAME.")
@click.option("--version", required=True, help="Three numbers, such as 1.0.0.")
@click.option("--alias", "aliases", multiple=True, default=("latest",), show_default=True, help="Names to move to it.")
@click.option("--key", type=KEY, help="Private EC key (PEM) to sign with.")
def publish_command(artifact: str, url: str, version: str, aliases: tuple[str, ...], key: Path | None) -> None:
    """Publish the validated artifact MODEL/VARIANT. A version never changes; aliases move.

    Without REPOSITORY the command takes OWNER's repository with the usual name for the artifact.

    Example: phi3 publish smol-phi3/openvino-int4 --to dir:/srv/models --version 1.0.0
    """
    from pipeline.release.publish import full_url, publish

    model, variant = split_name(artifact)
    registry = open_registry(full_url(url, model=model, variant=variant))
    release = publish(model, variant, registry=registry, version=version, aliases=aliases, key=key, progress=click.echo)
    size, names = f"{release.size / 1e6:.1f} MB", ", ".join(aliases)
    click.echo(f"published {release.name} {version}, {size}, to {registry.url} as {names}")


@main.command("list")
@click.argument("url")
@click.option("--format", "form", type=click.Choice(["text", "winml"]), default="text", show_default=True)
def list_command(url: str, form: str) -> None:
    """List the artifacts in the registry at URL; with `--format winml` as a model catalogue of Windows ML.

    \b
    Examples: phi3 list dir:/srv/models
              phi3 list hf:someone/Phi-3-mini-4k-instruct-int4-ov --format winml > catalogue.json
    """
    registry = open_registry(url)
    if form == "winml":
        from pipeline.release.winml import catalogue

        click.echo(json.dumps(catalogue(registry), indent=2))
        return
    for entry in registry.entries():
        click.echo(f"{entry.name} {entry.version} {' '.join(entry.aliases)}".strip())


@main.command("pull")
@click.argument("url")
@click.argument("artifact", metavar="[MODEL[/VARIANT][@VERSION]]", default="")
@click.option(
    "--for", "target", type=click.Choice(TARGETS), default="auto", show_default=True, help="The device or program."
)
@click.option("--to", type=click.Path(file_okay=False, path_type=Path), help="By default a directory in the cache.")
@click.option("--key", type=KEY, help="Public key (PEM) of whoever must have signed it.")
def pull_command(url: str, artifact: str, target: Target, to: Path | None, key: Path | None) -> None:
    """Pull an artifact from the registry at URL, verify it, and print its directory.

    Without VARIANT the command takes the variant that suits the device, and without VERSION the latest version.

    \b
    Examples: phi3 pull dir:/srv/models smol-phi3/openvino-int4@1.0.0
              phi3 pull dir:/srv/models phi-3-mini-4k-instruct --for npu
    """
    registry = open_registry(url)
    name, _, version = artifact.partition("@")
    version = version or "latest"
    if "/" not in name:
        name = suggest(registry, name, version=version, target=target, say=_say)
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int, file: str) -> None:
            bar.total, bar.n = total, done
            bar.set_description(file)

        directory = pull(registry, name, version=version, to=to, key=key, progress=progress)
    if not to:  # the Python of the Microsoft Store keeps the cache where other programs find it by this path alone
        directory = directory.resolve()
    if target == "foundry" and (directory / INFERENCE_MODEL).exists():
        _say(f"in Foundry Local: {registration(directory.absolute())}")
    click.echo(directory)


@main.command("chat")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--device", help="OpenVINO's name of a device, such as GPU. By default CPU, or NPU for its variants.")
def chat_command(directory: Path, device: str | None) -> None:
    """Chat with the artifact in DIRECTORY; an empty line or the end of the input ends the chat.

    Example: phi3 chat artifacts/smol-phi3/openvino-int4
    """
    from pipeline.chat import load_chat

    chat = load_chat(directory, device=device)
    _say(f"loaded for {chat.device}")
    with contextlib.suppress(click.Abort):  # the end of the input, or Ctrl-C
        while question := click.prompt("you", default="", show_default=False, prompt_suffix="> ", err=True).strip():
            try:
                remark = chat.ask(question, on_text=lambda text: click.echo(text, nl=False))
            except PipelineError as error:  # about this question alone
                remark = str(error)
            click.echo()
            if remark:
                _say(remark)


@main.command("check")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--device", help="NPU, GPU or CPU; NPU-ON-CPU is the NPU's static pipeline on the CPU.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this file.")
def check_command(directory: Path, device: str | None, file: Path | None) -> None:
    """Compare the pulled artifact in DIRECTORY, on this machine's device, with what its source model says.

    Ends with status 1 when they differ. Without --device it is the device that `phi3 chat` would use.

    Example: phi3 check /tmp/model --device NPU --json npu.json
    """
    from pipeline.device_check import check_device

    result = check_device(directory, device=device)
    if file:
        replace_file(file, json.dumps(result.document(), indent=2))
    click.echo(result.table())
    for failure in result.failures:
        click.echo(failure)
    if result.failures:
        raise click.ClickException("failed: this device does not compute what the source model says")
    click.echo("passed")


def _say(line: str) -> None:
    click.echo(line, err=True)


@main.command("params")
@click.option("--schema", is_flag=True, help="Print the JSON Schema instead, for editors.")
@click.option("--write", is_flag=True, help="Write the lists of dvc.yaml that follow from params.yaml.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), default=PARAMS_FILE)
def params_command(file: Path, schema: bool, write: bool) -> None:
    """Check FILE (by default params.yaml) and the dvc.yaml beside it, and say what they build.

    Example: phi3 params
    """
    if schema:
        click.echo(json.dumps(json_schema(), indent=2))
        return
    params = load_params(file)
    if (dvc_file := file.parent / DVC_FILE).exists():
        content = render(params, root=file.parent)
        if write:
            replace_file(dvc_file, content.rstrip())
        elif content != dvc_file.read_text("utf-8"):
            raise PipelineError(f"{dvc_file} does not fit {file}: run `phi3 params --write`.")
    click.echo(f"builds {', '.join(params.build)} as {', '.join(params.variants)}")


@main.command("build")
@click.option(
    "--scheduler",
    required=True,
    metavar="ADDRESS|local[:N]",
    help="A Dask scheduler's address, or `local` for N worker processes on this machine, by default as many as fit.",
)
@click.argument("targets", nargs=-1)
def build_command(scheduler: str, targets: tuple[str, ...]) -> None:
    """Build what `dvc repro [TARGETS]` builds, cell by cell on the workers of a Dask cluster.

    The workers share results through the DVC remote that .dvc/config names. Anyone who can reach an open scheduler can
    run anything on it and its workers: use tls:// addresses outside this machine.

    \b
    Examples: phi3 build --scheduler local:2
              phi3 build --scheduler tls://build.example.org:8786 quantize_openvino
    """
    try:
        from pipeline.cluster.coordinator import build
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"cluster builds need `{error.name}`: run `pip install '.[cluster]'` in the project's folder."
        ) from error
    build(scheduler, targets, say=click.echo)


@main.command("plan")
@click.argument("models", metavar="[MODEL]...", nargs=-1)
def plan_command(models: tuple[str, ...]) -> None:
    """List what building each MODEL would run, and how much disk, memory and time that takes on this machine.

    Without MODEL it lists this for the models in params.yaml's `build`. Ends with status 1 when the build does not fit.

    Example: phi3 plan phi-3-mini-4k-instruct
    """
    from pipeline.plan import available, largest, plan, remedies, total

    params = load_params()
    cells = [cell for model in models or params.build for cell in plan(model, params=params, progress=_say)]
    width = max(len(str(planned.cell)) for planned in cells)
    click.echo(f"{'':{width}}         disk    memory      time")
    for planned in cells:
        cost = planned.cost
        figures = f"{cost.disk / 1e9:6.2f} GB {cost.memory / 1e9:6.1f} GB {cost.seconds / 60:5.0f} min"
        click.echo(f"{planned.cell!s:{width}}  {'reused' if planned.reused else figures}")
    needed, free = total(cells), available()
    click.echo(f"needed: {needed}\nfree:   {free}")
    for what, cell in largest(cells).items():
        click.echo(f"most {what}: {cell}")
    if short := needed.beyond(free):
        changes = remedies(cells, params=params, free=free)
        advice = f"In params.yaml, {', or '.join(changes)}" if changes else "Use a larger machine"
        raise click.ClickException(f"{short} too little. {advice}.")


@main.command("doctor")
def doctor_command() -> None:
    """Examine this machine and its settings, and print a remedy for each problem.

    Ends with status 1 when there is a problem.

    Example: phi3 doctor
    """
    from pipeline.doctor import examine

    problems = 0
    for finding in examine():
        problems += finding.remedy is not None
        click.echo(f"{'problem' if finding.remedy else 'ok':8}{finding.subject}: {finding.found}")
        if finding.remedy:
            click.echo(f"        remedy: {finding.remedy}")
    if problems:
        raise click.ClickException(f"{problems} problem{'s' * (problems > 1)} found")


if __name__ == "__main__":
    main()

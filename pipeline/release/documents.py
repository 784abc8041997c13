"""The documents that a release has beside the artifact, such as the model card and the provenance."""

import json
import subprocess
from pathlib import Path
from typing import Any

from pipeline.check.excerpt import EXCERPT, make_excerpt
from pipeline.check.fidelity import read_distributions
from pipeline.check.reference import read_reference
from pipeline.check.report import FIGURES, figure
from pipeline.common import paths
from pipeline.common.checkpoint import read_json
from pipeline.common.context import describe
from pipeline.common.errors import PipelineError
from pipeline.common.manifest import HubOrigin, VariantManifest, read_manifest
from pipeline.common.paths import MANIFEST
from pipeline.release.foundry import INFERENCE_MODEL, inference_model, model_id

# The licences that the Hub knows by their SPDX identifier: https://huggingface.co/docs/hub/repositories-licenses
HUB_LICENCES = frozenset(
    """
    afl-3.0 apache-2.0 artistic-2.0 bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
    cdla-sharing-1.0 ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 isc lppl-1.3c mit mpl-2.0 ms-pl ncsa ofl-1.1
    osl-3.0 postgresql unlicense wtfpl zlib
    """.split()  # noqa: SIM905  forty lines with one name each are no easier to read
)
CARD, METRICS, PROVENANCE, SBOM = "README.md", "metrics.json", "provenance.json", "sbom.cdx.json"


def write_documents(directory: Path, *, model: str, variant: str, version: str) -> None:
    """Write the documents of a release into `directory`.

    The same artifact, commit and measurements give the same bytes. Measurements of other machines are not included.

    Raises PipelineError when no git commit has dvc.lock.
    """
    artifact = paths.variant(model, variant)
    manifest = read_manifest(artifact, VariantManifest)
    metrics, measured = read_json(paths.metrics(model, variant)), paths.measured(model, variant)
    machine = read_json(measured) if measured.exists() else {}
    documents = {
        METRICS: metrics | ({"measured": machine} if machine else {}),
        PROVENANCE: provenance(manifest, version=version),
        SBOM: bill_of_materials(manifest, version=version),
    }
    if not manifest.runtime.openvino:
        documents[INFERENCE_MODEL] = inference_model(artifact, name=model_id(model, variant, version))
    for name, content in documents.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8", newline="\n")
    excerpt = make_excerpt(read_reference(paths.reference(model)), read_distributions(paths.distributions(model)))
    (directory / EXCERPT).write_text(excerpt.model_dump_json() + "\n", "utf-8", newline="\n")
    (directory / CARD).write_text(card(manifest, metrics, machine, version=version), "utf-8", newline="\n")


def card(manifest: VariantManifest, metrics: dict[str, Any], measured: dict[str, Any], *, version: str) -> str:
    """Return the model card: the Hub's metadata, the metrics of the variant, and the measurements of one machine.

    It names no library, because the Hub knows neither openvino nor onnxruntime-genai; it then counts downloads by
    `config.json`.

    Metadata: https://huggingface.co/docs/hub/model-cards#model-card-metadata
    """
    from huggingface_hub import ModelCardData

    licence = manifest.license.lower()
    known = licence in HUB_LICENCES
    base = manifest.source.hub if isinstance(manifest.source, HubOrigin) else None
    data = ModelCardData(
        license=licence if known else "other",
        license_name=None if known else licence,
        license_link=None if known else "LICENSE",
        base_model=base,
        base_model_relation="quantized" if base else None,
        pipeline_tag="text-generation",
        tags=[
            "openvino" if manifest.runtime.openvino else "onnx",
            manifest.variant,
            "phi3",
            *(device.lower() for device in manifest.runtime.devices),
        ],
    )
    formats = ", ".join(f"{share:.1%} {name}" for name, share in manifest.recipe.achieved.formats.items())
    requires = " ".join(manifest.runtime.pins)
    source = ", ".join(f"{key} `{value}`" for key, value in manifest.source)
    types = "float32" if manifest.runtime.openvino else "its own types"  # see pipeline/run/onnx.py
    return f"""---
{data.to_yaml()}
---
# {manifest.name} {version}

Made from {source}. Weights: {formats}. For {", ".join(manifest.runtime.devices)}, with `{requires}`.
{describe(manifest.context)}

{_table(f"judged in {types} on {metrics['device']} by {metrics['runtime']}", metrics)}

KL divergence, agreement, perplexity and prefix compare it with the source model, token by token.
{_machine(measured)}
`{MANIFEST}` has the recipe matrix by matrix, `{METRICS}` all figures, `{PROVENANCE}` how it was made,
`{SBOM}` with what. `{EXCERPT}` has what the source model says: `phi3 check` compares a device with it.
"""


def _table(heading: str, figures: dict[str, Any]) -> str:
    rows = [f"| {FIGURES[name][0]} | {figure(figures[name], name)} |" for name in FIGURES if name in figures]
    return "\n".join([f"| {heading} | |", "| --- | --- |", *rows])


def _machine(measured: dict[str, Any]) -> str:
    if not measured:
        return "Speed and memory were not measured where it was published."
    heading = f"with the runtime's defaults, on {measured['device']}: {measured['machine']}"
    explained = f"“{FIGURES['kl_mean_default'][0]}” is the mean KL divergence in that machine's default precision."
    return "\n\n".join(["", _table(heading, measured), *[explained] * ("kl_mean_default" in measured)])


def provenance(manifest: VariantManifest, *, version: str) -> dict[str, Any]:
    """Return a statement of how the artifact was made, without time or machine.

    Raises PipelineError when no git commit has dvc.lock.

    Formats: https://in-toto.io/Statement/v1 and https://slsa.dev/spec/v1.0/provenance
    """
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": path, "digest": {"sha256": file.sha256}} for path, file in manifest.files.items()],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:phi3-pipeline:dvc-repro:v1",
                "externalParameters": {
                    "name": manifest.name,
                    "version": version,
                    "recipe": manifest.recipe.asked,
                },
                "internalParameters": {"tools": manifest.tools},
                "resolvedDependencies": [
                    {"name": "checkpoint", "annotations": manifest.source.model_dump()},
                    {"name": "phi3-pipeline", "digest": {"gitCommit": commit()}, "annotations": uncommitted()},
                ],
            },
            "runDetails": {"builder": {"id": "urn:phi3-pipeline:builder", "version": manifest.tools}},
        },
    }


def bill_of_materials(manifest: VariantManifest, *, version: str) -> dict[str, Any]:
    """Return the model and the packages that made it as a CycloneDX 1.6 document, without time or serial number."""
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=manifest.name,
        version=version,
        bom_ref=manifest.name,
        components=[
            Component(
                type=ComponentType.FILE,
                name=path,
                bom_ref=path,
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=file.sha256)],
            )
            for path, file in manifest.files.items()
        ],
    )
    tools = [
        Component(
            type=ComponentType.LIBRARY,
            name=name,
            version=number,
            bom_ref=name,
            purl=PackageURL("pypi", name=name, version=number),
        )
        for name, number in manifest.tools.items()
    ]
    bom = Bom(components=tools)
    bom.metadata.component = model
    bom.register_dependency(model, tools)
    document: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    del document["serialNumber"], document["metadata"]["timestamp"]
    return document


def commit() -> str:
    """Return the git commit that recorded the build: the last one that changed dvc.lock.

    Raises PipelineError when no git commit has dvc.lock.
    """
    if found := _git("log", "-1", "--format=%H", "--", "dvc.lock"):
        return found
    raise PipelineError("no git commit has dvc.lock, and a release names the commit it was made from: commit it first.")


def uncommitted() -> dict[str, bool]:
    """Return {"uncommitted": True} when dvc.lock has changed since the commit, else an empty dictionary."""
    return {"uncommitted": True} if _git("status", "--porcelain", "--", "dvc.lock") else {}


def _git(*arguments: str) -> str:
    # Return what git prints, which is nothing outside of a repository.
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

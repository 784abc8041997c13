"""Stage download."""

from pipeline.common import paths
from pipeline.common.checkpoint import eos_token_ids, read_json
from pipeline.common.files import building
from pipeline.common.manifest import CheckpointManifest, Nothing, seal, tool_versions
from pipeline.common.params import load_params
from pipeline.process import stage_command
from pipeline.source import fetch_checkpoint


@stage_command
def main(model: str) -> None:
    """Fetch the source checkpoint of MODEL and check it."""
    entry = load_params().get_model(model)
    with building(paths.source(model), resume=True) as build:
        origin = fetch_checkpoint(entry.source, build)
        config = read_json(build / "config.json")
        seal(
            build,
            CheckpointManifest(
                name=f"{model}/source",
                model=model,
                variant="source",
                source=origin,
                license=entry.license,
                recipe=Nothing(),
                eos_token_ids=eos_token_ids(build),
                context={"max_position_embeddings": config["max_position_embeddings"]},
                runtime=Nothing(),
                tools=tool_versions("transformers", "tokenizers", "huggingface-hub"),
            ),
        )


if __name__ == "__main__":
    main()

"""The lists of dvc.yaml that follow from params.yaml and from what the stages import.

They are written by `phi3 params --write`, since DVC's templates can neither select variants nor follow imports.
"""

import ast
from io import StringIO
from pathlib import Path
from typing import Any, get_args

from ruamel.yaml import YAML

from pipeline.common.params import OnnxInt4, OpenvinoFp16, OpenvinoInt4, Params

DVC_FILE = Path("dvc.yaml")
LIBRARIES = "libraries.lock"
# These modules cannot change the output of a stage: they hold messages, paths, processes and the reading of params,
# whose values DVC watches. A change in them reruns nothing.
UNWATCHED = {
    "pipeline.graph",
    "pipeline.plan",
    "pipeline.process",
    "pipeline.supervisor",
    *(f"pipeline.common.{name}" for name in ("errors", "memory", "params", "paths", "programs", "progress")),
}
NOT_BUILT_IN = {"limits", "npu"}  # the keys of a variant that do not change the files that its stage builds


def render(params: Params, *, root: Path = Path()) -> str:
    """Return dvc.yaml of the folder `root` with its lists made anew: variants, watched keys, modules and artifacts."""
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 120
    content = yaml.load(root / DVC_FILE)
    stages = content["stages"]
    for variant in (OpenvinoFp16, OpenvinoInt4, OnnxInt4):
        (name,) = get_args(variant.model_fields["stage"].annotation)
        built = [key for key, value in params.variants.items() if value.stage == name]
        stages[name]["matrix"]["variant"][:] = built
        keys = [key for key in variant.model_fields if key not in NOT_BUILT_IN]
        _watch(stages[name], [f"variants.${{item.variant}}.{key}" for key in keys])
    _watch(stages["calibrate"], _calibrated(params))
    stages["compile_npu"]["matrix"]["variant"][:] = [key for key, value in params.variants.items() if value.npu]
    for name, stage in stages.items():
        modules = imported_modules(root / "stages" / f"{name}.py", root=root)
        others = [path for path in stage["deps"] if not path.endswith(".py") and path != LIBRARIES]
        stage["deps"][:] = [*sorted(path.relative_to(root).as_posix() for path in modules), LIBRARIES, *others]
    artifacts = content["artifacts"]
    former = dict(artifacts)
    artifacts.clear()
    for key in (f"{model}/{variant}" for model in params.build for variant in params.variants):
        name = key.replace("/", "-")
        artifacts[name] = former.get(name, {"path": f"artifacts/{key}", "type": "model"})
    stream = StringIO()
    yaml.dump(content, stream)
    return stream.getvalue().rstrip() + "\n"


def _watch(stage: dict[str, Any], keys: list[str]) -> None:
    stage["params"][:] = [key for key in stage["params"] if not key.startswith("variants.")] + keys


def _calibrated(params: Params) -> list[str]:
    # Return the keys that decide whether the stage calibrate has work to do. One calibrated variant is enough, so that
    # a new one does not run the stage again; when there is none, any may become the first.
    keys = {
        f"variants.{name}.calibrated": variant.calibrated
        for name, variant in params.variants.items()
        if not isinstance(variant, OpenvinoFp16)
    }
    return [key for key, calibrated in keys.items() if calibrated][:1] or list(keys)


def imported_modules(file: Path, *, root: Path) -> set[Path]:
    """Return `file` and the modules of the folder `root` that it imports, directly or not, and that can change it."""
    found, left = {file}, [file]
    while left:
        for name in imported_names(left.pop()):
            path = root / name.replace(".", "/")
            for module in (path.with_suffix(".py"), path / "__init__.py"):
                if name.startswith("pipeline.") and name not in UNWATCHED and module.exists() and module not in found:
                    found.add(module)
                    left.append(module)
    return found


def imported_names(file: Path) -> set[str]:
    """Return the names that `file` imports, also inside functions, with those of the modules they come from."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names

"""Real small data for the tests: tiny random Phi-3 checkpoints, and the embedded model's artifacts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from filelock import FileLock
from huggingface_hub import constants

from pipeline.cli import main
from pipeline.common.params import Limits
from tests.hub_registry_server import HubRegistryServer

ROOT = Path(__file__).parents[1]
# A shell makes background programs ignore Ctrl-C, and the programs that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LIMITS = Limits(kl_mean=1, kl_p99=9, top1_agreement=0.1, perplexity_ratio=2)  # of variants that are not judged
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0] * 16, "short_factor": [1.0] * 16}
STYLES = {
    "phi-3-4k": {"sliding_window": 2047, "tie_word_embeddings": False},
    "phi-3-128k": {
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 128,
        "rope_parameters": LONGROPE | {"original_max_position_embeddings": 128, "partial_rotary_factor": 1.0},
    },
    "phi-4-mini": {
        "tie_word_embeddings": True,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 128,
        "partial_rotary_factor": 0.75,
        "rope_parameters": LONGROPE
        | {
            "original_max_position_embeddings": 128,
            "partial_rotary_factor": 0.75,
            "long_factor": [4.0] * 24,
            "short_factor": [1.0] * 24,
        },
    },
}


# A test may be skipped for these reasons on a machine where everything is set up, such as CI's.
MAY_SKIP = re.compile("the kernel gives huge pages to all, or to nobody")
LONGEST = ("test_killed_at_any_time_then_two_at_once", "test_build_then_nothing_then_one_branch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that they do not run alone at the end."""
    items.sort(key=lambda item: item.name not in LONGEST)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With PHI3_TESTS_COMPLETE, as on CI, a test that is skipped makes the run fail, but for the reasons MAY_SKIP."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if "PHI3_TESTS_COMPLETE" in os.environ and reporter:
        skipped = [str(report.longrepr) for report in reporter.stats.get("skipped", [])]
        if not all(map(MAY_SKIP.search, skipped)):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line what was skipped, and why."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    if reasons:
        parts = [f"{count} ({reason})" for reason, count in reasons.items()]
        terminalreporter.write_line(f"Skipped, since this machine cannot run them: {'; '.join(parts)}")


def make_tokenizer(text: str = "the capital of France is Paris and water is wet 0123456789"):
    """Return a byte-level BPE tokenizer with Phi-3's chat tokens, trained on `text`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def make_checkpoint(target: Path, style: str = "phi-3-4k", *, on_grid: bool = False, **changes: Any) -> Path:
    """Write a tiny random bf16 checkpoint in the style of a Phi model (see STYLES) to `target`.

    `changes` are keys of its config. With `on_grid` INT4 stores every matrix without loss, in any format, so that all
    variants are the same model; its weights are larger, and its distributions far from uniform.
    """
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    shape = {
        "vocab_size": 320,  # differs from all layers' widths: the ONNX builder recognizes the head by its shape
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**shape | STYLES[style] | changes))
    if on_grid:
        # With these scales the next token depends strongly on the tokens attended to.
        scales = {"embed_tokens": 8, "lm_head": 16, "qkv_proj": 32, "o_proj": 16, "gate_up_proj": 64, "down_proj": 64}
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                codes = torch.randint(-7, 8, parameter.shape)
                groups = codes.view(-1, 32)  # each has both ends of the range, which determine its scale
                groups.scatter_(1, groups.argmin(1, keepdim=True), -8).scatter_(1, groups.argmax(1, keepdim=True), 7)
                parameter.data.copy_(codes / scales[name.split(".")[-2]])
    model.generation_config.eos_token_id = [0, 1]
    model.generation_config.pad_token_id = 0
    model.to(torch.bfloat16).save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    config = json.loads((target / "config.json").read_text("utf-8"))
    rope = config.pop("rope_parameters")  # the Hub's configs have an older form
    config |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0)}
    if rope["rope_type"] == "longrope":
        config["rope_scaling"] = {"type": "longrope"} | {key: rope[key] for key in ("long_factor", "short_factor")}
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    return target


def run(*arguments: object, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the tests' environment, and return the result with its output."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if os.environ.get("MUTANT_UNDER_TEST") == "stats":  # mutmut counts the calls of its own process only
        environment |= {"MUTANT_UNDER_TEST": ""}
    return subprocess.run(
        list(map(str, arguments)),
        cwd=cwd,
        check=check,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(cwd)} | environment,
    )


def phi3(*arguments: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command `phi3` in this process; the result is that of `run`."""
    result = CliRunner(env=environment).invoke(main, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    completed = subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)
    if check:
        completed.check_returncode()
    return completed


def edit(file: Path, old: str, new: str) -> None:
    """Replace every `old` in `file` by `new`; fail when there is none."""
    content = file.read_text("utf-8")
    assert old in content
    file.write_text(content.replace(old, new), "utf-8")


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `name`, which `build` fills once for all processes of a test run."""
    base = factory.getbasetemp()
    target = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{target}.lock"):
        if not target.exists():
            folder = factory.mktemp(name)
            build(folder)
            folder.rename(target)
    return target


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint in the style of Phi-3-mini-4k."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of the embedded model, built by `dvc repro` if they are not there.

    With PHI3_TESTS_BUILT they are taken as they are, although the code has changed.
    """
    if "PHI3_TESTS_BUILT" not in os.environ:
        with FileLock(tmp_path_factory.getbasetemp().parent / "embedded.lock"):  # `make test` runs two processes
            run("dvc", "repro", cwd=ROOT)
    return ROOT / "artifacts/smol-phi3"


@pytest.fixture(scope="session")
def released(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that publishes a variant of the embedded model and returns where it was pulled to, once for all."""

    def release(variant: str) -> Path:
        def pull(folder: Path) -> None:
            registry, name = f"dir:{folder}/registry", f"smol-phi3/{variant}"
            run("phi3", "publish", name, "--to", registry, "--version", "1.0.0", cwd=ROOT)
            run("phi3", "pull", registry, name, "--to", folder / "model", cwd=ROOT, PHI3_CACHE=str(folder / "cache"))

        return built_once(tmp_path_factory, f"released-{variant}", pull) / "model"

    return release


@pytest.fixture
def project(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A git and DVC project like this one, in a folder of its own, that builds a tiny random model."""
    project = tmp_path / "project"
    for folder in ("pipeline", "stages"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (project / ".dvc").mkdir()
    for file in ("config", ".gitignore"):
        (project / ".dvc" / file).write_bytes((ROOT / ".dvc" / file).read_bytes())
    for file in ("dvc.yaml", "libraries.lock", "params.yaml", ".gitignore", ".dvcignore"):
        (project / file).write_bytes((ROOT / file).read_bytes())
    source = f"source: {{path: {json.dumps(str(tiny_checkpoint))}}}"
    tiny = f"  tiny:\n    {source}\n    license: MIT\n    group_size_fallback: error\n"
    edit(project / "params.yaml", "build: [smol-phi3]", "build: [tiny]")
    edit(project / "params.yaml", "models:\n", f"models:\n{tiny}")
    run("git", "init", "-q", cwd=project)
    run("git", "add", "-A", cwd=project)
    run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "start", cwd=project)
    return project


@pytest.fixture
def mount():
    """Return a function that mounts a file system of some megabytes on a folder."""
    mounted = []

    def mount(folder: Path, megabytes: float) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        size = f"size={int(megabytes * 1e6)}"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=False).returncode:
            pytest.skip("only root can mount a small file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=False)


@pytest.fixture
def hub_registry() -> Iterator[HubRegistryServer]:
    """An empty Hub for publishing and pulling."""
    with HubRegistryServer() as server:
        yield server


@pytest.fixture
def hub(hub_registry: HubRegistryServer, monkeypatch: pytest.MonkeyPatch) -> HubRegistryServer:
    """The empty Hub, as the Hub of this process."""
    use_hub(hub_registry.url, monkeypatch)
    return hub_registry


def use_hub(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process take the server at `url` for the Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

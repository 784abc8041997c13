"""The snippets of README and docs run as they are written, links lead somewhere, and tables are complete."""

import json
import re
import sys
from pathlib import Path

import pytest

from pipeline.check.checks import CHECKS
from tests.helpers import ROOT, run

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
}
SNIPPETS = [
    pytest.param(snippet, id=f"{page}-{number}")
    for page, text in sorted(PAGES.items())
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
]


@pytest.mark.slow
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_answers(smol_phi3, snippet):
    """Each snippet prints an answer that contains the last word of the source model's answer."""
    answers = json.loads((smol_phi3 / "reference.json").read_text("utf-8"))["answers"]
    expected = re.findall(r"\w+", answers[0]["text"])[-1]
    assert expected in run(sys.executable, "-c", snippet, cwd=ROOT).stdout


@pytest.mark.slow
def test_publish_and_pull(smol_phi3, tmp_path):
    """The commands of the page on registries work in the order given, and so does the snippet for applications."""
    page = PAGES["docs/registries.md"]
    commands, snippet = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("sh", "py"))
    here = {"PHI3_CACHE": str(tmp_path / "cache")}
    output = run("bash", "-ec", commands.replace("/tmp/", f"{tmp_path}/"), cwd=ROOT, **here).stdout
    assert "smol-phi3/openvino-int4 1.0.0 latest" in output
    assert output.strip().endswith("The capital of Japan is Tokyo.")
    snippet = snippet.replace("/tmp/", f"{tmp_path}/") + "print(sorted(path.name for path in directory.iterdir()))"
    output = run(sys.executable, "-c", snippet, cwd=ROOT, **here).stdout
    assert output.startswith("The capital of Japan is Tokyo.")
    assert "openvino_model.bin" in output


def test_every_check_is_explained():
    """The table of checks names all of them, in their order."""
    table = PAGES["docs/validation.md"].split("## Checks")[1].split("\n\n")[1]
    assert [name for row in table.splitlines()[2:] for name in re.findall(r"`([\w-]+)`", row.split("|")[1])] == list(
        CHECKS
    )


def test_the_readme_is_short():
    """The README is short enough to be read at one sitting."""
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Each link to a file of the project names an existing file, and each link to a heading an existing heading."""
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings], link


def figures(page: str, heading: str) -> dict[str, list[str]]:
    """Return the cells of each row of the first table below `heading`, by the variant in the row's first cell."""
    table = PAGES[page].split(heading)[1].split("\n| --- ")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[1:]]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_figures_are_the_committed_metrics():
    """Sizes and fidelity in the README and in the page on validation are those that git has.

    The working tree's may differ from these in the last digits, on another machine.
    """
    folder = "artifacts/smol-phi3/metrics"
    names = run("git", "ls-files", folder, cwd=ROOT).stdout.split()
    committed = {Path(name).stem: json.loads(run("git", "show", f":{name}", cwd=ROOT).stdout) for name in names}
    short, full = figures("README.md", "# phi3-pipeline"), figures("docs/validation.md", "## Fidelity")
    assert short.keys() == full.keys() == committed.keys()
    for variant, metrics in committed.items():
        _, size, kl, _, top1 = short[variant]
        assert size == f"{metrics['size_bytes'] / 1e6:.0f} MB"
        assert (
            kl
            == full[variant][0]
            == (f"{metrics['kl_mean']:.3f}" if metrics["kl_mean"] > 1e-3 else f"{metrics['kl_mean']:.0e}")
        )
        assert top1 == full[variant][2] == f"{metrics['top1_agreement']:.1%}"
        assert full[variant][3] == f"×{metrics['perplexity_ratio']:.3f}"
        assert full[variant][4] == f"{metrics['common_prefix_tokens']:.1f}"


def test_the_figures_of_other_tools_are_those_of_the_bench():
    """The tables of the page on other tools, and of the bench's own page, are those of bench/peers.json."""
    from bench.peers import END, START, commands, table  # it loads nncf

    results = json.loads((ROOT / "bench/peers.json").read_bytes())
    assert f"{START}\n{table(results)}\n{END}" in PAGES["docs/compare.md"]
    assert f"{table(results)}\n{commands(results)}" in (ROOT / "bench/peers.md").read_text("utf-8")

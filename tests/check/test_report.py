"""The report shows every variant, good or bad, in a real browser without a network."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from pipeline.check.report import bits_per_layer, figure, scatter
from tests.helpers import ROOT, edit_json, run

VARIANT = "openvino-int4"


def test_bits_per_layer():
    """Matrices, as either builder names them, are grouped by kind and layer; those outside the layers get layer -1."""
    matrices = {
        "model.embed_tokens.weight": "int8-asym-channel",
        "model.layers.0.self_attn.qkv_proj.weight": "int4-sym-g64",
        "model.layers.11.attn.qkv_proj": "int8-asym-g32",
        "lm_head": "f16",
    }
    assert bits_per_layer(matrices) == {
        "embed_tokens": {-1: "int8-asym-channel"},
        "qkv_proj": {0: "int4-sym-g64", 11: "int8-asym-g32"},
        "lm_head": {-1: "f16"},
    }


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        (114_372_558, "size_bytes", "114.4 MB"),
        (0.9987, "top1_agreement", "99.9 %"),
        (0.0000021, "kl_mean", "2e-06 nats"),
        (0.0, "kl_mean", "0.0000 nats"),
        (None, "kl_mean", "–"),
    ],
)
def test_figure(value, name, text):
    """A metric is shown with its unit; a tiny one is shown with a power of ten, and a missing one as a dash."""
    assert figure(value, name) == text


def test_scatter():
    """Points lie within the axes; a larger variant is further right and a lossier one higher up."""
    metrics = [{"size_bytes": 270e6, "kl_mean": 1e-6}, {"size_bytes": 91e6, "kl_mean": 0.41}]
    plot = scatter([{"metrics": values} for values in metrics])
    big, small = plot["points"]
    assert [label for _, label in plot["x_ticks"]] == ["0", "100", "200", "300"]
    assert [label for _, label in plot["y_ticks"]] == ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]
    assert plot["left"] < small["x"] < big["x"] < plot["width"]
    assert 0 < small["y"] < big["y"] <= plot["bottom"]


@pytest.fixture(scope="module")
def report(smol_phi3, tmp_path_factory) -> Path:
    """The report on smol-phi3's variants, of which one failed and one was never validated."""
    project = tmp_path_factory.mktemp("report")
    target = project / "artifacts/smol-phi3"
    for name in ("metrics", "measured", "validation", "blobs"):
        shutil.copytree(smol_phi3 / name, target / name, ignore=shutil.ignore_patterns("*.blob"))
    for name in ("reference.json", "source/manifest.json"):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copy(smol_phi3 / name, target / name)
    shutil.copy(ROOT / "params.yaml", project)
    for folder, key, value in (("metrics", "passed", False), ("validation", "failures", ["check 'fidelity' <failed>"])):
        edit_json(target / folder / f"{VARIANT}.json", **{key: value})
        (target / folder / "onnx-cpu-int4.json").unlink()
    (target / "measured/onnx-cpu-int4.json").unlink()
    (target / "measured/onnx-directml-int4.json").unlink()
    run("python", "-m", "stages.report", "smol-phi3", cwd=project, PYTHONPATH=str(ROOT))
    return project / "artifacts/report/smol-phi3"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium from the system (`apt-get install chromium`)."""
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium") or shutil.which("google-chrome")
    assert executable, "chromium is missing: run `make test`, or install it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(report, browser):
    """The open page; any complaint of the browser, or any request to the network, fails the test."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
    page.goto((report / "index.html").as_uri())
    yield page
    page.close()
    assert [text for text in complaints if not text.startswith("data:")] == []


@pytest.mark.slow
def test_all_variants_at_a_glance(page, smol_phi3):
    """The first table has a row per variant with its result, its figures and what it ran on."""
    rows = [row.inner_text().split("\t") for row in page.locator("#glance + div tbody tr").all()]
    assert [row[0].split()[-1] for row in rows] == [
        "openvino-fp16",
        "openvino-int4",
        "npu-int4-channelwise",
        "npu-int4-group128",
        "onnx-directml-int4",
        "onnx-cpu-int4",
    ]
    assert [row[1].strip() for row in rows] == ["pass", "fail", "pass", "pass", "pass", "not validated"]
    metrics = json.loads((smol_phi3 / f"metrics/{VARIANT}.json").read_text())
    assert rows[1][2].strip() == f"{metrics['size_bytes'] / 1e6:.1f} MB"
    assert rows[1][3].strip() == f"{metrics['kl_mean']:.4f} nats"
    assert rows[2][-1].strip() == "openvino-genai, CPU (NPU static pipeline)"


@pytest.mark.slow
def test_measured_on_this_machine(page, smol_phi3):
    """The second table has what was measured here, and says of the other variants that they were not."""
    metrics = json.loads((smol_phi3 / f"metrics/{VARIANT}.json").read_text())
    here = [row.inner_text().split("\t") for row in page.locator("#machine ~ div").first.locator("tbody tr").all()]
    measured = json.loads((smol_phi3 / f"measured/{VARIANT}.json").read_text())
    assert here[1][1].strip() == f"{metrics['kl_mean']:.4f} nats"
    assert here[1][2].strip() == f"{measured['kl_mean_default']:.4f} nats"
    assert here[1][-1].strip() == f"CPU: {measured['machine']}"
    assert here[4][-1].strip() == "not on this machine"


@pytest.mark.slow
def test_a_failure(page):
    """The header counts the variants by their result, and a failure is explained in words."""
    assert "openvino-int4 fails: check 'fidelity' <failed>" in page.inner_text("main")
    assert "4 pass 1 fail 1 not validated of 6 variants" in page.inner_text("header")


@pytest.mark.slow
def test_figures_and_bit_widths(page):
    """The scatter plot has a point per measured variant, the bars their speeds, the grid a cell per matrix."""
    assert page.locator("svg circle").count() == 5
    assert page.locator(".bar").count() == 8
    assert all(box.bounding_box()["width"] > 0 for box in page.locator(".bar i").all())
    grid = page.locator("details:has(#bits-openvino-fp16)")
    grid.locator("summary").click()
    assert grid.locator("td").all_inner_texts() == ["16"] * 121


@pytest.mark.slow
def test_the_first_differing_token_is_marked(page, smol_phi3):
    """Each variant's answer is marked where it departs from the source's, and is unmarked if it does not."""
    evidence = json.loads((smol_phi3 / "validation/npu-int4-channelwise.json").read_text())
    answers = page.locator("main > details").filter(has=page.locator(".answer")).first.locator(".answer")
    texts = {row.locator("> *").first.inner_text(): row.locator("> *").last for row in answers.all()}
    assert texts["source"].inner_text() == texts["openvino-fp16"].inner_text() == "The capital of Japan is Tokyo."
    assert texts["openvino-fp16"].locator("mark").count() == 0
    part = evidence["answers"][0]
    assert texts["npu-int4-channelwise"].locator("mark").count() == part["departs"]
    departing = [part for part in evidence["continuations"] if part["departs"]]
    assert page.locator("mark").count() > len(departing) > 0


@pytest.mark.slow
def test_keyboard(page):
    """Every control can be reached with the Tab key, and Enter opens folded sections."""
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Skip to the table of variants"
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName + ' ' + document.activeElement.textContent.trim()"))
    folded = page.locator("summary:visible").all_text_contents()
    assert {f"SUMMARY {text.strip()}" for text in folded} <= reached
    summary = page.locator("summary", has_text="first month")
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open]", has=summary).count() == 1


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768])
def test_narrow_screens(page, width):
    """On a phone nothing is cut off to the right, and text keeps a readable size."""
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width < 400:
        boxes = [cell.bounding_box() for cell in page.locator("#glance + div td").all()]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    sizes = "[...document.querySelectorAll('td, p, summary')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(page.evaluate(sizes)) >= 13


@pytest.mark.slow
def test_plots(report):
    """The file of the plots' data has a row per measured variant."""
    with (report / "fidelity.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["variant"] for row in rows][:2] == ["openvino-fp16", VARIANT]
    assert len(rows) == 5
    assert all(float(row["size_bytes"]) > 50 and float(row["kl_mean"]) >= 0 for row in rows)

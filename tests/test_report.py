"""The report: what it says, how it is written, and its calculator in a headless browser."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import SD15, numbers
from matplotlib.text import Text

from derivation import DerivationError, derive
from derivation.cli import run
from derivation.config.checkpoint import BUNDLED
from derivation.files import write_files
from derivation.report import build, calculator, content, figures, pictures
from derivation.report.answer import SIZES, answer, reference_side
from derivation.report.assumptions import chips
from derivation.report.reduction import reductions
from derivation.report.text import tex
from derivation.report.walk import walks
from derivation.tape.grid import B, H, L, W
from derivation.text import grouped, human

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
VOID = {"meta", "link", "br", "wbr", "input", "img", "hr", "use", "path"}
SEED, STATES = 20261123, 24


@pytest.fixture(scope="module")
def derivation():
    return derive(SD15)


@pytest.fixture(scope="module")
def report(page):
    return page


@pytest.fixture
def small(monkeypatch):
    """Leave out what takes long: the calculator's tapes of other options."""
    few = {name: (label, values[:1]) for name, (label, values) in calculator.SWITCHES.items()}
    monkeypatch.setattr(calculator, "SWITCHES", few)
    own = lambda d: (calculator.Kernel((d.options.dtype,), d.options.attention, {None: None}),)  # noqa: E731
    monkeypatch.setattr("derivation.report.content.kernels_of", own)


class Page(HTMLParser):
    """Checks that elements nest, and collects ids, in-page links and everything that would be loaded."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.loaded = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
        else:
            self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_page_says_what_the_derivation_says(report, derivation):
    text = report.read_text()
    for side in SIZES:
        estimate = derivation.estimate(side, side)
        assert grouped(estimate["peak_tensor_bytes"]) in text
        assert grouped(estimate["weights_bytes"]) in text
        for nbytes in estimate["stages_bytes"].values():
            assert grouped(nbytes) in text
    appendix = report.with_suffix(".appendix.md").read_text()
    for nbytes in derivation.component_peaks(512, 512).values():
        assert grouped(nbytes) in appendix


def test_the_page_is_well_formed_and_loads_nothing(report):
    page = Page(report.read_text())
    assert len(page.ids) == len(set(page.ids))
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert all(value.startswith(("#", "data:")) for value in page.loaded)
    assert "@import" not in report.read_text()
    assert not re.search(r"url\((?!#)", report.read_text())


def test_the_page_stays_below_two_and_a_half_megabytes(report):
    assert report.stat().st_size < 2_500_000


def test_markdown_latex_and_every_figure_they_name_are_there(report):
    drawn = r"\]\((figures/[^)]*)\)"
    for ending, pattern in ((".md", drawn), (".appendix.md", drawn), (".tex", r"\\includegraphics\[.*?\]\{(.*?)\}")):
        text = report.with_suffix(ending).read_text()
        named = re.findall(pattern, text)
        assert named
        assert all((report.parent / name).stat().st_size for name in named)
        assert not (report.parent / ".tmp").exists()


def test_the_notes_are_four_pages_and_end_with_how_they_were_checked(report):
    notes = report.with_suffix(".md").read_text()
    prose = re.sub(r"<details>.*?</details>|^\|.*$|^!.*$", "", notes, flags=re.MULTILINE | re.DOTALL)
    assert len(prose.split()) < 4 * 400
    assert re.findall(r"(?m)^##? (.*)$", notes)[1:] == ["The answer", "Image size and cards", "How it was checked"]
    assert f"]({report.stem}.appendix.md)" in notes
    assert "## Block by block" in report.with_suffix(".appendix.md").read_text()


def test_notes_without_a_gpu_say_what_one_card_shows_and_the_command_that_is_named_does(report, capsys):
    notes = report.with_suffix(".md").read_text()
    said = re.search(r"On the GeForce RTX 3060 one 512 . 512 image (.*?: \w+); 1024 . 1024 (.*?: [^,]+), as nv", notes)
    command = shlex.split(re.search(r"`derivation (estimate [^`]*)`", notes)[1])
    assert command[-1] == "512"
    for side, verdict in zip(("512", "1024"), said.groups(), strict=True):
        assert run([*command[:-1], side]) == 0
        assert capsys.readouterr().out.startswith(f"{verdict}\n")


def test_every_figure_has_its_data(report, derivation):
    figures = dict(re.findall(r'<figure id="figure-(\w+)">(.*?)</figure>', report.read_text(), re.S))
    tables = {
        name: re.findall(r"<tr>(.*?)</tr>", text[text.index("Data</summary>") :]) for name, text in figures.items()
    }
    assert {len(rows) > 1 for rows in tables.values()} == {True} and len(figures) == 9
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in tables["curves"]]
    peaks = next(row for row in cells if row[:1] == ["768"])[1:]
    assert [int(cell.replace("\u202f", "")) for cell in peaks] == list(derivation.stage_peaks(768, 768).values())


def test_the_curves_of_an_article_s_column_have_letters_that_can_be_read():
    figure = figures.stage_curves([512, 1024], {"Decode the image": [1 << 28, 1 << 30]}, 0, [], figures.COLUMN)
    # size10.clo: \\columnwidth of twocolumn is 229.5 pt of 72.27 an inch
    scale = 229.5 / 72.27 / figure.get_figwidth()
    assert min(text.get_fontsize() * scale for text in figure.findobj(Text) if text.get_text()) >= 6


def test_a_page_starts_at_the_pipeline_s_own_size(tmp_path, small):
    [page] = build(["stabilityai/stable-diffusion-xl-base-1.0"], tmp_path)
    # sample_size 128 of unet/config.json, and the VAE's three halvings
    assert re.search(r'<input id="ask-size" name="size" value="(.*?)"', page.read_text())[1] == "1024x1024"


def test_an_index_compares_models_and_links_their_reports(tmp_path, small):
    inpainting = "runwayml/stable-diffusion-inpainting"  # 9 channels: no img2img
    index, *pages = build([SD15, inpainting], tmp_path, index=True)
    found = Page(index.read_text())
    assert index.name == "index.html" and len(pages) == 2
    assert all((tmp_path / link).exists() for link in found.links)
    assert {page.name for page in pages} <= set(found.links)
    text = index.read_text().replace("\u202f", " ")
    rows = re.findall(r"<tbody>.*?</tbody>", text, re.S)
    assert [re.findall(r"<span>(txt2img|inpaint)</span>", row) for row in rows] == [["txt2img"], ["inpaint"]]
    # what the page's own policy refuses is an error on the console
    assert 'href="data:,"' in text and "img-src data:" in text
    for d in (derive(SD15), derive(inpainting, pipeline="inpaint")):
        assert human(d.weights_bytes + max(d.stage_peaks(1024, 1024).values())) in text


def test_every_witness_adds_up_to_its_polynomial(derivation):
    found = answer(derivation)
    rows = [row for stage in found.stages for row in stage.polynomials]
    assert rows
    for row in (*rows, *found.polynomials):
        assert row.witness.total == row.terms
        assert row.witness.bytes_at == row.bytes_at


def test_the_walk_ends_at_the_component_peaks(derivation):
    peaks = derivation.component_peaks(512, 512)
    assert {walk.name: walk.peak_bytes for walk in walks(derivation)} == peaks


def test_large_dropped_points_come_with_proofs(derivation):
    found = reductions(derivation)
    assert sum(r.candidates for r in found) == len(derivation.record().points)
    assert all(r.proofs for r in found if r.dominated)


def test_the_same_input_gives_the_same_files(tmp_path, small):
    first, second = (tmp_path / name for name in "ab")
    for folder in (first, second):
        build([SD15], folder)
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_a_hostile_model_name_stays_text(tmp_path, small):
    hostile = tmp_path / "<img src=x onerror=alert(1)>`|$&%_{"
    shutil.copytree(BUNDLED / SD15, hostile)
    [page] = build([str(hostile)], tmp_path / "out")
    text = page.read_text()
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text.replace("<wbr>", "")
    assert tex(hostile.name) in page.with_suffix(".tex").read_text()
    assert "<img" not in re.sub(r"`[^`\n]*`", "", page.with_suffix(".md").read_text())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(DerivationError, match="cannot be written") as caught:
        write_files(tmp_path / "file" / "below", {"a.txt": "new"})
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_failure_while_writing_leaves_the_old_files(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "b").write_text("in the way")
    with pytest.raises(DerivationError):
        write_files(tmp_path, {"a.txt": "new", "b/c.txt": "new"})
    assert (tmp_path / "a.txt").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b"]


def test_the_main_job_reports_a_bad_request_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "build_report.py"), "no/such-model", "--output", str(tmp_path / "out")]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=offline)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_pdf_without_an_engine_says_so(monkeypatch, capsys, tmp_path):
    from derivation.report import job

    monkeypatch.setattr(job.shutil, "which", lambda name: None)
    assert job._typeset([tmp_path / "x.html"], lambda step: None) == []
    assert "no TeX engine" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex is installed")
def test_the_latex_source_fits_its_page(report):
    from derivation.report import job

    [pdf] = job._typeset([report], lambda step: None)
    assert pdf.read_bytes().startswith(b"%PDF")
    command = ["pdflatex", "-draftmode", "-interaction=nonstopmode", report.with_suffix(".tex").name]
    log = subprocess.run(command, cwd=report.parent, capture_output=True, text=True, errors="replace").stdout
    assert not [width for width in re.findall(r"Overfull \\hbox \(([0-9.]+)pt", log) if float(width) > 10]


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_a_component_alone_has_a_report(component, tmp_path, small):
    [page] = build([str(next(BUNDLED.rglob(f"{component}/config.json")))], tmp_path)
    text = page.read_text()
    assert "component alone" in text
    assert "denoising steps" not in text
    assert "CPU offload" not in text


@pytest.mark.parametrize("options", [{"offload": "model"}, {"offload": "sequential", "controlnets": 1}])
def test_options_are_told_and_offload_stands_beside_all_on_the_gpu(options, tmp_path, small):
    [page] = build([SD15], tmp_path, **options)
    text = page.read_text()
    for offload in (None, "model", "sequential"):
        d = derive(SD15, **{**options, "offload": offload})
        for side in SIZES:
            assert grouped(d.weights_bytes + max(d.stage_peaks(side, side).values())) in text
    for name, value in options.items():
        assert f"<span>{name} {value}</span>" in text
    assert "All models stay on the GPU" not in text


def test_a_gpu_is_told_and_its_steps_are_solved(small):
    d = derive(SD15, gpu="t4", attention="eager")
    assert "scratch of t4" in chips(d)
    assert any("UNet calls on" in fact.sentence for fact in d.equation.irrelevant())


def test_every_simplification_step_has_the_same_value(derivation):
    for stage in reductions(derivation):
        names = {stage_point.label for stage_point in stage.kept}
        assert stage.printed == len(stage.steps)
        assert names.issuperset(step.label for step in stage.steps)


def formulas_of(page):
    """Return the mathematics of the Markdown and of the LaTeX notes."""
    markdown = page.with_suffix(".md").read_text() + page.with_suffix(".appendix.md").read_text()
    latex = page.with_suffix(".tex").read_text()
    displayed = re.findall(r"```math\n(.*?)```", markdown, re.S) + re.findall(r"\\\[ (.*?) \\\]", latex)
    displayed += re.findall(r"\\begin\{equation\*\}(.*?)\\end\{equation\*\}", latex, re.S)
    inline = [x for text in (markdown, latex) for x in re.findall(r"(?<!\\)\$([^$]+)\$", text)]
    return [*displayed, *dict.fromkeys(inline)]


def test_the_mathematics_passes_katex(report):
    script = (
        "const katex = require('katex'); const fs = require('fs');"
        "for (const x of JSON.parse(fs.readFileSync(0))) katex.renderToString(x, {strict: 'error', displayMode: true});"
    )
    formulas = formulas_of(report)
    assert len(formulas) > 30
    node = shutil.which("node")
    if node is None or subprocess.run([node, "-e", "require('katex')"], capture_output=True, cwd=ROOT).returncode != 0:
        pytest.skip("node with the katex package is not installed")
    subprocess.run([node, "-e", script], input=json.dumps(formulas), text=True, check=True, cwd=ROOT)


def test_the_main_job_logs_its_steps_in_a_pipe_and_answers_json(tmp_path, monkeypatch, capsys, small):
    spec = importlib.util.spec_from_file_location("build_report", ROOT / "build_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("derivation.report.job.ROOT", tmp_path)
    assert module.main(["--output", str(tmp_path / "out"), "--json"]) == 0
    shown = capsys.readouterr()
    steps = shown.err.splitlines()
    assert all(step.startswith("report: ") for step in steps) and len(set(steps)) == len(steps)
    assert [Path(name).suffix for name in json.loads(shown.out)["files"]] == [".html"]
    assert any((tmp_path / "formulas").rglob("peak_vram.py"))


@pytest.fixture(scope="module")
def tiled():
    return derive(SD15, pipeline="txt2img", vae_tiling=True, tile_sample_min_size=256)


def test_a_tiled_report_defines_the_symbols_of_its_equation(tiled, tmp_path, small):
    [page] = build([SD15], tmp_path, pipeline="txt2img", vae_tiling=True, tile_sample_min_size=256)
    text = page.read_text()
    Page(text)
    for side in SIZES:
        assert grouped(tiled.weights_bytes + max(tiled.stage_peaks(side, side).values())) in text
    notes = [page.with_suffix(ending).read_text() for ending in (".md", ".tex")]
    for symbol in tiled.grid.defined(term.expression for term in tiled.equation.pipeline_stage().terms):
        letter, axis = str(symbol)[0], str(symbol)[3]
        assert f"<math><mrow><msub><mi>{letter}</mi><mi>{axis}</mi></msub><mo>=</mo>" in text
        assert all(f"${symbol} = " in note for note in notes)
    assert content.TILED_CROSSINGS.split(",")[0] in text


def test_the_polynomials_of_a_tiled_report_have_the_walk_s_bytes(tiled):
    found = answer(tiled)
    for stage in found.stages:
        for row in stage.polynomials:
            assert row.witness.total == row.terms
        rounding = max(term.rounding_bytes for term in tiled.stages[stage.name].terms)
        for i, side in enumerate(SIZES):
            exact, tiles = tiled.stage_peaks(side, side)[stage.name], (side // 192 + 1) ** 2
            assert stage.bytes_at[i] == exact
            assert 0 <= exact - max(row.bytes_at[i] for row in stage.polynomials) <= rounding + 511 * tiles


def test_a_tiled_walk_ends_at_the_component_peaks(tiled):
    side = reference_side(tiled)
    assert {walk.name: walk.peak_bytes for walk in walks(tiled)} == tiled.component_peaks(side, side)


def test_the_map_of_a_tiled_report_is_its_equation(tiled):
    sides = np.array([256, 320, 704])
    drawn = pictures._totals(tiled, answer(tiled), sides)
    for i, height in enumerate(sides):
        for j, width in enumerate(sides):
            assert drawn[i, j] == int(numbers(tiled.peak, {H: height, W: width, L: 77, B: 1}))

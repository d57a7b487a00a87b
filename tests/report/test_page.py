"""The files of a report: their contents, their safety, and which files they may replace."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from sequel_core.cli import main
from sequel_core.report import pictures, write_report
from sequel_core.report.page import MARK
from tests.report.directories import NAN, ONE, TWO, decay, write_run

HOSTILE = "<script>alert('x')</script> & \"q\" $a_{b | `c` [d](e) \N{CJK UNIFIED IDEOGRAPH-5B66}\x1b\n"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Parses a page: its elements, the texts of its table cells, and the elements that are still open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A method in two frameworks with two seeds, one with HTML in its name, a killed and a damaged run."""
    folder = tmp_path_factory.mktemp("runs")
    for mode in ("pytorch", "jax"):
        for seed, matrix in enumerate((ONE, TWO)):
            write_run(folder / f"naive_{mode}_{seed}", matrix, mode=mode, seed=seed)
    write_run(folder / "hostile", TWO, mode="jax", algo=HOSTILE)
    write_run(folder / "<b>killed</b>", [[0.3, NAN], [NAN, NAN]], seed=2, status=None)
    (write_run(folder / "damaged <i>") / "summary.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def report(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with `report.html`, `report.md` and `figures/`."""
    folder = tmp_path_factory.mktemp("report")
    write_report([runs], folder / "report.html", png=folder / "figures", markdown=folder / "report.md")
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one task, a run that was killed before training, and a damaged one."""
    folder = tmp_path_factory.mktemp("short")
    write_run(folder / "whole", [[0.5]])
    write_run(folder / "killed", None, seed=1, status=None)
    (write_run(folder / "damaged") / "summary.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def text(report: Path) -> str:
    return (report / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_numbers_of_the_page(page: Page) -> None:
    row = page.cells.index("naive, PyTorch")
    assert page.cells[row + 1 : row + 4] == ["2 of 3", "70.00 ± 63.53", "25.00 ± 190.59"]
    row = page.cells.index("naive, JAX")
    assert page.cells[row + 1 : row + 4] == ["2", "70.00 ± 63.53", "25.00 ± 190.59"]
    assert page.cells.count("after task 2") >= 4


def test_the_page_has_no_external_references(text: str, page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "base", "a") or tag == "a"
        for key in ("src", "href", "xlink:href", "action", "data", "srcset"):
            value = attributes.get(key, "#")
            assert value.startswith(("#", "data:image/png;base64,")), (tag, key, value)
        assert not [key for key in attributes if key.startswith("on")]
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    [policy] = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_names_are_escaped(text: str, page: Page) -> None:
    assert not page.open
    for tag in ("script", "b", "i"):
        assert not page.named(tag)
    shown = HOSTILE.replace("\x1b", "\N{REPLACEMENT CHARACTER}").replace("\n", "\N{REPLACEMENT CHARACTER}")
    assert f"{shown}, JAX" in page.cells
    assert "\x1b" not in text
    assert "$a_{b" in text


def test_the_structure_of_the_page(text: str, page: Page) -> None:
    identities = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identities)) == len(identities)
    targets = {attributes["href"] for attributes in page.named("a")}
    assert {target[1:] for target in targets} <= set(identities)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(page.named("caption")) == len(page.named("table"))
    assert all(attributes["scope"] in ("col", "row") for attributes in page.named("th"))
    pictures = [attributes for attributes in page.named("div") if attributes.get("role") == "img"]
    assert len(pictures) == len(page.named("figure")) == len(page.named("figcaption"))
    assert all(len(attributes["aria-label"]) > 20 for attributes in pictures)
    assert len(page.named("svg")) == 2 * len(pictures)  # wide and narrow
    regions = [attributes for attributes in page.named("div") if attributes.get("role") == "region"]
    assert len(regions) == len(page.named("table"))
    assert all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in regions)
    assert text.startswith("<!DOCTYPE html>\n")


def test_an_unfinished_run_is_marked(text: str, page: Page) -> None:
    assert '<span class="badge unfinished">unfinished</span>' in text
    assert "evaluated after 1 of 2 tasks" in text
    assert "accuracy on task 1 after task 1: 30.00 %" in text
    assert "damaged &lt;i&gt;/summary.json is damaged" in text
    assert "5 finished runs in 3 configurations; 1 unfinished." in text


def test_every_metric_on_the_page_is_defined(page: Page, text: str) -> None:
    defined = re.findall(r"<dt>(.*?)</dt>", text)
    head = page.cells.index("configuration")
    shown = page.cells[head + 2 : head + 9]
    assert [shown[0], shown[-1]] == ["average accuracy", "worst-case accuracy"]
    assert set(shown) <= set(defined)


def test_the_same_runs_give_the_same_page(short: Path, tmp_path: Path) -> None:
    texts = []
    for name in ("a.html", "b.html"):
        write_report([short], tmp_path / name)
        texts.append(re.sub(r"Written \d{4}-\d\d-\d\d \d\d:\d\d", "", (tmp_path / name).read_text()))
    assert texts[0] == texts[1]


def test_pictures(report: Path, page: Page) -> None:
    files = sorted((report / "figures").iterdir())
    assert {file.stem for file in files} == {attributes["id"] for attributes in page.named("figure")}
    for file in files:
        with Image.open(file) as image:
            assert image.width == 1350
            assert len(np.unique(np.asarray(image.convert("L")))) > 10
            assert image.info["Software"] == MARK


def test_markdown(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    html = MarkdownIt("commonmark").enable("table").render(text)
    parsed = Page(html)
    assert not parsed.named("script")
    assert not parsed.named("a")
    assert not parsed.named("code")
    row = parsed.cells.index("naive, PyTorch")
    assert parsed.cells[row + 1 : row + 4] == ["2 of 3", "70.00 ± 63.53", "25.00 ± 190.59"]
    start = HOSTILE.partition("\x1b")[0]
    assert [cell for cell in parsed.cells if cell.startswith(start)]
    sources = [attributes["src"] for attributes in parsed.named("img")]
    assert {report / source for source in sources} == set((report / "figures").iterdir())


def test_markdown_without_figures_has_no_links(short: Path, tmp_path: Path) -> None:
    write_report([short], tmp_path / "a.html", markdown=tmp_path / "a.md")
    assert "![" not in (tmp_path / "a.md").read_text()


def test_a_single_run_that_was_killed_before_its_first_evaluation(tmp_path: Path) -> None:
    write_run(tmp_path / "run", None, status=None)
    html, notes, folder = tmp_path / "a.html", tmp_path / "a.md", tmp_path / "figures"
    write_report([tmp_path / "run"], html, png=folder, markdown=notes)
    text = html.read_text()
    assert "0 finished runs in 1 configuration; 1 unfinished." in text
    assert not Page(text).named("svg")
    assert not list(folder.iterdir())
    assert "unfinished" in notes.read_text()


def test_accuracies_within_tasks_are_shown_over_steps(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.4, 0.6)):
        evaluations = [(10, 0, accuracy, True), (20, 0, 0.9, False), (40, 0, 0.5, False), (40, 1, 0.8, False)]
        write_run(tmp_path / str(seed), ONE, seed=seed, evaluations=evaluations)
    write_report([tmp_path], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert text.count("task 1, training steps 10: 50.00 %") == 2
    row = Page(text).cells.index("10")
    assert Page(text).cells[row : row + 9] == ["10", "50.00", "", "20", "90.00", "", "40", "50.00", "80.00"]


def test_a_large_study_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tasks, and more configurations than the figures show."""
    monkeypatch.setattr(pictures, "MAX_CONFIGURATIONS", 2)
    for k, rate in enumerate((0.001, 0.1, 0.01)):
        write_run(tmp_path / str(k), decay(100, rate), algo=f"method{k}")
    write_report([tmp_path], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert len(text) < 700_000
    assert "Shown are the 2 configurations with the highest average accuracy. The tables list 1 more." in text
    assert re.findall(r"<h3>(.*?)</h3>", text) == ["method0", "method2"]
    assert {"method0", "method1", "method2"} <= set(Page(text).cells)


def test_other_files_are_kept(short: Path, tmp_path: Path) -> None:
    html, notes, folder = tmp_path / "a.html", tmp_path / "a.md", tmp_path / "figures"
    folder.mkdir()
    theirs = {html: "<html>", notes: "# My notes", folder / "seconds_total.png": "picture"}
    for file, content in theirs.items():
        file.write_text(content)
        with pytest.raises(ValueError, match="must not be an existing file unless it is a report, got"):
            write_report([short], html, png=folder, markdown=notes)
        assert {path: path.read_text() for path in theirs if path.exists()} == {file: content}
        file.unlink()
    for file in theirs:
        file.write_text("theirs")
    write_report([short], html, png=folder, markdown=notes, force=True)
    assert all(MARK.encode() in file.read_bytes() for file in theirs)
    write_report([short], html, png=folder, markdown=notes)  # reports are replaced without force
    assert all(MARK.encode() in file.read_bytes() for file in theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "."}, "path must be a file in an existing folder"),
        ({"path": "nowhere/a.html"}, "path must be a file in an existing folder, got nowhere/a.html"),
        ({"markdown": "nowhere/a.md"}, "markdown must be a file in an existing folder"),
        ({"markdown": "a.html"}, "markdown must not be the HTML file, got a.html for both"),
        ({"png": "nowhere/figures"}, "png must be a folder, or a new one in an existing folder"),
        ({"png": "file"}, "png must be a folder, or a new one in an existing folder, got file"),
    ],
)
def test_paths_that_cannot_be_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message):
        write_report([runs], **{"path": "a.html", **arguments})  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(short)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("note: skipped: ")
    assert "summary.json is damaged" in out[0]
    assert out[1] == f"note: {short / 'killed'}: unfinished, not part of any mean"
    assert out[2:] == ["written to report.html"]
    assert MARK in (tmp_path / "report.html").read_text()


def test_an_error_of_the_command_is_one_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for line, message in (
        ([], "the following arguments are required: DIR; see sequel report --help"),
        (["nowhere"], "which is not a directory; use a directory that `sequel run` wrote"),
        ([str(tmp_path)], "at least one readable run"),
        ([str(runs), "-o", "no/a.html"], "path must be a file in an existing folder, got no/a.html"),
    ):
        assert main(["report", *line]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert main(["report", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: sequel report")

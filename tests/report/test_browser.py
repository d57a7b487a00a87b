"""The page in headless Chromium: no requests, no errors, and all figures are drawn."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from sequel_core.report import write_report
from tests.report.directories import ONE, TWO, decay, write_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
HOSTILE = "<script>document.title = 'taken'</script>"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium or Chrome on PATH; Debian has it as the package chromium"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    for mode in ("pytorch", "jax"):
        for seed, matrix in enumerate((ONE, TWO)):
            write_run(folder / f"{mode}{seed}", matrix, mode=mode, seed=seed)
    write_run(folder / "long", decay(21), algo=HOSTILE)
    write_run(folder / "killed", ONE, seed=3, status=None)
    write_report([folder], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


def open_page(browser: Browser, report: Path, width: int, scheme: str = "light") -> tuple[Page, list[str]]:
    """Open the page; the list collects its requests, console messages and errors."""
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page = context.new_page()
    events: list[str] = []

    def on_request(request: Request) -> None:
        if not request.url.startswith("data:"):
            events.append(request.url)

    def on_console(message: ConsoleMessage) -> None:
        events.append(message.text)

    page.on("request", on_request)
    page.on("console", on_console)
    page.on("pageerror", lambda error: events.append(str(error)))
    page.goto(report.as_uri())
    return page, events


@pytest.mark.parametrize(("width", "shown"), [(1280, "desktop"), (390, "phone")])
def test_every_figure_is_drawn(browser: Browser, report: Path, width: int, shown: str) -> None:
    page, events = open_page(browser, report, width)
    assert events == [report.as_uri()]
    figures = page.locator("figure")
    assert figures.count() == 12
    for figure in figures.all():
        drawn = [svg for svg in figure.locator("svg").all() if svg.is_visible()]
        assert len(drawn) == 1
        assert figure.locator(f".{shown} svg").is_visible()
        box = drawn[0].bounding_box()
        assert box is not None
        assert box["width"] > 0.85 * min(width - 40, 64 * 16 - 40)
        assert box["height"] > 60
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") == width
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].filter(t => t.checkVisibility())"
        ".map(t => t.getBoundingClientRect()).map(box => Math.min(box.width, box.height)).filter(s => s > 0))"
    )
    assert smallest > 5
    page.context.close()


def test_a_name_with_html_is_text(browser: Browser, report: Path) -> None:
    page, _ = open_page(browser, report, 1280)
    assert page.title() == "SequeL report: rotateddigits; PyTorch, JAX"
    assert page.locator("h3", has_text=HOSTILE).count() == 1
    assert page.locator("svg:visible text", has_text=HOSTILE).count() >= 1
    assert page.locator("script").count() == 0
    page.context.close()


def test_both_themes(browser: Browser, report: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page, events = open_page(browser, report, 1280, scheme)
        colours[scheme] = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
            " getComputedStyle([...document.querySelectorAll('svg text')].find("
            "text => text.textContent == 'percent')).fill]"
        )
        assert len(events) == 1
        page.context.close()
    assert colours == {
        "light": ["rgb(254, 254, 254)", "rgb(31, 36, 48)", "rgb(31, 36, 48)"],
        "dark": ["rgb(23, 26, 33)", "rgb(230, 233, 239)", "rgb(230, 233, 239)"],
    }


def test_by_keyboard(browser: Browser, report: Path) -> None:
    """The first link skips to the content, wide tables scroll, and details open."""
    page, _ = open_page(browser, report, 390)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    assert page.locator(".skip").bounding_box()["x"] >= 0  # type: ignore[index]
    page.keyboard.press("Enter")
    page.wait_for_url("**#content")
    table = page.locator(".scroll").first
    table.focus()
    page.evaluate(
        "() => { window.scrolled = new Promise(done => document.querySelector('.scroll')"
        ".addEventListener('scroll', event => done(event.target.scrollLeft), {once: true})) }"
    )
    page.keyboard.press("ArrowRight")
    assert page.evaluate("window.scrolled") > 0
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open] table").first.is_visible()
    page.context.close()

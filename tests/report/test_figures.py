"""The contents of the figures, and the matplotlib settings that they must not change."""

import re
import subprocess
import sys
import warnings
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from sequel_core.report.figures import (
    DARK,
    LIGHT,
    Bar,
    Curve,
    Row,
    bars,
    curves,
    heat_map,
    matrix_picture,
    tips,
)
from sequel_core.report.svg import inline_svg
from tests.report.directories import NAN, ONE, decay

HOSTILE = "</text><script>alert('x')</script> $a_{b & \"c\""


def texts(svg: str, tag: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(tag)]


def test_matrix_picture() -> None:
    picture = matrix_picture(ONE, "splitdigits: test accuracy")
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    empty = matrix_picture(np.full((2, 2), NAN), "splitdigits: test accuracy")
    assert empty.shape == picture.shape  # loggers need images of one size
    assert (empty != picture).any()
    expected = 255 * np.array(matplotlib.colormaps["cividis"](0.9)[:3])
    close = np.abs(picture.astype(float) - expected).max(axis=2) < 2
    assert close.mean() > 0.1  # the cell of R[1, 1]
    assert not (np.abs(empty.astype(float) - expected).max(axis=2) < 2).mean() > 0.02  # the colour bar only


@pytest.mark.parametrize("size", [1, 20, 21, 100])
def test_matrix_picture_of_any_number_of_tasks(size: int) -> None:
    height, width, _ = matrix_picture(decay(size), HOSTILE * 9).shape
    assert width == 640
    assert height < 700


def test_a_matrix_of_percentages_raises() -> None:
    with pytest.raises(ValueError, match="matrix must hold fractions"):
        matrix_picture([[50.0]], "")


def test_cells_have_their_numbers_and_tooltips() -> None:
    svg = inline_svg(heat_map(ONE, 9), "a-")
    assert texts(svg, "title") == [
        "accuracy on task 1 after task 1: 90.00 %",
        "accuracy on task 1 after task 2: 50.00 %",
        "accuracy on task 2 after task 2: 80.00 %",
    ]
    assert {"90.0", "50.0", "80.0"} <= set(texts(svg, "text"))


def test_large_matrices_are_one_image() -> None:
    svg = inline_svg(heat_map(decay(100), 9), "a-")
    assert not texts(svg, "title")
    assert len(svg) < 40_000
    sources = re.findall(r'href="([^#"][^"]*)"', svg)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_points_of_curves_have_tooltips() -> None:
    lines = [
        Curve("ewc", [1, 2, 3], [90, 80, 70.5], [NAN, 1, 2], 0),
        Curve(HOSTILE, [1, 2], [50, 40], None, 7, dashed=True),
    ]
    svg = inline_svg(curves(lines, 4.2, "task", "accuracy (%)", boundaries=[2.5]), "a-")
    assert texts(svg, "title") == [
        "ewc, task 1: 90.00 %",
        "ewc, task 2: 80.00 %",
        "ewc, task 3: 70.50 %",
        f"{HOSTILE}, task 1: 50.00 %",
        f"{HOSTILE}, task 2: 40.00 %",
    ]
    assert "ewc" in texts(svg, "text")
    assert "<script" not in svg
    assert "stroke-dasharray" in svg


def test_long_curves_have_tooltips_on_some_points() -> None:
    steps = list(range(1000))
    svg = inline_svg(curves([Curve("a", steps, [50.0] * 1000, None, 0)], 9, "step", "accuracy"), "a-")
    assert len(texts(svg, "title")) == 25
    assert len(svg) < 60_000


@pytest.mark.parametrize("label", ["_private", ""])
def test_the_legend_shows_any_name(label: str) -> None:
    figure = curves([Curve(label, [1, 2], [50.0, 60.0], None, 0)], 9, "step", "accuracy")
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == [label]


def test_two_series_of_bars_have_tooltips_and_a_legend() -> None:
    given = [Bar("PyTorch", 0, 50, 5, [48, 52], "50.00 ± 5.00"), Bar("JAX", 1, -3, NAN, [-3], "-3.00")]
    svg = inline_svg(bars([Row("naive", given)], 9, "percent"), "a-")
    assert texts(svg, "title") == [
        "naive, PyTorch: 50.00 ± 5.00",
        "naive, JAX: -3.00",
        "naive, one run: 48.00",
        "naive, one run: 52.00",
    ]
    assert {"naive", "PyTorch", "JAX", "50.00 ± 5.00", "-3.00", "percent"} <= set(texts(svg, "text"))
    alone = Row("naive", [Bar("", 0, 0, NAN, [0], "0.00")])
    assert "naive: 0.00" in texts(inline_svg(bars([alone], 9, "percent"), "a-"), "title")


def test_an_axis_of_seconds_begins_at_zero_below_which_an_interval_may_reach() -> None:
    rows = [Row("naive", [Bar("", 0, 2.0, 6.0, [1.5, 2.5], "2.00 ± 6.00")])]
    assert bars(rows, 9, "seconds").axes[0].get_xlim()[0] < -4
    low, high = bars(rows, 9, "seconds", lowest=0.0).axes[0].get_xlim()
    assert low == 0
    assert high > 8


def test_svg_can_be_inlined_in_a_page() -> None:
    """Ids have the prefix and references are valid, colours are CSS variables, and there are no URLs."""
    rows = [Row("a", [Bar("x", 0, 1, NAN, [1], "1"), Bar("y", 1, 2, NAN, [2], "2")])]
    svg = inline_svg(bars(rows, 9, "percent"), "here-")
    identities = re.findall(r' id="([^"]*)"', svg)
    references = set(re.findall(r'(?:href="|url\()#([^")]*)', svg))
    assert len(set(identities)) == len(identities) > 2
    assert all(identity.startswith("here-") for identity in identities)
    assert references <= set(identities)
    assert "//" not in svg
    assert "xmlns" not in svg
    assert "<style" not in svg
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", svg))
    assert {"ink", "surface", "series-0", "series-1", "faint"} <= used <= set(LIGHT)
    assert not [colour for colour in LIGHT.values() if colour in svg]
    assert set(LIGHT) == set(DARK)


def contrast(one: str, other: str) -> float:
    """Return the contrast between two colours, as defined by WCAG 2.2."""

    def luminance(colour: str) -> float:
        parts = [c / 255 for c in bytes.fromhex(colour[1:])]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_text_and_lines_have_enough_contrast_in_both_themes(theme: dict[str, str]) -> None:
    for name, colour in theme.items():
        if name.startswith("series") or name == "ink":
            assert contrast(colour, theme["surface"]) >= 4.5


def test_numbers_have_enough_contrast_on_every_cell() -> None:
    svg = inline_svg(heat_map(np.linspace(0, 1, 100).reshape(10, 10), 9), "a-")
    cells = re.findall(r'<path d="[^"]*" clip-path="[^"]*" style="fill: (#[0-9a-f]{6});', svg)
    numbers = re.findall(r'<text style="([^"]*)"[^>]*>[\d.]+</text>', svg)
    numbers = [style for style in numbers if "var(--ink)" not in style]
    assert len(cells) == len(numbers) == 100
    for cell, style in zip(cells, numbers, strict=True):
        assert contrast(cell, "#ffffff" if "#ffffff" in style else "#000000") >= 4.5


def test_settings_of_matplotlib_are_restored() -> None:
    with matplotlib.rc_context({"font.size": 31.0, "svg.fonttype": "path", "text.parse_math": True}):
        before = dict(matplotlib.rcParams)
        figure = heat_map(ONE, 9, "$a_{b")  # not a valid formula
        inline_svg(figure, "a-")
        matrix_picture(ONE, "$a_{b")
        assert dict(matplotlib.rcParams) == before
        assert figure.get_suptitle() == "$a_{b"
    assert tips("a", "b") == '["a", "b"]'


def test_letters_that_the_font_lacks_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = inline_svg(heat_map(ONE, 9, "\N{CJK UNIFIED IDEOGRAPH-5B66} \N{ROCKET}"), "a-")
        matrix_picture(ONE, "\N{CJK UNIFIED IDEOGRAPH-5B66}")
    assert "\N{CJK UNIFIED IDEOGRAPH-5B66} \N{ROCKET}" in texts(svg, "text")


def test_matplotlib_loads_late_and_quietly(tmp_path: object) -> None:
    """The core does not load it, nothing loads pyplot, and a read-only home directory gives no warning."""
    code = (
        "import sys, sequel_core, sequel_core.cli\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from sequel_core.report.figures import matrix_picture\n"
        "matrix_picture([[0.5]], 'a')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={"HOME": "/nonexistent", "MPLCONFIGDIR": "/dev/null/none", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")

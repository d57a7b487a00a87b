"""Figures of runs: pure functions from numbers to a matplotlib `Figure`, for HTML, PNG and image loggers.

The functions do not use pyplot and restore matplotlib's settings. The `gid` of an artist is a JSON list of
its tooltips, which `sequel_core.report.svg` turns into `<title>` elements. Figures are drawn in the colours
of `LIGHT`; the page replaces them by CSS variables. Axis labels and tooltips number tasks from 1.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from sequel_core.objectives import ACCURACY, Score
from sequel_core.runs.formatting import number, scaling, score_text
from sequel_core.runs.metrics import check_matrix
from sequel_core.stream.arrays import FloatArray

MAX_TASKS = 20
"""With more tasks, a matrix is one image without numbers, and curves and tables show a selection."""

LIGHT = {
    "ink": "#1f2430",
    "faint": "#d5d9e0",
    "surface": "#fefefe",
    "series-0": "#0067b1",
    "series-1": "#c2410c",
    "series-2": "#00755a",
    "series-3": "#9b2f8f",
    "series-4": "#7a6200",
    "series-5": "#5b6472",
}
DARK = {
    "ink": "#e6e9ef",
    "faint": "#3a4150",
    "surface": "#171a21",
    "series-0": "#5db4f5",
    "series-1": "#ff9a5c",
    "series-2": "#3ccfa4",
    "series-3": "#ea8fdf",
    "series-4": "#e3c63f",
    "series-5": "#aab2c0",
}
"""The colours of the light and the dark theme; the keys are the CSS variables of the page."""

MARKERS_PER_CURVE = 25
"""A curve with at least twice as many points has markers and tooltips on evenly spaced points only."""

SERIES = [colour for name, colour in LIGHT.items() if name.startswith("series")]
MARKERS = "os^DvPX"
DASHES = ("-", (0, (4, 1.6)))
COLOURS = matplotlib.colormaps["cividis"]  # perceptually uniform, also for colour-blind readers
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # shipped with matplotlib
    "font.size": 9,
    "text.parse_math": False,  # do not read $...$ in a name as a formula
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["ink"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": LIGHT["surface"],
    "grid.color": LIGHT["faint"],
    "hatch.linewidth": 1.5,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "none",  # keep text as <text>, in the font of the page
    "svg.hashsalt": "sequel",  # equal numbers give equal files
    "xtick.color": LIGHT["ink"],
    "ytick.color": LIGHT["ink"],
}
INCHES_PER_LETTER = 0.078  # average width in the font above


class Curve(NamedTuple):
    """A line of scores over x, in percent if they are fractions."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float] | None  # half-width of the interval around each y, nan for none; None draws no band
    style: int  # index of the colour and the marker
    dashed: bool = False


class Bar(NamedTuple):
    """A mean with its interval and the values it is the mean of."""

    series: str  # name in the legend
    style: int  # index of the colour; odd ones are hatched
    mean: float
    half: float  # half-width of the interval, nan for none
    values: Sequence[float]
    text: str  # written at the end of the bar
    digits: int | None = 2  # decimals in the tooltips of the values; None for four significant digits


class Row(NamedTuple):
    """A group of bars under one heading."""

    label: str
    bars: Sequence[Bar]


@contextmanager
def figure_style() -> Iterator[None]:
    """Use our matplotlib style in a `with` block, then restore the user's; wrap both drawing and saving."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        # a PNG shows a box for a letter that the font lacks; browsers use another font
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def heat_map(matrix: ArrayLike, width: float, title: str = "", score: Score = ACCURACY) -> Figure:
    """Draw a matrix of scores as a heat map; the better a score, the brighter its colour.

    The colours of fractions go from 0 to 100 %, those of other scores from the lowest to the highest entry.
    Entries without an evaluation stay empty.

    Args:
        matrix: `[T, T]`, scores, nan if not evaluated.
        width: width of the figure in inches, > 2.
        title: text above the figure; empty for none.
        score: what the entries are.

    Returns:
        The figure; its height depends on T.

    Raises:
        ValueError: the matrix is not square, or an entry is not such a score.

    Example:
        >>> figure = heat_map([[0.9, float("nan")], [0.5, 0.8]], width=6)
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['90.0', '50.0', '80.0']
    """
    r = check_matrix(matrix, score)
    colours = _colours(r, score)
    size = len(r)
    cell = (width - 1.3) / size
    row = 0.36 if size <= 10 else min(0.28, max(0.17, cell))
    height = 1 + size * row if size <= MAX_TASKS else min(0.75 * width, 6.0)
    with figure_style():
        figure = Figure((width, height), layout="constrained")
        axes, colour_bar = figure.subplots(1, 2, width_ratios=[width - 0.7, 0.12])
        if title:
            figure.suptitle(_truncated(title, width))
        if size <= MAX_TASKS:
            _cells(axes, r, cell, score, colours)
        else:
            axes.imshow(r, cmap=colours[0], norm=colours[1], aspect="auto", interpolation="none")
        step = math.ceil(size / max(1, int((width - 1.3) / 0.26)))
        ticks = range(step - 1 if step > 1 else 0, size, step)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        axes.set(xlabel=f"{score.name} on task", ylabel="after task")
        axes.set_xticks(ticks, [str(j + 1) for j in ticks])
        axes.set_yticks(ticks, [str(i + 1) for i in ticks])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        _colour_bar(colour_bar, score, colours)
    return figure


Colours = tuple[Colormap, Normalize]


def _colours(r: FloatArray, score: Score) -> Colours:
    """Return the colours of the scores in a matrix."""
    finite = r[np.isfinite(r)]
    low, high = (0.0, 1.0) if score.fraction or not finite.size else (finite.min(), finite.max())
    return COLOURS if score.higher_is_better else COLOURS.reversed(), Normalize(low, high)


def _colour_bar(axes: Axes, score: Score, colours: Colours) -> None:
    """Draw the colours of the scores with the lowest, the middle and the highest."""
    colour_map, norm = colours
    ends: FloatArray = np.asarray(norm.inverse([0, 0.5, 1]))
    axes.imshow(np.linspace(1, 0, 128)[:, None], cmap=colour_map, aspect="auto", extent=(0, 1, 0, 100))
    axes.set_xticks([])
    labels = [f"{100 * v:.0f} %" if score.fraction else f"{v:.3g}" for v in ends]
    axes.set_yticks([0, 50, 100], labels)
    axes.yaxis.tick_right()
    axes.spines[:].set_visible(False)


def _cells(axes: Axes, r: FloatArray, width: float, score: Score, colours: Colours) -> None:
    """Draw each entry as a rectangle with a tooltip, and its number if the cell is wide enough."""
    colour_map, norm = colours
    digits, points = (1, 8.5) if width >= 0.42 else (1, 7.0) if width >= 0.34 else (0, 7.5)
    for (i, j), value in np.ndenumerate(r):
        if math.isnan(value):
            continue
        colour = to_hex(colour_map(float(norm(value))))
        tip = f"{score.name} on task {j + 1} after task {i + 1}: {score_text(value, score)}"
        text = f"{100 * value:.{digits}f}" if score.fraction else f"{value:.{digits + 2}g}"
        axes.add_patch(
            Rectangle(
                (j - 0.5, i - 0.5), 1, 1, facecolor=colour, edgecolor=LIGHT["surface"], gid=tips(tip),
                in_layout=False,  # measuring every cell would dominate the run time
            )
        )  # fmt: skip
        if width >= 0.2:
            axes.text(
                j, i, text, ha="center", va="center", size=points, in_layout=False,
                color="#ffffff" if _luminance(colour) < 0.18 else "#000000",
            )  # fmt: skip


def curves(
    lines: Sequence[Curve],
    width: float,
    x_label: str,
    y_label: str,
    score: Score = ACCURACY,
    *,
    limits: tuple[float, float] | None = None,
    boundaries: Sequence[float] = (),
) -> Figure:
    """Draw scores over the stream, with intervals as bands.

    Lines differ by colour, marker and dashes.

    Args:
        lines: the curves, in the order of the legend.
        width: width of the figure in inches, > 2.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
        score: what the lines show.
        limits: lower and upper end of the vertical axis; None fits it to the lines.
        boundaries: x values at which a task ends, drawn as thin vertical lines.

    Returns:
        The figure; its height depends on the length of the legend.

    Example:
        >>> line = Curve("naive", x=[1, 2], y=[90.0, 65.0], half=None, style=0)
        >>> figure = curves([line], width=6, x_label="tasks trained", y_label="accuracy (%)")
        >>> figure.axes[0].get_xlabel()
        'tasks trained'
    """
    labels = [_in_legend(_truncated(line.label, width - 0.9)) for line in lines]
    columns = max(1, int(width / (0.75 + INCHES_PER_LETTER * max(map(len, labels), default=1))))
    height = min(0.62 * width, 3.4) + 0.2 * math.ceil(len(lines) / columns)
    with figure_style():
        figure = Figure((width, height), layout="constrained")
        axes = figure.subplots()
        for end in boundaries:
            axes.axvline(end, color=LIGHT["faint"], linewidth=0.8)
        for label, line in zip(labels, lines, strict=True):
            _curve(axes, line, label, x_label, score)
        axes.set(xlabel=x_label, ylabel=y_label)
        if limits is not None:
            axes.set_ylim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid(axis="y")
        figure.legend(loc="outside lower left", ncols=columns)
    return figure


def curve_text(y: float, score: Score) -> str:
    """Return a y of a curve with its unit."""
    return score_text(y / scaling(score)[0], score)


def _curve(axes: Axes, line: Curve, label: str, x_label: str, score: Score) -> None:
    """Draw one line with its tooltips and its band."""
    colour, every = SERIES[line.style % len(SERIES)], max(1, len(line.x) // MARKERS_PER_CURVE)
    points = zip(line.x[::every], line.y[::every], strict=True)
    axes.plot(
        line.x, line.y, label=label, color=colour, linestyle=DASHES[line.dashed],
        marker=MARKERS[line.style % len(MARKERS)], markevery=every,
        markerfacecolor=LIGHT["surface"] if line.dashed else colour,
        gid=tips(*(f"{line.label}, {x_label} {x:g}: {curve_text(y, score)}" for x, y in points)),
    )  # fmt: skip
    if line.half is not None and np.isfinite(line.half).any():
        low, high = np.subtract(line.y, line.half), np.add(line.y, line.half)
        axes.fill_between(line.x, low, high, color=colour, alpha=0.16, linewidth=0)


def bars(rows: Sequence[Row], width: float, x_label: str, lowest: float = -math.inf) -> Figure:
    """Draw means as horizontal bars, with their intervals and the single values as points.

    Args:
        rows: groups of bars, from top to bottom.
        width: width of the figure in inches, > 2.
        x_label: label of the horizontal axis.
        lowest: smallest possible value, at which the axis and the intervals end.

    Returns:
        The figure; its height depends on the number of bars. It has a legend if there are two series or more.

    Example:
        >>> bar = Bar("", style=0, mean=70.0, half=5.0, values=[69.6, 70.4], text="70.00 ± 5.00")
        >>> figure = bars([Row("naive", [bar])], width=6, x_label="percent")
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['naive', '70.00 ± 5.00']
    """
    everything = [bar for row in rows for bar in row.bars]
    styles = {bar.series: bar.style for bar in everything}
    height = sum(0.34 + 0.22 * len(row.bars) for row in rows) + (0.95 if len(styles) > 1 else 0.65)
    with figure_style():
        figure = Figure((width, height), layout="constrained")
        axes = figure.subplots()
        y = 0.0
        for row in rows:
            label, transform = _truncated(row.label, width), axes.get_yaxis_transform()
            box = {"facecolor": LIGHT["surface"], "linewidth": 0, "pad": 1}  # hides the grid behind the label
            axes.text(0.005, y + 0.2, label, transform=transform, va="center", weight="bold", bbox=box)
            y += 0.32
            for bar in row.bars:
                _bar(axes, row.label, bar, y + 0.11)
                y += 0.22
            y += 0.02
        axes.set(xlim=_limits(everything, width, lowest), ylim=(y, 0), xlabel=x_label)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.axvline(0, color=LIGHT["ink"], linewidth=0.8)
        if len(styles) > 1:
            handles = [
                Rectangle((0, 0), 1, 1, label=_in_legend(series), **_fill(style))
                for series, style in styles.items()
            ]
            figure.legend(handles=handles, loc="outside lower left", ncols=len(styles))
    return figure


def _limits(drawn: Sequence[Bar], width: float, lowest: float) -> tuple[float, float]:
    """Return the ends of the horizontal axis, with space for the texts right of the bars."""
    ends = [value for bar in drawn for value in (0.0, *bar.values, *_interval(bar))]
    low, high = max(lowest, min(ends, default=0.0)), max(ends, default=0.0)
    letters = max((len(bar.text) for bar in drawn), default=0)
    space = min(0.6, INCHES_PER_LETTER * (letters + 2) / (width - 0.4))
    span = (high - low or 1.0) / (1 - space)
    return low - (0.02 * span if low < 0 else 0), low + span


def _bar(axes: Axes, label: str, bar: Bar, y: float) -> None:
    """Draw one bar with its tooltip, interval, values and text."""
    tip = f"{label}, {bar.series}: {bar.text}" if bar.series else f"{label}: {bar.text}"
    axes.add_patch(Rectangle((0, y - 0.09), bar.mean, 0.18, gid=tips(tip), **_fill(bar.style)))
    low, high = _interval(bar)
    if high > low:
        axes.plot([low, high], [y, y], color=LIGHT["ink"], marker="|", linewidth=1.2)
    if len(bar.values) > 1:
        axes.plot(
            bar.values, [y] * len(bar.values), "o", markersize=3.5, color=LIGHT["surface"],
            markeredgecolor=LIGHT["ink"], markeredgewidth=0.8,
            gid=tips(*(f"{label}, one run: {number(value, digits=bar.digits)}" for value in bar.values)),
        )  # fmt: skip
    end = max([0.0, high, *bar.values])
    axes.annotate(bar.text, (end, y), xytext=(5, 0), textcoords="offset points", va="center", size=8.5)


def _interval(bar: Bar) -> tuple[float, float]:
    half = 0.0 if math.isnan(bar.half) else bar.half
    return bar.mean - half, bar.mean + half


def _fill(style: int) -> dict[str, Any]:
    """Return the colours of a bar; odd styles are hatched, so that two series differ without colour."""
    colour = SERIES[style % len(SERIES)]
    return {"facecolor": colour, "edgecolor": LIGHT["surface"], "hatch": "////" if style % 2 else None}


def matrix_picture(matrix: ArrayLike, title: str, score: Score = ACCURACY) -> NDArray[np.uint8]:
    """Draw a matrix of scores as an image for image loggers.

    Args:
        matrix: `[T, T]`, scores, nan if not evaluated.
        title: text above the heat map.
        score: what the entries are.

    Returns:
        RGB image, uint8 `[H, W, 3]`. Its size depends on T only, so all images of a run have the same size.

    Raises:
        ValueError: the matrix is not square, or an entry is not such a score.

    Example:
        >>> matrix_picture([[0.9, float("nan")], [0.5, 0.8]], "test accuracy").shape
        (172, 640, 3)
    """
    figure = heat_map(matrix, 6.4, title, score)
    with figure_style():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def tips(*texts: str) -> str:
    """Return the `gid` that gives an artist tooltips.

    Args:
        *texts: one for each marker of the artist, or one for an artist without markers.

    Returns:
        A JSON list, which `sequel_core.report.svg.inline_svg` reads.

    Example:
        >>> tips("task 1: 90.00 %", "task 2: 80.00 %")
        '["task 1: 90.00 %", "task 2: 80.00 %"]'
    """
    return json.dumps(texts)


def _in_legend(label: str) -> str:
    """Return a label that matplotlib shows; it omits labels that are empty or start with an underscore."""
    return f" {label}" if label[:1] in ("", "_") else label


def _truncated(text: str, width: float) -> str:
    """Cut a text that is longer than a width in inches, and end it with an ellipsis."""
    letters = max(4, int(width / INCHES_PER_LETTER))
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def _luminance(colour: str) -> float:
    """Return the relative luminance of `#rrggbb`, as defined by WCAG 2."""
    parts: Iterable[int] = bytes.fromhex(colour[1:])
    red, green, blue = (c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue

"""Figures of runs: pure functions from numbers to a matplotlib `Figure`, for HTML, PNG and image loggers.

They use neither pyplot nor any global state that stays changed. An artist's `gid` holds the texts of its
tooltips as a JSON list, which `sequel_core.report.svg` turns into `<title>` elements. Colours are those of
`LIGHT`; the page puts its own in their place. Tasks are numbered from 1 in what is shown.
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
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from sequel_core.runs.metrics import check_matrix
from sequel_core.stream.arrays import FloatArray

LARGEST = 20
"""Tasks up to which every entry of a matrix has its number and its tooltip, and every task its curve."""

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
"""The colours of the two themes, by the names of the page's CSS variables."""

MARKED = 25
"""Points of a curve from twice as many on not every one has a marker and a tooltip."""

SERIES = [colour for name, colour in LIGHT.items() if name.startswith("series")]
MARKERS = "os^DvPX"
DASHES = ("-", (0, (4, 1.6)))
COLOURS = matplotlib.colormaps["cividis"]  # of accuracies: made for colour-blind readers, evenly lighter
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # which matplotlib ships
    "font.size": 9,
    "text.parse_math": False,  # a name with dollars is a name
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
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "svg.hashsalt": "sequel",  # the same file for the same numbers
    "xtick.color": LIGHT["ink"],
    "ytick.color": LIGHT["ink"],
}
INCHES_PER_LETTER = 0.078  # of the font above, on average


class Curve(NamedTuple):
    """A line of percentages over x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float] | None  # half of the interval around each value, nan for none; None for no interval
    kind: int  # colour and marker
    dashed: bool = False


class Bar(NamedTuple):
    """A mean, half of its interval (nan for none) and the single values behind it."""

    series: str  # what the legend calls it
    kind: int  # colour and hatch
    mean: float
    half: float
    values: Sequence[float]
    text: str  # the mean with its interval


class Row(NamedTuple):
    """Bars that lie together under one heading."""

    label: str
    bars: Sequence[Bar]


@contextmanager
def figure_style() -> Iterator[None]:
    """Set our style for a while, whatever the user has set; drawing and saving both need it."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        # a letter that the font lacks is a box in a PNG; a page has fonts of its own
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def heat_map(matrix: ArrayLike, width: float, title: str = "") -> Figure:
    """Draw an accuracy matrix, colours from 0 to 100 %; what was not evaluated stays empty.

    Args:
        matrix: `[T, T]`, fractions, nan where not evaluated.
        width: of the figure, inches.
        title: above the figure; empty for none.

    Raises:
        ValueError: as `sequel_core.runs.metrics.check_matrix`.
    """
    r = check_matrix(matrix)
    size = len(r)
    cell = (width - 1.3) / size
    row = 0.36 if size <= 10 else min(0.28, max(0.17, cell))
    height = 1 + size * row if size <= LARGEST else min(0.75 * width, 6.0)
    with figure_style():
        figure = Figure((width, height), layout="constrained")
        axes, scale = figure.subplots(1, 2, width_ratios=[width - 0.7, 0.12])
        if title:
            figure.suptitle(_shortened(title, width))
        if size <= LARGEST:
            _cells(axes, r, cell)
        else:
            axes.imshow(r, cmap=COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="none")
        step = math.ceil(size / max(1, int((width - 1.3) / 0.26)))
        ticks = range(step - 1 if step > 1 else 0, size, step)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        axes.set(xlabel="accuracy on task", ylabel="after task")
        axes.set_xticks(ticks, [str(j + 1) for j in ticks])
        axes.set_yticks(ticks, [str(i + 1) for i in ticks])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        scale.imshow(np.linspace(1, 0, 128)[:, None], cmap=COLOURS, aspect="auto", extent=(0, 1, 0, 100))
        scale.set_xticks([])
        scale.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
        scale.yaxis.tick_right()
        scale.spines[:].set_visible(False)
    return figure


def _cells(axes: Axes, r: FloatArray, width: float) -> None:
    """Draw each entry as a rectangle with a tooltip and, where it fits, its number."""
    digits, points = (1, 8.5) if width >= 0.42 else (1, 7.0) if width >= 0.34 else (0, 7.5)
    for (i, j), value in np.ndenumerate(r):
        if math.isnan(value):
            continue
        colour = to_hex(COLOURS(value))
        tip = f"accuracy on task {j + 1} after task {i + 1}: {100 * value:.2f} %"
        axes.add_patch(
            Rectangle(
                (j - 0.5, i - 0.5), 1, 1, facecolor=colour, edgecolor=LIGHT["surface"], gid=tips(tip),
                in_layout=False,  # measuring every cell would take most of the time
            )
        )  # fmt: skip
        if width >= 0.2:
            axes.text(
                j, i, f"{100 * value:.{digits}f}", ha="center", va="center", size=points, in_layout=False,
                color="#ffffff" if _luminance(colour) < 0.18 else "#000000",
            )  # fmt: skip


def curves(
    lines: Sequence[Curve],
    width: float,
    x_label: str,
    y_label: str,
    *,
    limits: tuple[float, float] | None = None,
    boundaries: Sequence[float] = (),
) -> Figure:
    """Draw percentages over the stream, told apart by colour, marker and dashes; intervals as bands.

    Args:
        lines: what to draw, in the order of the legend.
        width: of the figure, inches.
        x_label: under the axis.
        y_label: beside the axis.
        limits: of the vertical axis; None for what the lines need.
        boundaries: x where a task ends, each a thin vertical line.
    """
    labels = [_in_legend(_shortened(line.label, width - 0.9)) for line in lines]
    columns = max(1, int(width / (0.75 + INCHES_PER_LETTER * max(map(len, labels), default=1))))
    height = min(0.62 * width, 3.4) + 0.2 * math.ceil(len(lines) / columns)
    with figure_style():
        figure = Figure((width, height), layout="constrained")
        axes = figure.subplots()
        for end in boundaries:
            axes.axvline(end, color=LIGHT["faint"], linewidth=0.8)
        for label, (name, x, y, half, kind, dashed) in zip(labels, lines, strict=True):
            colour, every = SERIES[kind % len(SERIES)], max(1, len(x) // MARKED)
            marked = zip(x[::every], y[::every], strict=True)
            axes.plot(
                x, y, label=label, color=colour, linestyle=DASHES[dashed],
                marker=MARKERS[kind % len(MARKERS)], markevery=every,
                markerfacecolor=LIGHT["surface"] if dashed else colour,
                gid=tips(*(f"{name}, {x_label} {a:g}: {b:.2f} %" for a, b in marked)),
            )  # fmt: skip
            if half is not None and np.isfinite(half).any():
                low, high = np.subtract(y, half), np.add(y, half)
                axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.set(xlabel=x_label, ylabel=y_label)
        if limits is not None:
            axes.set_ylim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid(axis="y")
        figure.legend(loc="outside lower left", ncols=columns)
    return figure


def bars(rows: Sequence[Row], width: float, x_label: str) -> Figure:
    """Draw means as bars, with their intervals and the single values as points.

    Args:
        rows: from the top.
        width: of the figure, inches.
        x_label: under the axis.
    """
    depth = sum(0.34 + 0.22 * len(row.bars) for row in rows)
    kinds = {bar.series: bar.kind for row in rows for bar in row.bars}
    everything = [bar for row in rows for bar in row.bars]
    ends = [value for bar in everything for value in (0.0, *bar.values, *_interval(bar))]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    letters = max((len(bar.text) for bar in everything), default=0)
    room = min(0.6, INCHES_PER_LETTER * (letters + 2) / (width - 0.4))
    with figure_style():
        figure = Figure((width, depth + (0.95 if len(kinds) > 1 else 0.65)), layout="constrained")
        axes = figure.subplots()
        y = 0.0
        for row in rows:
            label, place = _shortened(row.label, width), axes.get_yaxis_transform()
            behind = {"facecolor": LIGHT["surface"], "linewidth": 0, "pad": 1}  # hides the lines of the axes
            axes.text(0.005, y + 0.2, label, transform=place, va="center", weight="bold", bbox=behind)
            y += 0.32
            for bar in row.bars:
                _bar(axes, row.label, bar, y + 0.11)
                y += 0.22
            y += 0.02
        span = (high - low or 1.0) / (1 - room)
        axes.set(xlim=(low - (0.02 * span if low < 0 else 0), low + span), ylim=(y, 0), xlabel=x_label)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.axvline(0, color=LIGHT["ink"], linewidth=0.8)
        if len(kinds) > 1:
            handles = [
                Rectangle((0, 0), 1, 1, label=_in_legend(name), **_filling(kind))
                for name, kind in kinds.items()
            ]
            figure.legend(handles=handles, loc="outside lower left", ncols=len(kinds))
    return figure


def _bar(axes: Axes, label: str, bar: Bar, y: float) -> None:
    about = f"{label}, {bar.series}: {bar.text}" if bar.series else f"{label}: {bar.text}"
    axes.add_patch(Rectangle((0, y - 0.09), bar.mean, 0.18, gid=tips(about), **_filling(bar.kind)))
    low, high = _interval(bar)
    if high > low:
        axes.plot([low, high], [y, y], color=LIGHT["ink"], marker="|", linewidth=1.2)
    if len(bar.values) > 1:
        axes.plot(
            bar.values, [y] * len(bar.values), "o", markersize=3.5, color=LIGHT["surface"],
            markeredgecolor=LIGHT["ink"], markeredgewidth=0.8,
            gid=tips(*(f"{label}, one run: {value:.2f}" for value in bar.values)),
        )  # fmt: skip
    end = max([0.0, high, *bar.values])
    axes.annotate(bar.text, (end, y), xytext=(5, 0), textcoords="offset points", va="center", size=8.5)


def _interval(bar: Bar) -> tuple[float, float]:
    half = 0.0 if math.isnan(bar.half) else bar.half
    return bar.mean - half, bar.mean + half


def _filling(kind: int) -> dict[str, Any]:
    """Return the colour of a bar; odd kinds are hatched, so that two of them differ without colour, too."""
    colour = SERIES[kind % len(SERIES)]
    return {"facecolor": colour, "edgecolor": LIGHT["surface"], "hatch": "////" if kind % 2 else None}


def matrix_picture(matrix: ArrayLike, title: str) -> NDArray[np.uint8]:
    """Return an accuracy matrix as a picture for image loggers, uint8 `[H, W, 3]`.

    Its size depends on the number of tasks alone, so that the pictures of one run are of one size.

    Args:
        matrix: `[T, T]`, fractions, nan where not evaluated.
        title: above it.

    Raises:
        ValueError: as `sequel_core.runs.metrics.check_matrix`.
    """
    figure = heat_map(matrix, 6.4, title)
    with figure_style():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def tips(*texts: str) -> str:
    """Return the `gid` of an artist whose points, or which itself, have these tooltips."""
    return json.dumps(texts)


def _in_legend(label: str) -> str:
    """Return a label that matplotlib shows: one that is empty or begins with an underscore it leaves out."""
    return f" {label}" if label[:1] in ("", "_") else label


def _shortened(text: str, width: float) -> str:
    """Return a text of one line that fits into a width in inches."""
    letters = max(4, int(width / INCHES_PER_LETTER))
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def _luminance(colour: str) -> float:
    """Return the relative luminance of `#rrggbb`, as the contrast of WCAG 2 defines it."""
    parts: Iterable[int] = bytes.fromhex(colour[1:])
    red, green, blue = (c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue

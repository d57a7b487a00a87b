"""Text that several tables share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sequel_core.objectives import Score


def number(value: float, scale: float = 1.0, digits: int | None = 2) -> str:
    """Return a number as text; `-` for nan.

    Args:
        value: the number.
        scale: factor, for example 100 for percent.
        digits: decimals, >= 0; None for four significant digits.

    Example:
        >>> number(46.305), number(0.25, 100, 0), number(0.0123456, digits=None), number(float("nan"))
        ('46.30', '25', '0.01235', '-')
    """
    if math.isnan(value):
        return "-"
    return f"{scale * value:.4g}" if digits is None else f"{scale * value:,.{digits}f}"


def scaling(score: Score) -> tuple[float, int | None]:
    """Return `scale` and `digits` of `number` for a score: fractions are shown in percent.

    Example:
        >>> scaling(Score("accuracy")), scaling(Score("reward", fraction=False))
        ((100.0, 2), (1.0, None))
    """
    return (100.0, 2) if score.fraction else (1.0, None)


def score_text(value: float, score: Score) -> str:
    """Return a score, or a difference of scores, with its unit.

    Example:
        >>> score_text(0.4631, Score("accuracy")), score_text(0.5, Score("reward", fraction=False))
        ('46.31 %', '0.5')
    """
    return number(value, *scaling(score)) + (" %" if score.fraction else "")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]], align: str = "---") -> str:
    """Return a Markdown table.

    Args:
        header: name of each column.
        rows: cells, one per column: text, integers, floats, or None for an empty cell.
        align: delimiter of the columns after the first; `---:` aligns them to the right.

    Example:
        >>> print(markdown_table(["task", "accuracy"], [[0, 0.9]]))
        | task | accuracy |
        | --- | --- |
        | 0 | 0.9000 |
    """
    delimiters = ["---", *[align] * (len(header) - 1)]
    cells = [[_cell(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, delimiters, *cells))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)

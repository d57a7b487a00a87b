"""Text that several tables share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def two_decimals(number: float) -> str:
    """Return a number with two decimals; `-` for nan.

    Example:
        >>> two_decimals(46.305), two_decimals(float("nan"))
        ('46.30', '-')
    """
    return "-" if math.isnan(number) else f"{number:.2f}"


def percent(fraction: float) -> str:
    """Return a fraction in percent with two decimals, without the sign; `-` for nan.

    Example:
        >>> percent(0.4631), percent(float("nan"))
        ('46.31', '-')
    """
    return two_decimals(100 * fraction)


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

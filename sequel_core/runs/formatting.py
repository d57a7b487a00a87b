"""Text that several tables share."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percent(fraction: float) -> str:
    """Return a fraction in percent with two decimals, without the sign; `-` for nan.

    Example:
        >>> percent(0.4631), percent(float("nan"))
        ('46.31', '-')
    """
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---") -> str:
    """Return a Markdown table.

    Args:
        header: name of each column.
        rows: cells, one per column.
        align: delimiter of the columns after the first; `---:` aligns them to the right.

    Example:
        >>> print(markdown_table(["task", "accuracy"], [["0", "0.9"]]))
        | task | accuracy |
        | --- | --- |
        | 0 | 0.9 |
    """
    delimiters = ["---", *[align] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, delimiters, *rows))

"""Reports of runs: one HTML file that stands alone, its figures as PNG, its tables as Markdown.

`write_report` writes them; `sequel_core.report.figures` draws them with matplotlib, which nothing else in the
core loads.
"""

from __future__ import annotations

import logging

_logger = logging.getLogger("matplotlib")
_level = _logger.level
_logger.setLevel(logging.ERROR)  # while it loads, it warns of a home that it cannot write to; no matter here
try:
    from sequel_core.report.page import write_report
finally:
    _logger.setLevel(_level)

__all__ = ["write_report"]

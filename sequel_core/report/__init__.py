"""Reports of runs: a self-contained HTML page, and its figures as PNG and tables as Markdown.

`write_report` writes a report. This package is the only one in the core that loads matplotlib.
"""

from __future__ import annotations

import logging

_logger = logging.getLogger("matplotlib")
_level = _logger.level
_logger.setLevel(logging.ERROR)  # on import it warns if the home directory is read-only
try:
    from sequel_core.report.page import write_report
finally:
    _logger.setLevel(_level)

__all__ = ["write_report"]

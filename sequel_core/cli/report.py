"""`sequel report`: one HTML file about runs, and their figures and tables as PNG and Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from rich.console import Console

from sequel_core.cli.arguments import Parser

EXAMPLES = """examples:
  sequel report runs/2025-01-31_12-00-00_sweep       all runs of a sweep, seeds together
  sequel report naive_jax ewc_jax -o both.html       two runs beside each other
  sequel report runs --png figures --markdown report.md

A file that an earlier report wrote is replaced; any other is kept unless --force is given. Runs that differ
in their seeds alone are one configuration. A run that did not finish is shown as far as it got, and counts in
no mean.
"""


def main(args: Sequence[str]) -> int:
    """Run the command line of `sequel report`.

    Returns:
        0.

    Raises:
        ValueError: no run that can be read, or a file that cannot be written; nothing was written.
    """
    parser = Parser(
        prog="sequel report",
        description="Write one HTML file about runs: it needs no other file and no network.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "run directories, or folders that hold some at any depth"
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help=what)
    output = "the HTML file (default: report.html)"
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help=output)
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write the figures there, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    parser.add_argument("--force", action="store_true", help="overwrite files that no report wrote")
    options = parser.parse_args(args)
    study = import_module("sequel_core.report").write_report(
        options.directories, options.output, png=options.png, markdown=options.markdown, force=options.force
    )
    say = partial(Console().print, highlight=False, markup=False, soft_wrap=True)
    for note in study.notes:
        say(f"note: left out: {note}")
    for run in study.runs:
        if not run.finished:
            say(f"note: {run.name}: {run.status}, counts in no mean")
    for written in (options.output, options.markdown, options.png):
        if written is not None:
            say(f"written to {written}")
    return 0

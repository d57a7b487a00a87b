"""`sequel report`: an HTML report of runs, and its figures and tables as PNG and Markdown."""

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
  sequel report naive_jax ewc_jax -o both.html       two runs side by side
  sequel report runs --png figures --markdown report.md

Files of an earlier report are replaced. Any other file is kept unless --force is given. Runs that differ
only in their seeds are one configuration. A run that did not finish is shown up to where it stopped and is
not part of any mean.
"""


def main(args: Sequence[str]) -> int:
    """Run the command line of `sequel report`.

    Returns:
        0.

    Raises:
        ValueError: there is no readable run, or a file cannot be written. Nothing is written.
    """
    parser = Parser(
        prog="sequel report",
        description="Write an HTML report of runs: one file that needs no other file and no network.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "run directories, or folders that contain some at any depth"
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help=what)
    output = "the HTML file (default: report.html)"
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help=output)
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also write the figures to this folder")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to this file")
    parser.add_argument("--force", action="store_true", help="overwrite files that are not reports")
    options = parser.parse_args(args)
    study = import_module("sequel_core.report").write_report(
        options.directories, options.output, png=options.png, markdown=options.markdown, force=options.force
    )
    say = partial(Console().print, highlight=False, markup=False, soft_wrap=True)
    for note in study.notes:
        say(f"note: skipped: {note}")
    for run in study.runs:
        if not run.finished:
            say(f"note: {run.name}: {run.status}, not part of any mean")
    for written in (options.output, options.markdown, options.png):
        if written is not None:
            say(f"written to {written}")
    return 0

"""`sequel list`: the algorithms, benchmarks, backbones, ... with their settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from importlib.resources.abc import Traversable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sequel_core.cli.arguments import Parser
from sequel_core.experiment.schema import (
    CLASSES,
    Setting,
    choices,
    settings,
    summary,
)
from sequel_core.settings import as_text, check_name

SECTIONS = (
    "algo",
    "benchmark",
    "backbone",
    "optimizer",
    "logger",
    "training",
    "checkpoint",
    "jax",
    "experiment",
)


def main(args: Sequence[str]) -> int:
    """Print tables of algorithms, benchmarks, ... with their settings; all of them if no section is given.

    Raises:
        ValueError: an unknown section.
    """
    parser = Parser(prog="sequel list", description="List all choices with settings, defaults and ranges.")
    parser.add_argument("section", nargs="?", metavar="SECTION", help=", ".join(SECTIONS))
    section = parser.parse_args(args).section
    if section is not None:
        section = section.removesuffix("s")
        check_name("section", section, SECTIONS)
    console = Console()
    for name in SECTIONS if section is None else [section]:
        for table in _tables(name):
            console.print(table)
    return 0


def _tables(section: str) -> Iterable[Table]:
    if section == "experiment":
        yield _experiments()
    elif section in CLASSES and section != "optimizer":
        yield _settings(f"{section}=...", summary(section), settings(section), section)
    else:
        for name in choices(section):
            prefix = f"logger.{name}" if section == "logger" else section
            yield _settings(f"{section}={name}", summary(section, name), settings(section, name), prefix)


def _remarks(path: Traversable) -> list[str]:
    """Return the comments that begin a line of a YAML file."""
    return [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]


def _settings(title: str, text: str, specs: Iterable[Setting], section: str) -> Table:
    table = Table(title=f"[bold]{title}[/bold]  {escape(text)}", title_justify="left", title_style="")
    for column in ("setting", "default", "range", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "setting")
    for spec in specs:
        table.add_row(f"{section}.{spec.key}", as_text(spec.default), spec.allowed, spec.help)
    return table


def _experiments() -> Table:
    """Return a table of the shipped experiments with the first lines of their files."""
    table = Table(title="[bold]+experiment=...[/bold]", title_justify="left", title_style="")
    table.add_column("name")
    table.add_column("about", overflow="fold")
    files = resources.files("sequel_configs").joinpath("experiment").iterdir()
    for path in sorted(files, key=lambda item: item.name):
        if path.name.endswith(".yaml"):
            about = [line for line in _remarks(path) if not line.startswith("@package")]
            table.add_row(path.name.removesuffix(".yaml"), "\n".join(about))
    return table

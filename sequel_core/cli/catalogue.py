"""`sequel list`: the algorithms, benchmarks, backbones, ... with their settings."""

from __future__ import annotations

import argparse
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
from sequel_core.settings import as_text, check_name, nearest

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


NAMED = ("algo", "benchmark", "backbone", "optimizer", "logger", "experiment")
"""The sections that have choices with names."""

EXAMPLES = """examples:
  sequel list              everything
  sequel list algo         all methods with their settings
  sequel list algo ewc     one method: paper, settings, defaults and ranges
  sequel list ewc          the same
"""


def main(args: Sequence[str]) -> int:
    """Print tables of algorithms, benchmarks, ... with their settings; all of them if no section is given.

    Raises:
        ValueError: an unknown section or name.
    """
    parser = Parser(
        prog="sequel list",
        description="List choices with settings, defaults and ranges.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("section", nargs="?", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("name", nargs="?", metavar="NAME", help="one choice; the section may be left out")
    options = parser.parse_args(args)
    console = Console()
    for section, name in _chosen(options.section, options.name):
        for table in _tables(section, name):
            console.print(table)
    return 0


def _chosen(section: str | None, name: str | None) -> list[tuple[str, str | None]]:
    """Return the sections to show, each with a name if only that choice is shown."""
    if section is None:
        return [(each, None) for each in SECTIONS]
    names = {each: _names(each) for each in NAMED}
    if name is None and section.removesuffix("s") not in SECTIONS:
        sections: list[tuple[str, str | None]] = [(key, section) for key in NAMED if section in names[key]]
        if not sections:
            hint = nearest(section, [*SECTIONS, *(choice for each in names.values() for choice in each)])
            allowed = f"one of {', '.join(SECTIONS)}, or a name in one of them"
            raise ValueError(f"section must be {allowed}, got {section!r}{hint}")
        return sections
    section = section.removesuffix("s")
    check_name("section", section, SECTIONS if name is None else NAMED)
    if name is not None:
        check_name(section, name, names[section])
    return [(section, name)]


def _names(section: str) -> list[str]:
    """Return the names of the choices of a section."""
    if section == "experiment":
        return [path.name.removesuffix(".yaml") for path in _files()]
    return choices(section)


def _tables(section: str, only: str | None) -> Iterable[Table]:
    if section == "experiment":
        yield _experiments(only)
    elif section in CLASSES and section != "optimizer":
        yield _settings(f"{section}=...", summary(section), settings(section), section)
    else:
        for name in choices(section) if only is None else [only]:
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


def _files() -> list[Traversable]:
    """Return the files of the shipped experiments."""
    files = resources.files("sequel_configs").joinpath("experiment").iterdir()
    return sorted((path for path in files if path.name.endswith(".yaml")), key=lambda path: path.name)


def _experiments(only: str | None) -> Table:
    """Return a table of the shipped experiments, or of one, with the first lines of their files."""
    table = Table(title="[bold]+experiment=...[/bold]", title_justify="left", title_style="")
    table.add_column("name")
    table.add_column("about", overflow="fold")
    for path in _files():
        name = path.name.removesuffix(".yaml")
        if only in (None, name):
            about = [line for line in _remarks(path) if not line.startswith("@package")]
            table.add_row(name, "\n".join(about))
    return table

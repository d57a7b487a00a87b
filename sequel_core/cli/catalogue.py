"""`sequel list`: what there is, with its settings."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from importlib import import_module, resources
from importlib.resources.abc import Traversable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sequel_core.algorithms import ALGORITHMS
from sequel_core.backbones import BACKBONES
from sequel_core.cli.arguments import Parser
from sequel_core.experiment.schema import Setting, choices, settings
from sequel_core.settings import check_name

KINDS = ("algo", "benchmark", "backbone", "optimizer", "logger", "training", "checkpoint", "experiment")


def main(args: Sequence[str]) -> int:
    """Show tables of algorithms, benchmarks, ... with their settings; all for no argument.

    Raises:
        ValueError: no such kind.
    """
    parser = Parser(prog="sequel list", description="Show what there is, with settings, defaults and ranges.")
    parser.add_argument("kind", nargs="?", metavar="KIND", help=", ".join(KINDS))
    kind = parser.parse_args(args).kind
    if kind is not None:
        kind = kind.removesuffix("s")
        check_name("kind", kind, KINDS)
    console = Console()
    for name in KINDS if kind is None else [kind]:
        for table in _tables(name):
            console.print(table)
    return 0


def _tables(kind: str) -> Iterable[Table]:
    if kind == "experiment":
        yield _experiments()
    elif kind == "checkpoint":
        text = "when a run writes checkpoints, beside the one after every task"
        yield _settings("checkpoint=...", text, settings("checkpoint"), "checkpoint")
    elif kind == "training":
        yield _settings(
            "training=...", "how a learner trains and evaluates", settings("training"), "training"
        )
    else:
        for name in choices(kind):
            section = f"logger.{name}" if kind == "logger" else kind
            yield _settings(f"{kind}={name}", _describe(kind, name), settings(kind, name), section)


def _describe(kind: str, name: str) -> str:
    """Return the first line of the description of a choice."""
    if kind == "optimizer":
        return "the same arithmetic in both frameworks"
    if kind == "logger":
        return _remarks(resources.files("sequel_configs").joinpath("logger", f"{name}.yaml"))[0]
    table = ALGORITHMS if kind == "algo" else BACKBONES
    owner = import_module("sequel_benchmarks").BENCHMARKS[name] if kind == "benchmark" else table[name]
    return (inspect.getdoc(owner) or "").partition("\n")[0]


def _remarks(path: Traversable) -> list[str]:
    """Return the comments that begin a line of a YAML file."""
    return [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]


def _settings(title: str, text: str, specs: Iterable[Setting], section: str) -> Table:
    table = Table(title=f"[bold]{title}[/bold]  {escape(text)}", title_justify="left", title_style="")
    for column in ("setting", "default", "range", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "setting")
    for spec in specs:
        default = (
            "null"
            if spec.default is None
            else str(spec.default).lower()
            if spec.default in (True, False)
            else ""
        )
        table.add_row(f"{section}.{spec.key}", default or str(spec.default), spec.allowed, spec.help)
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

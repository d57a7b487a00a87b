"""`sequel data`: download and check data sets."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.table import Table

from sequel_core.cli.arguments import Parser
from sequel_core.settings import check_name


def main(args: Sequence[str]) -> int:
    """Run the command line of `sequel data`.

    Downloads and checks the given data sets. Without names, checks those that are present and lists the
    others.

    Returns:
        0.

    Raises:
        ValueError: an unknown data set, a failed download, or damaged data.
    """
    parser = Parser(prog="sequel data", description="Download data sets, read them once and check them.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="data sets; without names, check those that are present"
    )
    parser.add_argument("--data-dir", help="folder (default: SEQUEL_DATA_DIR, else the user's cache)")
    options = parser.parse_args(args)
    backend = import_module("sequel_benchmarks")
    known = [*backend.DATASETS, *backend.TABLES]
    for name in options.names:
        check_name("data set", name, known)
    table = Table(title="data sets", title_justify="left")
    for column in ("name", "folder", "train", "test", "inputs", "classes", "checksum"):
        table.add_column(column, justify="right" if column in ("train", "test", "classes") else "left")
    for name in options.names or known:
        if not options.names and not backend.available(name, options.data_dir):
            table.add_row(name, "", "", "", "", "", f"not present; run sequel data {name}")
        else:
            table.add_row(*_cells(backend.fetch(name, options.data_dir)))
    Console().print(table)
    return 0


def _cells(item: Any) -> list[str]:
    """Return the cells of a data set, a `sequel_benchmarks.Fetched`."""
    checksum = {True: "as published", False: f"{item.sha256[:12]}, differs from the published one"}
    return [
        item.name,
        str(item.folder or "bundled with scikit-learn"),
        f"{item.train:,}",
        f"{item.test:,}",
        " x ".join(map(str, item.input_shape)),
        "" if item.num_classes is None else str(item.num_classes),
        checksum.get(item.verified, f"{item.sha256[:12]}, no published checksum"),
    ]

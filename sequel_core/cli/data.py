"""`sequel data`: fetch and check data sets."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from rich.console import Console
from rich.table import Table

from sequel_core.cli.arguments import Parser
from sequel_core.config import check_name


def main(args: Sequence[str]) -> int:
    """Fetch and check the data sets named, all for none; show what there is.

    Raises:
        ValueError: no such data set, or data that is missing and cannot be downloaded, or damaged.
    """
    parser = Parser(prog="sequel data", description="Fetch data sets, read all of them once and check them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets; none for all")
    parser.add_argument("--data-dir", help="folder; else SEQUEL_DATA_DIR, else the user's cache directory")
    options = parser.parse_args(args)
    backend = import_module("sequel_benchmarks")
    known = list(backend.DATASETS)
    for name in options.names:
        check_name("data set", name, known)
    table = Table(title="data sets", title_justify="left")
    for column in ("name", "folder", "train", "test", "images", "classes", "checksum"):
        table.add_column(column, justify="right" if column in ("train", "test", "classes") else "left")
    found = [backend.fetch(name, options.data_dir) for name in options.names or known]
    for item in found:
        table.add_row(
            item.name,
            str(item.folder or "bundled with scikit-learn"),
            f"{item.train:,}",
            f"{item.test:,}",
            " x ".join(map(str, item.image_shape)),
            str(item.num_classes),
            "as published" if item.verified else f"{item.sha256[:12]}, not the published one",
        )
    Console().print(table)
    return 0

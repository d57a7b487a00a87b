"""`sequel data`: fetch and check data sets."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from rich.console import Console
from rich.table import Table

from sequel_core.cli.arguments import Parser
from sequel_core.experiment.config import check_name


def main(args: Sequence[str]) -> int:
    """Fetch and check the data sets named; for none, check all that are there and show which are not.

    Raises:
        ValueError: no such data set, or data that is missing and cannot be downloaded, or damaged.
    """
    parser = Parser(prog="sequel data", description="Fetch data sets, read all of them once and check them.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="data sets; none for all that need no download"
    )
    parser.add_argument("--data-dir", help="folder; else SEQUEL_DATA_DIR, else the user's cache directory")
    options = parser.parse_args(args)
    backend = import_module("sequel_benchmarks")
    known = list(backend.DATASETS)
    for name in options.names:
        check_name("data set", name, known)
    table = Table(title="data sets", title_justify="left")
    for column in ("name", "folder", "train", "test", "images", "classes", "checksum"):
        table.add_column(column, justify="right" if column in ("train", "test", "classes") else "left")
    for name in options.names or known:
        if not options.names and not backend.available(name, options.data_dir):
            table.add_row(name, "", "", "", "", "", f"not here; sequel data {name} fetches it")
            continue
        item = backend.fetch(name, options.data_dir)
        checksum = {True: "as published", False: f"{item.sha256[:12]}, not the published one"}
        table.add_row(
            item.name,
            str(item.folder or "bundled with scikit-learn"),
            f"{item.train:,}",
            f"{item.test:,}",
            " x ".join(map(str, item.image_shape)),
            str(item.num_classes),
            checksum.get(item.verified, f"{item.sha256[:12]}, none is published"),
        )
    Console().print(table)
    return 0

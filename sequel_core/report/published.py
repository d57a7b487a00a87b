"""Published tables in a report: the `table.json` of `sequel reproduce TABLE`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from sequel_core.experiment.published import NOT_EXPRESSIBLE, TABLE, PublishedRow, PublishedTable
from sequel_core.report.runs import MODES
from sequel_core.report.tables import NONE, Table
from sequel_core.runs.files import read_json
from sequel_core.runs.formatting import number
from sequel_core.runs.statistics import Equivalence, interval

HEADER = ("row", "verdict", "measured", "95 % interval", "published", "difference", "margin")
"""Columns of the table; the framework, the seeds and the seconds follow."""


class Published(NamedTuple):
    """A published table, as a section of the report."""

    title: str
    source: str
    protocol: Mapping[str, str]
    table: Table
    notes: Sequence[str]  # on the rows that are not equivalent


def read_published(directories: Sequence[str | Path], notes: list[str]) -> list[Published]:
    """Read the published tables below some folders.

    Args:
        directories: folders that contain some at any depth.
        notes: a note is added for each file that cannot be read.
    """
    paths = {path.resolve(): path for folder in directories for path in sorted(Path(folder).rglob(TABLE))}
    sections = []
    for path in paths.values():
        try:
            sections.append(_section(read_json(path.read_bytes())))
        except ValidationError as error:
            first = error.errors()[0]
            notes.append(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}")
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{path} is damaged: {error}")
    return sections


def _section(values: dict[str, Any]) -> Published:
    """Return the section of a file."""
    rows = {key: dict(row) for key, row in values["rows"].items()}
    measured = {key: row.pop("measured") for key, row in rows.items()}
    table = PublishedTable.model_validate(
        {key: values[key] for key in PublishedTable.model_fields if key in values} | {"rows": rows}
    )
    cells, notes = [], []
    for key, row in table.rows.items():
        results = dict(_results(table, row, measured[key]))
        cells += [_row(key, row, mode, measured[key][mode], result) for mode, result in results.items()]
        if row.not_expressible:
            name = _name(key, row)
            cells.append([name, NOT_EXPRESSIBLE, NONE, NONE, row.published, *[NONE] * (len(HEADER) - 2)])
        first = next(iter(results.values()), None)
        notes += [f"{key}: {note}" for note in row.notes(first)]
    caption = (
        f"Means over seeds with their standard deviation; published means with their {table.spread}. The "
        "verdict compares the 90 % interval of the difference with the margin"
    )
    header = [*HEADER, "framework", "seeds", "seconds"]
    protocol = {"protocol": " ".join(table.protocol.split()), **table.details(table.rows)}
    return Published(table.title, table.source, protocol, Table(caption, header, cells), notes)


def _results(
    table: PublishedTable, row: PublishedRow, measured: Mapping[str, Any]
) -> Iterator[tuple[str, Equivalence]]:
    """Yield the verdict of each framework that the row was measured in."""
    for mode, one in measured.items():
        yield mode, table.compare(row, [float(v) for v in one["values"].values()], float(one["margin"]))[1]


def _name(key: str, row: PublishedRow) -> str:
    return key if row.evidence == "verified" else f"{key} (recalled)"


def _row(key: str, row: PublishedRow, mode: str, one: Mapping[str, Any], result: Equivalence) -> list[str]:
    """Return the cells of a row in one framework."""
    values = list(one["values"].values())
    bounds = interval(values)
    mean = number(float(np.mean(values))) if values else NONE
    return [
        _name(key, row),
        ", ".join(one["failures"]) or result.verdict,
        mean if bounds is None else f"{mean} ({np.std(values, ddof=1):.2f})",
        NONE if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}",
        row.published,
        number(result.difference),
        f"{one['margin']:g}",
        MODES.get(mode, mode),
        str(len(values)),
        f"{one['seconds']:.0f}",
    ]

"""Writes docs/trust/tables.md, a page for each table, and the numbers in README.md: `make tables`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np

from sequel_core.experiment.measured import MeasuredRow, MeasuredTable, as_csv, measured_before
from sequel_core.experiment.published import NOT_EXPRESSIBLE, PublishedRow, PublishedTable, read_table, tables
from sequel_core.runs.formatting import markdown_table, number
from sequel_core.runs.learner import Mode
from sequel_core.runs.statistics import Equivalence, Verdict, interval
from tests.pages import README, ROOT

FOLDER = ROOT / "docs" / "tables"
TRUST = ROOT / "docs" / "trust"
START, END = "<!-- tables -->\n", "<!-- /tables -->"
NOT_MEASURED = "not measured"
MODES: tuple[Mode, ...] = ("jax", "pytorch")
NAMES = {"jax": "JAX", "pytorch": "PyTorch"}

INTRODUCTION = """# Published tables

% Written by `make tables`, as the pages of the tables are; do not edit them.

`sequel reproduce TABLE` measures the rows of a table, and `--commands` prints the settings of each
([Reproduce a published table](../guides/published-tables.md)).

- Accuracies are in percent. Means are followed by their 95 % interval over seeds.
- Verdicts compare the mean in JAX with the published mean, by two one-sided tests at level 5 %. The margin is
  1.5 points, or the published standard deviation if that is larger. A row measured only in PyTorch has the
  verdict of PyTorch.
- Rows in italics do not count. Their published value was written down from memory, and nobody has read it in
  the paper yet. Their numbers are in parentheses.
- Minutes are the sum over all runs of a table, each on one thread. The machine has two cores and had other
  work at the same time, so a quiet machine needs less.
"""


@cache
def measured_tables() -> dict[str, MeasuredTable]:
    """Return the measured values of the shipped tables, without values for those that were not measured."""
    return {name: measured_before(FOLDER / f"{name}.json", name) for name in tables()}


def result_of(
    table: PublishedTable, row: PublishedRow, by_mode: dict[Mode, MeasuredRow]
) -> Equivalence | None:
    """Return the verdict on the first framework that was measured."""
    first = next((by_mode[mode] for mode in MODES if mode in by_mode), None)
    return None if first is None else table.compare(row, list(first.values.values()))[1]


def verdict(row: PublishedRow, result: Equivalence | None) -> str:
    if row.not_expressible:
        return NOT_EXPRESSIBLE
    return NOT_MEASURED if result is None else result.verdict


def mean(row: MeasuredRow | None) -> str:
    if row is None:
        return "-"
    values = list(row.values.values())
    bounds, seeds = interval(values), f"{len(values)} seed" + ("s" if len(values) > 1 else "")
    spread = seeds if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}, {seeds}"
    return f"{np.mean(values):.2f} ({spread})"


def seconds(by_mode: dict[Mode, MeasuredRow]) -> str:
    """Return the mean seconds of a run in each framework."""
    spent = [np.mean([run.seconds for run in by_mode[m].runs.values()]) for m in MODES if m in by_mode]
    return ", ".join(f"{value:.0f}" for value in spent) or "-"


def minutes(table: PublishedTable, measured: MeasuredTable) -> str:
    """Return the minutes of all runs of a table; rows with equal settings share their runs."""
    spent = {
        (table.rows[key].settings, mode, seed): run.seconds
        for key, by_mode in measured.rows.items()
        for mode, row in by_mode.items()
        for seed, run in row.runs.items()
    }
    return f"{sum(spent.values()) / 60:.0f}" if spent else ""


def page_of(name: str) -> str:
    """Return the file name of a table's page, in docs/trust/."""
    return f"table-{name}.md"


def page(name: str, table: PublishedTable, measured: MeasuredTable) -> str:
    """Return the text of a table's page."""
    return "\n".join(lines_of(name, table, measured)).rstrip() + "\n"


def lines_of(name: str, table: PublishedTable, measured: MeasuredTable) -> Iterator[str]:
    """Yield the lines of a table's page."""
    yield f"# Published table `{name}`\n\n{table.title}, <{table.source}>.\n"
    yield f"Protocol: {table.protocol.strip()}\n"
    yield "".join(f"- {what}: {text}.\n" for what, text in table.details(table.rows).items())
    yield f"The spread in parentheses is the {table.spread} of the published runs."
    yield "[Published tables](tables.md) explains the columns."
    if measured.rows:
        yield f"Every run: [JSON](../tables/{name}.json), [CSV](../tables/{name}.csv)."
        yield f"All runs took {minutes(table, measured)} minutes on two cores that also had other work."
    yield ""
    rows = []
    for key, row in table.rows.items():
        by_mode = measured.rows.get(key, {})
        margin, result = table.compare(row, [])[0], result_of(table, row, by_mode)
        mark = "*" if row.evidence == "recalled" else ""
        cells = [f"{mark}{key}{mark}", *(mean(by_mode.get(mode)) for mode in MODES), row.published]
        difference = math.nan if result is None else result.difference
        cells += [number(difference), f"{margin:g}", verdict(row, result), seconds(by_mode)]
        rows.append([*cells, "<br>".join(row.notes(result))])
    columns = ["published", "difference", "margin", "verdict", "seconds per run", "notes"]
    yield markdown_table(["row", *(NAMES[mode] for mode in MODES), *columns], rows)


def counts(table: PublishedTable, measured: MeasuredTable, evidence: str) -> Counter[str]:
    """Count the verdicts of the verified or of the recalled rows."""
    rows = {key: row for key, row in table.rows.items() if row.evidence == evidence}
    return Counter(
        verdict(row, result_of(table, row, measured.rows.get(key, {}))) for key, row in rows.items()
    )


def summary(measured: dict[str, MeasuredTable], folder: str = "") -> str:
    """Return the numbers of verdicts of all tables, with links to their pages in a folder."""
    columns = (*get_args(Verdict), NOT_EXPRESSIBLE, NOT_MEASURED)
    rows = []
    for name, values in measured.items():
        table = read_table(name)
        verified, recalled = (counts(table, values, e) for e in ("verified", "recalled"))
        cells = [
            (verified[column] or "", f"({recalled[column]})" * bool(recalled[column])) for column in columns
        ]
        numbers = [" ".join(filter(None, map(str, cell))) for cell in cells]
        rows.append([f"[{name}]({folder}{page_of(name)})", *numbers, minutes(table, values)])
    return markdown_table(["table", *columns, "minutes"], rows)


def readme() -> str:
    """Return README.md with the numbers of verdicts of the tables."""
    written = summary(measured_tables(), "docs/trust/")
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    return f"{before}{START}{written}\n{END}{rest.partition(END)[2]}"


def files() -> dict[Path, str]:
    """Return the content of every generated file."""
    measured = measured_tables()
    values = {FOLDER / f"{n}.csv": as_csv(m, read_table(n)) for n, m in measured.items() if m.rows}
    pages = {TRUST / page_of(n): page(n, read_table(n), m) for n, m in measured.items()}
    overview = f"{INTRODUCTION}\n{summary(measured)}\n"
    return {TRUST / "tables.md": overview, README: readme(), **pages, **values}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")

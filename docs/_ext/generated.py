"""Directives whose tables come from the code and from committed results, so that no page copies them.

- `{settings} algo=ewc`: settings with default, range and meaning; also `benchmark=...` and `backbone=...`.
- `{support} ewc`: scenarios, networks, targets and inputs of a method.
- `{measured} ewc`: published beside measured numbers, and the experiments with this method.
- `{published} benchmark=splitmnist`: the published tables that use a benchmark, and their protocols.
- `{published} metric`: the metrics of published tables.
- `{mutants} counts`: killed and tried mutants by method; `{mutants} survivors`: the others, with remarks.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sequel_benchmarks import from_arrays
from sequel_core.algorithms import ALGORITHMS
from sequel_core.experiment import published
from sequel_core.experiment.published import PublishedRow, PublishedTable, tables
from sequel_core.experiment.schema import settings, settings_class
from sequel_core.runs.formatting import markdown_table
from sequel_core.settings import as_text
from sequel_core.stream.benchmark import StreamSpec
from tests.measured import MODES, NAMES, mean, measured_tables, page_of, result_of, verdict
from tests.pages import written_table

METHODS_PAGE = Path(__file__).parents[1] / "methods" / "index.md"
MUTANTS = Path(__file__).parents[1] / "trust" / "mutants.json"
SCENARIOS = ("domain", "task", "class")

read_table = cache(published.read_table)


def escaped(text: str) -> str:
    """Return text as Markdown, in which only backticks have a meaning."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_<|$\[\\])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def settings_list(choice: str) -> str:
    """Return the settings of `section=name`; those of a method without the ones that all methods have.

    Each has its default, its range and its meaning.
    """
    section, _, name = choice.partition("=")
    common = settings("algo", "naive") if section == "algo" else []
    listed = settings(section, name)
    specs = fields(settings_class(section, name))
    only = {spec.name: spec.metadata["only"] for spec in specs if "only" in spec.metadata}
    parts = []
    for spec in [spec for spec in listed if spec not in common] or listed:
        facts = [escaped(spec.allowed)] if spec.allowed else []
        if spec.key in only:
            other, *values = only[spec.key]
            facts.append(f"only with {other}={' or '.join(map(as_text, values))}")
        head = f"`{spec.key}={as_text(spec.default)}`" + "".join(f"; {fact}" for fact in facts)
        parts.append(f"{head}\n: {escaped(spec.help)}.")
    return "\n\n".join(parts)


@cache
def stream(targets: str = "", inputs: str = "") -> StreamSpec:
    """Return the spec of a small stream, of class labels or numbers, with arrays or dicts as inputs."""
    x: Any = np.zeros((4, 3), np.float32)
    part = {"x": x} if inputs == "dict" else x, np.zeros(4, np.float32 if targets == "numbers" else np.int64)
    return from_arrays([(part, part)], scenario="domain", num_classes=1).spec


def accepts(name: str, spec: StreamSpec) -> bool:
    """Return whether a method takes a stream, with its default settings."""
    try:
        ALGORITHMS[name](task_given=True).check_stream(spec)
    except ValueError:
        return False
    return True


def support_list(name: str) -> str:
    """Return what a method runs on: by the table of the overview page, and by the checks of its settings."""
    head, _, *rows = written_table(METHODS_PAGE, "support")
    cells = next(dict(zip(head[1:], row[1:], strict=True)) for row in rows if row[0] == f"`{name}`")
    scenarios = [
        f"not {key}{cell.removeprefix('no')}" if cell.startswith("no") else key + cell.removeprefix("yes")
        for key, cell in cells.items()
        if key in SCENARIOS
    ]
    reasons: dict[str, list[str]] = {}
    for key, cell in cells.items():
        if key not in SCENARIOS and cell != "yes":
            reasons.setdefault(cell.removeprefix("no: "), []).append(key)
    networks = [f"not {', '.join(keys)}: {reason}" for reason, keys in reasons.items()]
    targets = "class labels"
    if accepts(name, stream("numbers")):
        targets += ", several labels, values and tokens"
    lines = [
        "**Frameworks**: PyTorch Lightning and JAX/Flax.",
        f"**Scenarios**: {'; '.join(scenarios)}.",
        f"**Networks**: {'; '.join(['all built-in ones', *networks])}.",
        f"**Targets**: {targets}.",
        f"**Inputs**: arrays{' and dicts of arrays' if accepts(name, stream(inputs='dict')) else ''}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


@cache
def experiments() -> dict[str, dict[str, Any]]:
    """Return the shipped experiments by name."""
    files = sorted(resources.files("sequel_configs").joinpath("experiment").iterdir(), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): yaml.safe_load(f.read_text()) for f in files if ".yaml" in f.name}


def value_of(table: PublishedTable, row: PublishedRow, section: str, key: str) -> str:
    """Return what a row chooses for a section, directly or by the experiment that it names."""
    chosen = ""
    for text in (*table.settings, *row.settings):
        left, _, right = text.partition("=")
        if left == "+experiment":
            chosen = experiments()[right][section][key]
        elif left == section:
            chosen = right
    return chosen


def published_rows(section: str, key: str, name: str) -> Iterator[tuple[str, PublishedTable, str]]:
    """Yield the rows of published tables that choose `name` for a section: table and row by name."""
    for stem in tables():
        table = read_table(stem)
        for row_name, row in table.rows.items():
            if value_of(table, row, section, key) == name:
                yield stem, table, row_name


def measured_table(name: str) -> str:
    """Return published beside measured numbers of a method, then its experiments."""
    measured, rows = measured_tables(), []
    for stem, table, key in published_rows("algo", "name", name):
        row, by_mode = table.rows[key], measured[stem].rows.get(key, {})
        mark = "*" if row.evidence == "recalled" else ""
        cells = [mean(by_mode.get(mode)) for mode in MODES]
        result = verdict(row, result_of(table, row, by_mode))
        rows.append([f"{link_to(stem)} {mark}{escaped(key)}{mark}", row.published, *cells, result])
    head = ["row of a published table", "published", *(NAMES[mode] for mode in MODES), "verdict"]
    parts = [markdown_table(head, rows)] if rows else ["No published table has a row of this method."]
    rows = []
    for key, values in experiments().items():
        if values["algo"]["name"] == name:
            expected = values["expected"]
            spread = f" ({expected['std']:g})" if "std" in expected else ""
            rows.append([f"`+experiment={key}`", f"{expected['avg_acc']:g}{spread}", values["source"]])
    if rows:
        parts.append(markdown_table(["experiment", "expected accuracy", "source of the number"], rows))
    return "\n\n".join(parts)


def published_list(choice: str) -> str:
    """Return the published tables that use `benchmark=name`, with their protocols; or `metric`, by metric."""
    if choice == "metric":
        return metrics_table()
    section, _, name = choice.partition("=")
    found: dict[str, list[str]] = {}
    for stem, _, key in published_rows(section, "name", name):
        found.setdefault(stem, []).append(key)
    lines = []
    for stem, keys in found.items():
        table = read_table(stem)
        details = table.details({key: table.rows[key] for key in keys})
        other = {"class order": not name.startswith("split"), "angles": not name.startswith("rotated")}
        texts = [f"{what}: {text}." for what, text in details.items() if not other.get(what)]
        head = f"{link_to(stem)}, {len(keys)} rows: {table.title}."
        lines.append(" ".join([head, *map(escaped, texts)]))
    return "\n".join(f"- {line}" for line in lines)


def metrics_table() -> str:
    """Return the metrics of published tables with the number of rows that each table has."""
    counts: dict[str, Counter[str]] = {}
    for stem in tables():
        for row in read_table(stem).rows.values():
            counts.setdefault(row.metric, Counter())[stem] += 1
    rows = [
        [f"`{metric}`", ", ".join(f"{link_to(stem)} ({count})" for stem, count in by_table.items())]
        for metric, by_table in counts.items()
    ]
    return markdown_table(["metric", "published tables (number of rows)"], rows)


def mutants(choice: str) -> str:
    """Return the numbers of killed and tried mutants of each method, or the list of survivors."""
    files = json.loads(MUTANTS.read_text(encoding="utf-8"))["files"]
    if choice == "survivors":
        alive = [m for results in files.values() for m in results if not m["killed_by"]]
        heads = [f"`{m['file']}`, `{m['function']}`" for m in alive]
        changes = [f"`` {m['before']} `` becomes `` {m['after'] or 'nothing'} ``" for m in alive]
        items = [f"{h}\n: {c}. {m['remark']}" for h, c, m in zip(heads, changes, alive, strict=True)]
        return "\n\n".join(items) or "There are none."
    rows, total = [], Counter[str]()
    for name in ALGORITHMS:
        cells = [f"[`{name}`](../methods/{name}.md)"]
        for package in ("sequel_flax", "sequel_lightning"):
            results = files.get(f"{package}/algorithms/{name}.py", [])
            killed = sum(bool(m["killed_by"]) for m in results)
            total.update({f"{package} killed": killed, package: len(results)})
            cells.append(f"{killed} of {len(results)}" if results else "-")
        rows.append(cells)
    counts = [f"{total[f'{p} killed']} of {total[p]}" for p in ("sequel_flax", "sequel_lightning")]
    return markdown_table(["method", "JAX/Flax", "PyTorch Lightning"], [*rows, ["all", *counts]])


def link_to(stem: str) -> str:
    """Return a link to the page of a published table, from a folder of docs/."""
    return f"[{stem}](../trust/{page_of(stem)})"


GENERATED: dict[str, Callable[[str], str]] = {
    "settings": settings_list,
    "support": support_list,
    "measured": measured_table,
    "published": published_list,
    "mutants": mutants,
}


def setup(app: Any) -> dict[str, bool]:
    """Add the directives; Sphinx calls this."""
    from sphinx.util.docutils import SphinxDirective

    def directive(text_of: Callable[[str], str]) -> type[SphinxDirective]:
        class Generated(SphinxDirective):
            required_arguments = 1

            def run(self) -> list[Any]:
                self.env.note_reread()  # the sources of the text are not files of the documentation
                return self.parse_text_to_nodes(text_of(self.arguments[0]))

        return Generated

    for name, text_of in GENERATED.items():
        app.add_directive(name, directive(text_of))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

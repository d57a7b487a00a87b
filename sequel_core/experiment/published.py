"""Published tables: rows of settings and results, in `configs/tables/<name>.yaml` or a user's file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sequel_core.experiment.overrides import CONFIGS
from sequel_core.runs.statistics import MAX_SEEDS, Equivalence, equivalence

MARGIN = 1.5
"""Default margin of equivalence, in the unit of the table."""

TABLE = "table.json"
"""File with the measured and the published values, which `sequel reproduce TABLE` writes."""

NOT_EXPRESSIBLE = "cannot be expressed"
"""The verdict of a row that cannot be run."""

Spread = Literal["standard deviation", "standard error", "95 % interval"]

Masks = Literal["none", "test", "training and test"]
"""When outputs of classes that are not of the sample's task are masked."""


class PublishedRow(BaseModel):
    """One row of a published table.

    Args:
        settings: Hydra overrides, after those of the table.
        metric: name of a number of `summary.json`, for example `average_accuracy` or `forgetting`.
        tasks: tasks, from 0, that the metric is taken over; None for all. The paper of A-GEM
            (https://arxiv.org/abs/1812.00420) reserves three tasks for the hyper-parameter search.
        value: the published mean; percent if the score is a fraction, such as the accuracy. None if the row
            has a reason in `not_expressible`.
        spread: the published spread, of the kind that the table states; None if it is unknown.
        runs: number of published runs; None if it is unknown.
        location: table, figure or page of the value in the paper.
        masks: if not those of the table; `test` for metrics of masked predictions (`masked_...`).
        evidence: `verified` in a source that was read, or `recalled`. Recalled rows are not counted.
        differs: what is known to differ from the published protocol.
        cause: why the measured value differs, tested by changing one thing.
        not_expressible: why the row cannot be run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: tuple[str, ...] = ()
    metric: str = "average_accuracy"
    tasks: tuple[int, ...] | None = None
    value: float | None = None
    spread: float | None = None
    runs: int | None = None
    location: str
    masks: Masks | None = None
    evidence: Literal["verified", "recalled"]
    differs: str = ""
    cause: str = ""
    not_expressible: str = ""

    @property
    def published(self) -> str:
        """The published mean with its spread, as text."""
        return (
            "-" if self.value is None else f"{self.value:g}" + (f" ({self.spread:g})" if self.spread else "")
        )

    def notes(self, result: Equivalence | None) -> list[str]:
        """Return what is known of a row that is not equivalent.

        Args:
            result: of `PublishedTable.compare`; None if the row was not measured.
        """
        if result is not None and result.verdict == "equivalent":
            return []
        known = {"differs": self.differs, "cause": self.cause, NOT_EXPRESSIBLE: self.not_expressible}
        texts = [f"{what}: {' '.join(text.split())}" for what, text in known.items() if text]
        if result is not None and result.verdict == "inconclusive":
            texts.append(_seeds_needed(result))
        return texts


class PublishedTable(BaseModel):
    """A published table.

    Args:
        title: paper and table.
        source: URL of the paper.
        protocol: stream, training and evaluation.
        masks: when outputs of classes of other tasks are masked: `none`, `test` or `training and test`.
        class_order: how classes are assigned to tasks.
        angles: of rotated streams.
        spread: what the spread of the rows is.
        stream_varies: whether each seed has its own stream (`benchmark.seed`), as in the paper.
        settings: Hydra overrides of all rows.
        rows: by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    source: str
    protocol: str
    masks: Masks | None = None
    class_order: str = ""
    angles: str = ""
    spread: Spread = "standard deviation"
    stream_varies: bool = False
    settings: tuple[str, ...] = ()
    rows: dict[str, PublishedRow]

    def deviation(self, row: PublishedRow) -> float:
        """Return the standard deviation of the published runs of a row; 0 if it is unknown."""
        if row.spread is None:
            return 0.0
        if self.spread == "standard deviation":
            return row.spread
        if row.runs is None or row.runs < 2:
            return 0.0
        if self.spread == "standard error":
            return row.spread * math.sqrt(row.runs)
        from scipy.special import stdtrit  # slow to import

        return row.spread * math.sqrt(row.runs) / float(stdtrit(row.runs - 1, 0.975))

    def details(self, rows: Mapping[str, PublishedRow]) -> dict[str, str]:
        """Return what the table says of masks, class order and angles, as text.

        Args:
            rows: those that are shown; masks are given for each if they differ.
        """
        masks = {key: self._masks(row) or "not stated" for key, row in rows.items()}
        names = {when: [key for key in masks if masks[key] == when] for when in dict.fromkeys(masks.values())}
        several = [f"{when} ({_listed(keys)})" for when, keys in names.items()]
        text = "; ".join(several) if len(names) > 1 else "".join(names)
        known = {"masks": text, "class order": self.class_order, "angles": self.angles}
        return {key: value for key, value in known.items() if value and value != "not stated"}

    def _masks(self, row: PublishedRow) -> Masks | None:
        return row.masks or ("test" if row.metric.startswith("masked_") else self.masks)

    def compare(
        self, row: PublishedRow, values: Sequence[float], margin: float | None = None
    ) -> tuple[float, Equivalence]:
        """Compare measured values with the published one.

        Args:
            row: of this table.
            values: measured, one per seed.
            margin: largest harmless difference; None for the larger of 1.5 and the published standard
                deviation.

        Returns:
            The margin and the result, see `sequel_core.runs.statistics.equivalence`.
        """
        std = self.deviation(row)
        bound = max(MARGIN, std) if margin is None else margin
        published = math.nan if row.value is None else row.value
        return bound, equivalence(values, published, bound, std, row.runs or 0)


def _seeds_needed(result: Equivalence) -> str:
    """Return how many seeds an inconclusive row needs, in words."""
    if math.isnan(result.p):
        return "more seeds are needed, at least 2"
    if result.seeds_needed is None:
        return f"no number of seeds up to {MAX_SEEDS:,} decides, at this mean and spread"
    return f"more seeds are needed, about {result.seeds_needed}"


def _listed(keys: Sequence[str]) -> str:
    """Return up to three names, or the first and the last of more."""
    return ", ".join(keys if len(keys) < 4 else (keys[0], "...", keys[-1]))


def tables() -> list[str]:
    """Return the names of the shipped tables."""
    files = resources.files(CONFIGS).joinpath("tables").iterdir()
    return sorted(path.name.removesuffix(".yaml") for path in files if path.name.endswith(".yaml"))


def read_table(name: str) -> PublishedTable:
    """Return a shipped table, or that of a file.

    Args:
        name: one of `tables()`, or the path of a YAML file.

    Raises:
        ValueError: the file cannot be read, a key is unknown or missing, or a value has the wrong type.

    Example:
        >>> table = read_table("sequel")
        >>> table.rows["code3_mcsgd"].value
        82.3
    """
    file = resources.files(CONFIGS).joinpath("tables", f"{name}.yaml") if name in tables() else Path(name)
    try:
        values: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"table must be a readable YAML file, got {name}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"table must be a mapping of keys, got {name} with a {type(values).__name__}")
    try:
        table = PublishedTable.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{name}: {key}: {first['msg']}, got {first['input']!r}") from None
    for key, row in table.rows.items():
        if (row.value is None) != bool(row.not_expressible):
            raise ValueError(
                f"{name}: rows.{key} must have a value or a reason in not_expressible, and not both, got "
                f"value={row.value} and not_expressible={row.not_expressible!r}"
            )
    return table

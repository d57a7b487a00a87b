"""The run directory: the files of a run, and how they are written.

    config.yaml            the model, the optimizer, the benchmark and all settings
    metrics.jsonl          one record per line, in the order in which they were made
    accuracy_matrix.csv    R[i, j], T x T with a header row of tasks; a cell is empty if not evaluated. For
                           another score, its name is in place of `accuracy`
    summary.json           the metrics, steps, seconds, memory and versions; written when the run ends
    weights.npz            the final weights, in the canonical layout

Every file except `metrics.jsonl`, which grows, is written under a temporary name and then renamed. If such a
file exists, it is complete.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from sequel_core.objectives import ACCURACY, Score
from sequel_core.runs import files
from sequel_core.runs.metrics import check_matrix
from sequel_core.runs.versions import WRITER, version_note, version_written_by
from sequel_core.stream.arrays import FloatArray

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
WEIGHTS = "weights.npz"
ERROR = "error.txt"  # why a run of a sweep failed
TOGETHER = "together.json"  # the runs of one compiled program, and its width
LOCK = ".lock"
HOLDER = ".lock.json"  # the process that holds the lock

LEFTOVERS = r"\.lock(\.json)?|\.(\.lock\.json|config\.yaml)\.[0-9]+"
"""Files that a run leaves if it dies before it writes its configuration; a directory of these is empty."""

MAY_DIFFER = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "logger",
    "wandb",
    "callbacks",
    "checkpoint",
    "jax",
    "expected",
    "version",
    "source",
    "comment",
    WRITER,
)
"""Settings and sections of the configuration that may change when a run is resumed."""


@dataclass(frozen=True)
class RunDirectory:
    """Writes the files of one run; `create` and `open` make it.

    Args:
        path: of the directory.
    """

    path: Path

    @classmethod
    def create(cls, path: str | Path | None = None) -> RunDirectory:
        """Make the directory of a new run.

        Args:
            path: an empty directory, or one that does not exist yet; None for a new one under `runs/` in the
                working directory, named after the time.

        Raises:
            ValueError: the path is a file, is not empty or cannot be written.
        """
        target = new_path() if path is None else Path(path)
        if target.exists() and not target.is_dir():
            raise ValueError(f"run_dir must be a directory, got the file {target}; choose another path")
        try:
            target.mkdir(parents=True, exist_ok=path is not None)
            occupied = next((p for p in target.iterdir() if not re.fullmatch(LEFTOVERS, p.name)), None)
            with tempfile.TemporaryFile(dir=target):
                pass  # permission bits alone do not show whether writing works
        except FileExistsError:
            return cls.create(path)  # another run took the name in the meantime
        except OSError as error:
            raise ValueError(
                f"run_dir must be a directory that can be written, got {target} ({error.strerror}); "
                "choose another path"
            ) from error
        if occupied is not None:
            raise ValueError(
                f"run_dir must be empty or new, got {target}, which holds {occupied.name}; choose another "
                "path, delete its contents, or resume its run with resume=auto"
            )
        return cls(target)

    @classmethod
    def open(
        cls, path: str | Path | None, config: Mapping[str, Any], resume: bool | Literal["auto"]
    ) -> RunDirectory:
        """Return the directory of a new run, or of a run to be resumed.

        Args:
            path: as in `create`.
            config: settings of the run; a resumed run must have the same.
            resume: False for a new run, True to resume one, `"auto"` to resume if the directory holds a run.

        Raises:
            ValueError: as `create`; or there is no run to resume, or its settings differ, in which case the
                error names them.
        """
        if resume and path is not None and (Path(path) / CONFIG).is_file():
            directory = cls(Path(path))
            directory.check_config(config)
            return directory
        if resume is True:
            raise ValueError(f"resume needs a run_dir that holds a run, got {path}; pass its directory")
        return cls.create(path)

    def finished(self) -> bool:
        """Whether the run has ended normally."""
        return (self.path / SUMMARY).is_file() and read_file(self.path / SUMMARY).get("status") == "finished"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory for this process.

        The system releases the lock if the process dies; its files are then ignored.

        Raises:
            ValueError: another process holds the lock; the error names the host and the process id.
        """
        from filelock import FileLock, Timeout  # slow to import

        lock, holder = FileLock(self.path / LOCK), self.path / HOLDER
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"run_dir must not be in use, got {self.path}, in which {_process(holder)} runs; wait for "
                "its end or choose another path"
            ) from error
        try:
            files.write_json(holder, {"host": platform.node(), "process": os.getpid()})
            yield
        finally:
            with suppress(OSError):  # the disk may have become read-only
                holder.unlink(missing_ok=True)
                (self.path / LOCK).unlink(missing_ok=True)
            lock.release()

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Compare settings with those that the directory's run was started with.

        What is in `MAY_DIFFER` is ignored: it documents, logs, saves or places a run without changing it.

        Raises:
            ValueError: settings differ; the error names them.
        """
        recorded = _flatten(read_file(self.path / CONFIG))
        given = _flatten(files.plain("config", config))
        keys = _differing(recorded, given)
        if keys:
            there, here = (
                [repr(flat[key]) if key in flat else "not set" for key in keys] for flat in (recorded, given)
            )
            differences = map("{} is {} there and {} here".format, keys, there, here)
            raise ValueError(
                f"run_dir holds another run, got {self.path}: {'; '.join(differences)}; resume it with its "
                f"own settings, or choose another path{version_note(writer(self.path))}"
            )

    def rewind_metrics(self, size: int) -> None:
        """Cut `metrics.jsonl` to a size in bytes; a resumed run writes the rest again."""
        path = self.path / METRICS
        if path.is_file():
            with open(path, "r+b", opener=_open_no_link) as file:
                file.truncate(min(size, path.stat().st_size))

    def metrics_bytes(self) -> int:
        """Return the size of `metrics.jsonl` in bytes; 0 if there is no such file."""
        path = self.path / METRICS
        return path.stat().st_size if path.is_file() else 0

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.yaml`.

        Raises:
            ValueError: part of the configuration is not a plain value.
        """
        values = files.plain("config", config)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=sys.maxsize)
        files.write_bytes(self.path / CONFIG, text.encode())

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`; nan and infinity become null.

        Raises:
            ValueError: part of the record is not a plain value.
        """
        line = files.to_json("record", record)
        path = self.path / METRICS
        with files.errors_naming(path), open(path, "a", encoding="utf-8", opener=_open_no_link) as file:
            file.write(line + "\n")

    def write_matrix(self, matrix: FloatArray, score: Score = ACCURACY) -> None:
        """Write the matrix, with every digit that a float64 needs.

        Args:
            matrix: scores `[T, T]`; nan if not evaluated.
            score: what they are.

        Raises:
            ValueError: not such a matrix, see `sequel_core.runs.metrics.check_matrix`.
        """
        r = check_matrix(matrix, score)
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow([f"task_{j}" for j in range(len(r))])
        rows.writerows([["" if math.isnan(value) else repr(value) for value in row] for row in r.tolist()])
        files.write_bytes(self.path / matrix_file(score), text.getvalue().encode())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`; nan and infinity become null.

        Raises:
            ValueError: part of the summary is not a plain value.
        """
        files.write_json(self.path / SUMMARY, summary)

    def write_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Write `weights.npz`, which `sequel_core.load_weights` reads without pickle.

        Args:
            weights: arrays of numbers by name.

        Raises:
            ValueError: an array holds Python objects.
        """
        arrays: dict[str, Any] = {name: np.asarray(array) for name, array in weights.items()}
        for name, array in arrays.items():
            if array.dtype.hasobject:
                raise ValueError(f"weights must be arrays of numbers, got objects in {name}")
        content = io.BytesIO()
        np.savez(content, **arrays)
        files.write_bytes(self.path / WEIGHTS, content.getvalue())


class ReadDirectory(RunDirectory):
    """The directory of a run that another process records; nothing is written."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Leave the lock to the main process."""
        yield

    def _leave(self, *args: Any, **options: Any) -> None:
        """Write nothing."""

    rewind_metrics = write_config = append_metrics = write_matrix = write_summary = write_weights = _leave


def numbered(path: Path) -> Iterator[Path]:
    """Yield a path, then the same with `_1`, `_2`, ... at its end."""
    yield path
    for k in count(1):
        yield path.with_name(f"{path.name}_{k}")


def new_path(suffix: str = "") -> Path:
    """Return a path under `runs/` that is not taken, named after the time."""
    path = Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}{suffix}"
    return next(name for name in numbered(path) if not name.exists())


def _process(holder: Path) -> str:
    """Return the host and number of the process that holds a lock, from the file that it wrote."""
    try:
        values = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {values['process']} on {values['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    path = f"{prefix}." if prefix else ""
    return {k: v for key, inner in value.items() for k, v in _flatten(inner, f"{path}{key}").items()}


def _differing(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ in two flat configurations, without those that may differ."""
    keys = [key for key in sorted(recorded.keys() | given.keys()) if recorded.get(key) != given.get(key)]
    return [key for key in keys if key not in MAY_DIFFER and key.partition(".")[0] not in MAY_DIFFER]


def assigned(
    directory: Path, configs: Sequence[Mapping[str, Any]], names: Sequence[Iterable[str]]
) -> list[Path]:
    """Return the subdirectory of each run of a sweep or comparison.

    Args:
        directory: that of the sweep; it may have runs of an earlier one.
        configs: the settings of each run.
        names: of each run, infinitely many, the preferred one first.

    Returns:
        The directory of an earlier run with the same settings, as in `RunDirectory.check_config`, or the
        first name that no run has.

    Raises:
        ValueError: a `config.yaml` is damaged; the error names it.
    """
    earlier = {path.parent.name: _flatten(read_file(path)) for path in sorted(directory.glob(f"*/{CONFIG}"))}
    taken = set(earlier)
    places = []
    for config, candidates in zip(configs, names, strict=True):
        given, new = _flatten(files.plain("config", config)), iter(candidates)
        preferred = next(new)  # usually the earlier run has this name
        known = [*({preferred} & earlier.keys()), *earlier]
        place = next((name for name in known if not _differing(earlier[name], given)), None)
        if place is not None:
            del earlier[place]
        else:
            place = next(name for name in chain([preferred], new) if name not in taken)
            taken.add(place)
        places.append(directory / place)
    return places


def _open_no_link(path: str, flags: int) -> int:
    """Open a file that is changed in place, but not through a symbolic link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _read_config(path: Path) -> dict[str, Any]:
    config = files.read_yaml(path)
    if not isinstance(config, dict):
        raise ValueError("it holds no mapping")
    return config


def matrix_file(score: Score) -> str:
    """Return the name of the file of the matrix."""
    return f"{score.key}_matrix.csv"


def read_matrix(directory: Path, score: Score) -> FloatArray:
    """Read the matrix of a run; its shape is `[0, 0]` if there is none yet.

    Raises:
        ValueError: the file is damaged; the error names it.
    """
    path = directory / matrix_file(score)
    if not path.is_file():
        return np.empty((0, 0), np.float64)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        if len(rows) != len(header) or any(len(row) != len(header) for row in rows):
            raise ValueError(f"it must hold {len(header)} rows of {len(header)}, one per task of its header")
        return check_matrix([[float(cell) if cell else math.nan for cell in row] for row in rows], score)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read_summary(path: Path) -> dict[str, Any]:
    return files.read_json(path.read_bytes())


READERS: dict[str, Callable[[Path], Any]] = {
    CONFIG: _read_config,
    SUMMARY: _read_summary,
}
"""Function that reads each file of a run directory."""


def read_file(path: Path) -> Any:
    """Read `config.yaml` or `summary.json` of a run directory.

    Raises:
        ValueError: the file is damaged; the error names it.
    """
    try:
        return READERS[path.name](path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def writer(directory: Path) -> str | None:
    """Return the version of this package that wrote a run directory; None if unknown."""
    values: dict[str, Any] = {}
    for name in (CONFIG, SUMMARY):
        with suppress(OSError, ValueError):
            values[name] = READERS[name](directory / name)
    return version_written_by(values.get(CONFIG, {}), values.get(SUMMARY, {}))

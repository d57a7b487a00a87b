"""The run directory: what a run leaves behind, and how it is read back.

    config.yaml            the model, the optimizer, the benchmark and all settings
    metrics.jsonl          one record per line, in the order they were made
    accuracy_matrix.csv    R[i, j], T x T with a header row of tasks, empty where not evaluated
    summary.json           the metrics, steps, seconds, memory and versions; there once the run has ended
    weights.npz            the final weights, in the canonical layout

Every file but `metrics.jsonl`, which grows, is written under a temporary name and then renamed: a file that
is there is whole.
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
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from sequel_core.runs.metrics import check_matrix, summarise
from sequel_core.stream.arrays import FloatArray

PACKAGE = "sequel-cl"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
MATRIX = "accuracy_matrix.csv"
SUMMARY = "summary.json"
WEIGHTS = "weights.npz"
ERROR = "error.txt"  # why a run of a sweep failed
LOCK = ".lock"
BEGUN = r"\.lock(\.json)?|\.(\.lock\.json|config\.yaml)\.[0-9]+"
"""Names of what a run has in its directory before its first file, or left there where it died before that."""
WRITER = "written_by"  # in config.yaml: the version of this package that wrote it
FREE = ("logger", "wandb", "callbacks", "checkpoint", "expected", "version", "source", "comment", WRITER)
"""Settings that may differ where a run is resumed."""

TASK_GIVEN = "task given"
"""How tables mark a run whose predictions were given the task of each sample; see `Result.task_given`."""

MOST, DEEPEST = 100_000, 50
"""Values in a file that is read, with what YAML's aliases repeat, and levels of lists and mappings in it."""


def _plain(name: str, value: Any) -> Any:
    """Return a value as dicts, lists, text, numbers, booleans and None; NumPy's scalars become Python's."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_plain(f"{name}[{i}]", item) for i, item in enumerate(value)]
    raise ValueError(f"{name} must be a plain value (text, number, list, mapping), got {value!r}")


def _finite(value: Any) -> Any:
    """Return a plain value with None for nan and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    path = f"{prefix}." if prefix else ""
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}{key}").items()}


def _write(path: Path, content: bytes) -> None:
    """Write a whole file or nothing."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path), part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the error of a write tell the file's name, as that of opening it does."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _open_no_link(path: str, flags: int) -> int:
    """Open a file that is changed in its place, but not what a link to another directory points at."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all; nan and infinity become null.

    Raises:
        ValueError: something in it is not a plain value.
    """
    text = json.dumps(_finite(_plain(path.stem, value)), indent=2, allow_nan=False, ensure_ascii=False)
    _write(path, (text + "\n").encode())


def read_json(content: str | bytes) -> dict[str, Any]:
    """Return the mapping that JSON describes; a whole number too large for a float becomes infinity.

    Raises:
        ValueError: it is not JSON or no mapping, or it is nested too deeply.
    """
    try:
        value = json.loads(content, parse_int=lambda text: int(text) if len(text) < 300 else float(text))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it holds no mapping")
    _check_size(value)
    return value


def read_yaml(path: Path, load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Return what a YAML file says.

    Args:
        path: of the file.
        load: makes values of its text; safe for what anybody wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not YAML or not UTF-8, it is nested too deeply, or its aliases make it huge.
    """
    text = path.read_bytes().decode()
    try:
        _check_size(yaml.compose(text, yaml.SafeLoader))
        return load(text)
    except Exception as error:  # the YAML reader raises whatever a wrong value leads to
        told = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(told or type(error).__name__) from error


def _check_size(root: Any) -> None:
    """Raise ValueError where there are too many values, or lists and mappings too deep in one another.

    Args:
        root: values, or the nodes of YAML, of which an alias is the node that it names.
    """
    found, waiting = 0, [(root, 0)]
    while waiting:
        value, depth = waiting.pop()
        found += 1
        if depth > DEEPEST or found > MOST:
            rule = f"nested more than {DEEPEST} deep" if depth > DEEPEST else f"more than {MOST} values"
            raise ValueError(f"it is {rule}")
        inner: Iterable[Any] = ()
        match value:
            case yaml.MappingNode():
                inner = chain(*value.value)
            case yaml.SequenceNode():
                inner = value.value
            case dict():
                inner = value.values()
            case list():
                inner = value
        waiting += [(item, depth + 1) for item in inner]


@dataclass(frozen=True)
class RunDirectory:
    """Writes the files of one run; make it with `create`."""

    path: Path

    @classmethod
    def create(cls, path: str | Path | None = None) -> RunDirectory:
        """Make the directory of a new run.

        Args:
            path: an empty directory, or one that does not exist yet; None for a new one under `runs/` in the
                working directory, named by the time.

        Raises:
            ValueError: the path is a file, is not empty or cannot be written.
        """
        if path is None:
            stem = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
            names = (Path("runs") / (f"{stem}_{k}" if k else stem) for k in count())
            target = next(name for name in names if not name.exists())
        else:
            target = Path(path)
        if target.exists() and not target.is_dir():
            raise ValueError(f"run_dir must be a directory, got the file {target}; choose another path")
        try:
            target.mkdir(parents=True, exist_ok=path is not None)
            occupied = next((p for p in target.iterdir() if not re.fullmatch(BEGUN, p.name)), None)
            with tempfile.TemporaryFile(dir=target):
                pass  # the only test of a right to write that holds for every file system and user
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
                "path, remove what it holds, or go on with its run (resume)"
            )
        return cls(target)

    @classmethod
    def open(
        cls, path: str | Path | None, config: Mapping[str, Any], resume: bool | Literal["auto"]
    ) -> RunDirectory:
        """Return the directory of a new run, or that of the run to go on with.

        Args:
            path: as in `create`.
            config: the run's settings; what is resumed must have the same.
            resume: True for a directory that holds a run; `"auto"` also for a new one.

        Raises:
            ValueError: as `create`; no run there; or one with other settings, which are named.
        """
        if resume and path is not None and (Path(path) / CONFIG).is_file():
            directory = cls(Path(path))
            directory.check_config(config)
            return directory
        if resume is True:
            raise ValueError(f"resume needs a run_dir that holds a run, got {path}; give its directory")
        return cls.create(path)

    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / SUMMARY).is_file() and _read(self.path / SUMMARY).get("status") == "finished"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process alone; a lock that a dead process has left does not count.

        Raises:
            ValueError: another process runs in it; its host and number are named.
        """
        from filelock import FileLock, Timeout  # slow to import

        lock, holder = FileLock(self.path / LOCK), self.path / f"{LOCK}.json"
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            try:
                who = json.loads(holder.read_text(encoding="utf-8"))
                told = f"process {who['process']} on {who['host']}"
            except (OSError, ValueError, KeyError, TypeError):
                told = "another process"
            raise ValueError(
                f"run_dir must not be in use, got {self.path}, in which {told} runs; wait for its end or "
                "choose another path"
            ) from error
        try:
            write_json(holder, {"host": platform.node(), "process": os.getpid()})
            yield
        finally:
            with suppress(OSError):  # from a disk that can be read only by now; no lock is held by its file
                holder.unlink(missing_ok=True)
                (self.path / LOCK).unlink(missing_ok=True)
            lock.release()

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError where the directory's run has other settings, naming those that differ.

        What only documents a run, or says how it is watched and saved, may differ.
        """
        before = _flat(_read(self.path / CONFIG))
        now = _flat(_plain("config", config))
        keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        keys = [key for key in keys if key.partition(".")[0] not in FREE]
        if keys:
            there, here = (
                [repr(flat[key]) if key in flat else "not set" for key in keys] for flat in (before, now)
            )
            told = map("{} is {} there and {} here".format, keys, there, here)
            raise ValueError(
                f"run_dir holds another run, got {self.path}: {'; '.join(told)}; resume it with its own "
                f"settings, or choose another path{other_version(writer(self.path))}"
            )

    def rewind_metrics(self, size: int) -> None:
        """Cut `metrics.jsonl` back to a size in bytes: what a resumed run makes again."""
        path = self.path / METRICS
        if path.is_file():
            with open(path, "r+b", opener=_open_no_link) as file:
                file.truncate(min(size, path.stat().st_size))

    def metrics_bytes(self) -> int:
        """Return the size of `metrics.jsonl`."""
        path = self.path / METRICS
        return path.stat().st_size if path.is_file() else 0

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.yaml`.

        Raises:
            ValueError: something in it is not a plain value.
        """
        plain = _plain("config", config)
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=sys.maxsize)
        _write(self.path / CONFIG, text.encode())

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl`; nan and infinity become null.

        Raises:
            ValueError: something in it is not a plain value.
        """
        line = json.dumps(_finite(_plain("record", record)), allow_nan=False, ensure_ascii=False)
        path = self.path / METRICS
        with naming(path), open(path, "a", encoding="utf-8", opener=_open_no_link) as file:
            file.write(line + "\n")

    def write_matrix(self, matrix: FloatArray) -> None:
        """Write `accuracy_matrix.csv`, `[T, T]`, with every digit that a float64 needs.

        Raises:
            ValueError: not a matrix of accuracies, see `sequel_core.runs.metrics.check_matrix`.
        """
        r = check_matrix(matrix)
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow([f"task_{j}" for j in range(len(r))])
        rows.writerows([["" if math.isnan(value) else repr(value) for value in row] for row in r.tolist()])
        _write(self.path / MATRIX, text.getvalue().encode())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`; nan and infinity become null.

        Raises:
            ValueError: something in it is not a plain value.
        """
        write_json(self.path / SUMMARY, summary)

    def write_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Write `weights.npz`: arrays by name, readable without pickle.

        Raises:
            ValueError: an array of Python objects.
        """
        arrays: dict[str, Any] = {name: np.asarray(array) for name, array in weights.items()}
        for name, array in arrays.items():
            if array.dtype.hasobject:
                raise ValueError(f"weights must be arrays of numbers, got objects in {name}")
        content = io.BytesIO()
        np.savez(content, **arrays)
        _write(self.path / WEIGHTS, content.getvalue())


@dataclass(frozen=True, eq=False)
class Result:
    """What a run found.

    The metrics are fractions, as `sequel_core.runs.metrics` defines them; nan where undefined.
    """

    run_dir: Path | None
    config: dict[str, Any]
    matrix: FloatArray  # [T, T], nan where not evaluated
    summary: dict[str, Any]

    @property
    def version(self) -> str | None:
        """The version of this package that wrote the run; None for an unfinished run of an early version."""
        return _writer(self.config, self.summary)

    def _metric(self, name: str) -> float:
        value = self.summary.get(name)
        return float(value) if isinstance(value, int | float) else math.nan

    @property
    def average_accuracy(self) -> float:
        """Accuracy after the last task, mean over tasks."""
        return self._metric("average_accuracy")

    @property
    def forgetting(self) -> float:
        """Best accuracy before the last task minus the final one, mean over past tasks."""
        return self._metric("forgetting")

    @property
    def forgetting_with_final(self) -> float:
        """Best accuracy, the final one included, minus the final one, mean over past tasks."""
        return self._metric("forgetting_with_final")

    @property
    def bwt(self) -> float:
        """Backward transfer."""
        return self._metric("bwt")

    @property
    def fwt(self) -> float:
        """Forward transfer; nan unless every task was evaluated before its training."""
        return self._metric("fwt")

    @property
    def learning_accuracy(self) -> float:
        """Accuracy on a task just after its training, mean over tasks."""
        return self._metric("learning_accuracy")

    @property
    def average_incremental_accuracy(self) -> float:
        """Accuracy on the tasks seen so far, mean over these tasks, then over the stream."""
        return self._metric("average_incremental_accuracy")

    @property
    def average_incremental_accuracy_over_samples(self) -> float:
        """Accuracy on all samples of the tasks seen so far, mean over the stream."""
        return self._metric("average_incremental_accuracy_over_samples")

    @property
    def worst_case_accuracy(self) -> float:
        """Lowest accuracy of each past task and the final one of the last, mean over tasks."""
        return self._metric("worst_case_accuracy")

    @property
    def task_given(self) -> bool:
        """Whether predictions were given the task of each sample in a scenario in which it is not known."""
        return self.summary.get("task_given") is True and self.summary.get("scenario") != "task"


def _read_config(path: Path) -> dict[str, Any]:
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise ValueError("it holds no mapping")
    return config


def _read_matrix(path: Path) -> FloatArray:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            header, *rows = csv.reader(file)
        except csv.Error as error:
            raise ValueError(str(error)) from error
    if len(rows) != len(header) or any(len(row) != len(header) for row in rows):
        raise ValueError(f"it must hold {len(header)} rows of {len(header)}, one per task of its header")
    return check_matrix([[float(cell) if cell else math.nan for cell in row] for row in rows])


def _read_summary(path: Path) -> dict[str, Any]:
    return read_json(path.read_bytes())


READERS: dict[str, Callable[[Path], Any]] = {
    CONFIG: _read_config,
    MATRIX: _read_matrix,
    SUMMARY: _read_summary,
}


def _read(path: Path) -> Any:
    """Return what a file of a run directory says.

    Raises:
        ValueError: it is damaged; it is named.
    """
    try:
        return READERS[path.name](path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def load_result(directory: str | Path) -> Result:
    """Read a run directory.

    A run that has not ended has no `summary.json`; its summary is `{"status": "unfinished"}` and the metrics
    of the matrix, which is `[0, 0]` before the first evaluation.

    Raises:
        ValueError: not a run directory, or a damaged file, which is named.
    """
    path = Path(directory)
    if not (path / CONFIG).is_file():
        raise ValueError(f"directory must be a run directory, got {path}, which has no {CONFIG}")
    found = {name: _read(path / name) for name in READERS if (path / name).is_file()}
    matrix = found.get(MATRIX, np.empty((0, 0), np.float64))
    if SUMMARY not in found:
        found[SUMMARY] = {"status": "unfinished", **(summarise(matrix) if matrix.size else {})}
    return Result(path, found[CONFIG], matrix, found[SUMMARY])


def read_metrics(directory: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the records of `metrics.jsonl` in order; none where there is no such file.

    A last line that was cut short, as a killed run leaves it, is left out.

    Raises:
        ValueError: a damaged line, which is named.
    """
    path = Path(directory) / METRICS
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = read_json(line)
            except ValueError as error:
                raise ValueError(f"{path} is damaged in line {number}: {error}") from error
            yield record


def load_weights(directory: str | Path) -> dict[str, NDArray[Any]]:
    """Read the weights of a run directory, by name.

    Raises:
        ValueError: no weights there, or a damaged file.
    """
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"directory must hold {WEIGHTS}, got {path.parent}; the run has not ended")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process, in bytes.

    psutil has the peak on Windows only. Linux has it in `VmHWM`; its `ru_maxrss` includes the peak of the
    process that started this one.
    """
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.is_file() and (peak := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(peak[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@cache
def _version(distribution: str) -> str:
    """Return the version of an installed distribution. Every checkpoint asks, and this reads files."""
    from importlib import metadata  # slow to import

    return metadata.version(distribution)


def _writer(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str | None:
    found = config.get(WRITER)
    if found is None and isinstance(summary.get("versions"), Mapping):
        found = summary["versions"].get(PACKAGE)
    return None if found is None else str(found)


def writer(directory: Path) -> str | None:
    """Return the version of this package that wrote a run directory; None if it does not tell, or is none."""
    found: dict[str, Any] = {}
    for name in (CONFIG, SUMMARY):
        with suppress(OSError, ValueError):
            found[name] = READERS[name](directory / name)
    return _writer(found.get(CONFIG, {}), found.get(SUMMARY, {}))


def other_version(found: str | None, what: str = "it was") -> str:
    """Return what an error adds if another version of this package wrote what does not fit; else nothing.

    Args:
        found: the version that wrote it; None if it does not tell, as 0.1.0 did not before the end of a run.
        what: was written by that version.
    """
    here = _version(PACKAGE)
    return "" if found == here else f" ({what} written by {PACKAGE} {found or '0.1.0'}, this is {here})"


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the numerical libraries that are loaded."""
    modules = {
        "numpy": "numpy",
        "torch": "torch",
        "pytorch-lightning": "pytorch_lightning",
        "jax": "jax",
        "flax": "flax",
        "optax": "optax",
        PACKAGE: "sequel_core",
    }
    found = {"python": platform.python_version()}
    for distribution, module in modules.items():
        if module in sys.modules:
            found[distribution] = _version(distribution)
    return found

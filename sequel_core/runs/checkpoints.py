"""Checkpoints of a run: numbered directories, trusted only with a manifest over all that they hold.

    <run_dir>/checkpoints/<number>/
        ...             what the learner writes: `state/` of orbax, or `lightning.ckpt`
        run.json        the orchestrator's part: where in the stream the run is, the accuracy matrix, ...
        manifest.json   size and sha256 of every other file; written last

A directory without its manifest is half of a checkpoint and is never chosen; one with a flipped byte is found
before anything is loaded from it.
"""

from __future__ import annotations

import hashlib
import math
import re
import reprlib
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sequel_core.runs.results import PACKAGE, other_version, read_json, versions, write_json

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
RUN = "run.json"
FORMAT = 1
NAME = r"[0-9]+"
HALF = rf"{NAME}(\.orbax-checkpoint-tmp.*)?"  # under such a name orbax writes


class CheckpointWarning(UserWarning):
    """A run goes on, but not from where, or not with what, one would expect."""


class Checkpoint(NamedTuple):
    """A whole checkpoint."""

    path: Path
    run: dict[str, Any]  # the orchestrator's part

    def check(self, num_tasks: int) -> None:
        """Refuse an orchestrator's part that no run over so many tasks has written.

        Raises:
            ValueError: a value is missing, or has another kind, shape or range; it is named.
        """

        def number(value: Any) -> bool:
            return type(value) in (int, float) and math.isfinite(value)

        def numbers(values: Any) -> bool:
            return isinstance(values, dict) and all(v is None or number(v) for v in values.values())

        def fractions(values: Any, *shape: int) -> bool:
            if not shape:
                return values is None or (number(values) and 0 <= values <= 1)
            length, *rest = shape
            return (
                isinstance(values, list)
                and len(values) == length
                and all(fractions(v, *rest) for v in values)
            )

        def place(value: Any) -> bool:
            task, part = value if isinstance(value, list) and len(value) == 2 else (None, None)
            return type(task) is int and -1 <= task < num_tasks and part in ("train", "evaluate")

        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "done": (place, f"a task from -1 to {num_tasks - 1} and train or evaluate"),
            "matrix": (lambda v: fractions(v, num_tasks, num_tasks), f"{num_tasks} x {num_tasks} fractions"),
            "baseline": (lambda v: v is None or fractions(v, num_tasks), f"{num_tasks} fractions or null"),
            "extra": (numbers, "numbers by name"),
            "seconds": (lambda v: numbers(v) and None not in v.values(), "numbers by name"),
            "total_seconds": (number, "a number"),
            "metrics_bytes": (lambda v: type(v) is int and v >= 0, "a whole number >= 0"),
            "versions": (lambda v: isinstance(v, dict), "versions by name"),
        }
        for name, (holds, rule) in rules.items():
            if name not in self.run or not holds(self.run[name]):
                got = reprlib.repr(self.run[name]) if name in self.run else "none"
                raise ValueError(
                    f"checkpoint {self.path} cannot be used, though it is whole: in its {RUN}, {name} must "
                    f"be {rule}, got {got}; remove it to go on from the one before{self.other_version()}"
                )

    def other_version(self) -> str:
        """Return what an error adds if another version of this package wrote the checkpoint; else nothing."""
        known = self.run.get("versions")
        return other_version(known[PACKAGE]) if isinstance(known, dict) and PACKAGE in known else ""

    def warn_of_versions(self) -> None:
        """Warn where other versions of the libraries wrote it than are loaded now."""
        now = versions()
        changed = [
            f"{name} {then} (now {now[name]})"
            for name, then in self.run["versions"].items()
            if name in now and now[name] != then
        ]
        if changed:
            told = (
                f"checkpoint {self.path} was written with {', '.join(changed)}; the run goes on, but may end "
                "with other roundings than one that never stopped"
            )
            warnings.warn(told, CheckpointWarning, stacklevel=2)


class Checkpoints:
    """Writes and finds the checkpoints of one run directory.

    Args:
        run_dir: of the run.
        keep: the newest so many are kept, >= 1.
    """

    def __init__(self, run_dir: Path, keep: int = 2) -> None:
        self.directory = run_dir / FOLDER
        self._keep = keep
        self._last = max(map(_number, _numbered(self.directory)), default=0)
        self._worker = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None

    def save(self, write: Callable[[Path], Callable[[], None]], run: Mapping[str, Any]) -> None:
        """Write a checkpoint; what can be done in the background is.

        Args:
            write: writes the learner's part into a directory and returns what waits for the end of that.
            run: the orchestrator's part, plain values.

        Raises:
            OSError: this one, or the one before, could not be written.
        """
        self.wait()
        self._last += 1
        path = self.directory / str(self._last)
        self.directory.mkdir(exist_ok=True)
        finish = write(path)
        self._pending = self._worker.submit(self._finish, path, finish, {"format": FORMAT, **run})

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if one is.

        Raises:
            OSError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for what is being written, and end the background's thread."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint; a damaged one is warned of, half of one is passed over.

        Raises:
            ValueError: it was written by a version with another format.
        """
        for path in reversed(_numbered(self.directory)):
            if path.is_symlink() or not (path / MANIFEST).is_file():
                continue
            try:
                run = verify(path)
            except ValueError as error:
                told = f"{error}; an older checkpoint is used, if there is one"
                warnings.warn(told, CheckpointWarning, stacklevel=2)
                continue
            if run.get("format") != FORMAT:
                raise ValueError(
                    f"checkpoint {path} has format {run.get('format')}, this version reads {FORMAT}; go on "
                    f"with the version that wrote it{Checkpoint(path, run).other_version()}"
                )
            return Checkpoint(path, run)
        return None

    def clear(self, after: Path | None = None) -> None:
        """Remove what is left of checkpoints newer than this one: halves, and what cannot be trusted."""
        first = 0 if after is None else _number(after)
        for path in _numbered(self.directory, HALF):
            if _number(path) > first:
                _remove(path)
        self._last = first

    def bytes(self) -> int:
        """Return the disk space that the checkpoints take."""
        return sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file())

    def _finish(self, path: Path, finish: Callable[[], None], run: Mapping[str, Any]) -> None:
        finish()
        write_json(path / RUN, run)
        write_json(path / MANIFEST, _files(path))
        for old in _numbered(self.directory)[: -self._keep]:
            _remove(old)


def verify(path: Path) -> dict[str, Any]:
    """Return the orchestrator's part of a checkpoint, once all of its files are what its manifest says.

    Raises:
        ValueError: something is missing or differs; it is named.
    """
    try:
        listed = read_json((path / MANIFEST).read_bytes())
        if RUN not in listed:
            raise ValueError("it lists no run.json")
        found = _files(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {MANIFEST} cannot be used ({error})") from error
    for name in sorted(listed.keys() | found.keys()):
        if listed.get(name) != found.get(name):
            what = "is missing" if name not in found else "is not of it" if name not in listed else "differs"
            raise ValueError(f"checkpoint {path} is damaged: {name} {what}")
    try:
        return read_json((path / RUN).read_bytes())
    except ValueError as error:
        raise ValueError(f"checkpoint {path} is damaged: {RUN} cannot be used ({error})") from error


def _numbered(directory: Path, name: str = NAME) -> list[Path]:
    """Return what has a checkpoint's name, by number."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in paths if re.fullmatch(name, path.name)), key=_number)


def _number(path: Path) -> int:
    return int(path.name.partition(".")[0])


def _files(path: Path) -> dict[str, Any]:
    """Return size and sha256 of every file below, but for the manifest, by relative path."""
    files: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name != MANIFEST:
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            files[name] = {"bytes": file.stat().st_size, "sha256": digest}
    return files


def _remove(path: Path) -> None:
    """Remove a checkpoint, its manifest first, so that no half of it is ever trusted."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)

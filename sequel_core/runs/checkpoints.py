"""Checkpoints of a run: numbered directories, each with a manifest of its files.

    <run_dir>/checkpoints/<number>/
        ...             the learner's part: `state/` of orbax, or `lightning.ckpt`
        run.json        the orchestrator's part: position in the stream, matrix of scores, ...
        manifest.json   size and sha256 of every other file; written last

A directory without a manifest is incomplete and is never used. A directory whose files do not match the
manifest is damaged, which is detected before anything is loaded from it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sequel_core.hparams import CheckpointHParams
from sequel_core.objectives import Score
from sequel_core.runs.directory import RunDirectory
from sequel_core.runs.files import read_json, write_json
from sequel_core.runs.learner import Learner
from sequel_core.runs.signals import Signals
from sequel_core.runs.state import RunState, check_state
from sequel_core.runs.versions import PACKAGE, loaded_versions, version_note

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
RUN = "run.json"
FORMAT = 1
NAME = r"[0-9]+"
PARTIAL = rf"{NAME}(\.orbax-checkpoint-tmp.*)?"  # orbax first writes under such a name


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was skipped, or a run resumes with other libraries or devices."""


class Checkpoint(NamedTuple):
    """A complete checkpoint."""

    path: Path
    run: dict[str, Any]  # the orchestrator's part, contents of `run.json`

    def check(self, num_tasks: int, score: Score) -> None:
        """Check the orchestrator's part.

        Args:
            num_tasks: number of tasks in the stream.
            score: what the run measures.

        Raises:
            ValueError: a value is missing, or has another type, shape or range; the error names it.
        """
        try:
            check_state(self.run, num_tasks, score)
        except ValueError as error:
            raise self.unusable(f": in its {RUN}, {error}") from error

    def unusable(self, reason: str) -> ValueError:
        """Return the error for a checkpoint that is undamaged but does not fit."""
        return ValueError(
            f"checkpoint {self.path} cannot be used, although it is undamaged{reason}; delete it to resume "
            f"from the previous one{self.version_note()}"
        )

    def version_note(self) -> str:
        """Return a note for the end of an error if another version of this package wrote the checkpoint."""
        recorded = self.run.get("versions")
        return version_note(recorded[PACKAGE]) if isinstance(recorded, dict) and PACKAGE in recorded else ""

    def warn_of_changes(self, num_devices: int) -> None:
        """Warn if the checkpoint was written with other versions of loaded libraries, or other devices.

        Args:
            num_devices: number of devices that share a batch now.
        """
        now = loaded_versions()
        changed = [
            f"{name} {version} (now {now[name]})"
            for name, version in self.run["versions"].items()
            if name in now and now[name] != version
        ]
        before = self.run.get("num_devices", num_devices)
        if before != num_devices:
            changed.append(f"num_devices {before} (now {num_devices})")
        if changed:
            warnings.warn(
                f"checkpoint {self.path} was written with {', '.join(changed)}; the run continues, but its "
                "results may differ by rounding from those of an uninterrupted run",
                CheckpointWarning,
                stacklevel=2,
            )


class Checkpoints:
    """Writes, finds and removes the checkpoints of one run directory.

    Args:
        run_dir: directory of the run.
        keep: number of newest checkpoints to keep, >= 1.
    """

    def __init__(self, run_dir: Path, keep: int = 2) -> None:
        self.directory = run_dir / FOLDER
        self._keep = keep
        self._last = max(map(_number, _numbered(self.directory)), default=0)
        self._worker = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None

    def save(self, write: Callable[[Path], Callable[[], None]], run: Mapping[str, Any]) -> None:
        """Write a checkpoint, part of it in the background.

        Args:
            write: writes the learner's part into a directory; returns a function that waits until it is
                complete.
            run: the orchestrator's part, plain values and arrays.

        Raises:
            OSError: this checkpoint or the previous one could not be written.
        """
        self.wait()
        self._last += 1
        path = self.directory / str(self._last)
        self.directory.mkdir(exist_ok=True)
        finish = write(path)
        self._pending = self._worker.submit(self._finish, path, finish, {"format": FORMAT, **run})

    def wait(self) -> None:
        """Wait until the checkpoint in progress, if any, is written.

        Raises:
            OSError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the checkpoint in progress and end the background thread.

        Raises:
            OSError: the checkpoint could not be written.
        """
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def newest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint; None if there is none.

        Incomplete checkpoints are skipped, damaged ones with a warning.

        Raises:
            ValueError: the checkpoint was written in another format.
        """
        for path in reversed(_numbered(self.directory)):
            if path.is_symlink() or not (path / MANIFEST).is_file():
                continue
            try:
                run = verify(path)
            except ValueError as error:
                message = f"{error}; an older checkpoint is used, if there is one"
                warnings.warn(message, CheckpointWarning, stacklevel=2)
                continue
            checkpoint = Checkpoint(path, run)
            if run.get("format") != FORMAT:
                raise ValueError(
                    f"checkpoint {path} has format {run.get('format')}, this version reads {FORMAT}; resume "
                    f"with the version that wrote it{checkpoint.version_note()}"
                )
            return checkpoint
        return None

    def clear(self, after: Path | None = None) -> None:
        """Remove incomplete and damaged checkpoints.

        Args:
            after: checkpoint whose successors are removed; None to remove all.
        """
        first = 0 if after is None else _number(after)
        for path in _numbered(self.directory, PARTIAL):
            if _number(path) > first:
                _remove(path)
        self._last = first

    def bytes(self) -> int:
        """Return the disk space of the checkpoints in bytes."""
        return sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file())

    def _finish(self, path: Path, finish: Callable[[], None], run: Mapping[str, Any]) -> None:
        finish()
        write_json(path / RUN, run)
        write_json(path / MANIFEST, _files(path))
        for old in _numbered(self.directory)[: -self._keep]:
            _remove(old)


class Checkpointer:
    """Decides when a run writes checkpoints, and restores the run from one.

    Args:
        learner: whose part is saved and restored.
        directory: of the run.
        state: of the run; the orchestrator's part is made from it and restored into it.
        signals: that end the run.
        settings: when checkpoints are due, and how many are kept; none is written if `keep` is 0.
    """

    def __init__(
        self,
        learner: Learner,
        directory: RunDirectory,
        state: RunState,
        signals: Signals,
        settings: CheckpointHParams,
    ) -> None:
        self._learner, self._directory, self._state, self._signals = learner, directory, state, signals
        self._enabled = settings.keep > 0 and learner.main_process
        self._files = Checkpoints(directory.path, max(1, settings.keep))
        self._minutes = settings.every_minutes
        self._saved_at = time.monotonic()
        self.every_n_steps = settings.every_n_steps

    def due(self) -> bool:
        """Whether a checkpoint is due now: the time is over, or a signal was received."""
        late = self._minutes is not None and time.monotonic() - self._saved_at >= 60 * self._minutes
        return late or self._signals.received is not None

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            OSError: this checkpoint or the previous one could not be written.
        """
        if self._enabled:
            with self._state.stopwatch.measure("checkpoint"):
                run = {
                    **self._state.to_dict(),
                    "metrics_bytes": self._directory.metrics_bytes(),
                    "versions": loaded_versions(),
                    "num_devices": self._learner.num_devices,
                }
                self._files.save(self._learner.save, run)
        self._saved_at = time.monotonic()

    def save_within_task(self) -> None:
        """Write a checkpoint during training; then end the run if a signal was received.

        Raises:
            OSError: the checkpoint could not be written.
            InterruptedRunError: a signal was received.
        """
        self.save()
        self._signals.check()

    def end_if_signalled(self) -> None:
        """End the run between two evaluations if a signal was received.

        Raises:
            InterruptedRunError: a signal was received; if a task was trained on but not yet evaluated, a
                checkpoint was written first.
        """
        if self._signals.received is not None:
            if self._state.position.part == "train":
                self.save()
            self._signals.check()

    def restore(self) -> bool:
        """Restore the learner and the state from the newest complete checkpoint; remove what is newer.

        Returns:
            Whether there was a checkpoint.

        Raises:
            ValueError: the checkpoint does not fit the learner or the stream.
        """
        learner = self._learner
        checkpoint: Checkpoint | None = learner.agree(self._files.newest() if learner.main_process else None)
        if checkpoint is not None:
            checkpoint.check(len(self._state.matrix), self._learner.score)
            self._load(checkpoint)
            if learner.main_process and not self._directory.finished():
                checkpoint.warn_of_changes(learner.num_devices)
        if learner.main_process:
            self._files.clear(None if checkpoint is None else checkpoint.path)
        return checkpoint is not None

    def _load(self, checkpoint: Checkpoint) -> None:
        try:
            self._learner.restore(checkpoint.path)
            self._state.load(checkpoint.run)
            self._directory.rewind_metrics(checkpoint.run["metrics_bytes"])
            self._directory.write_matrix(self._state.matrix, self._learner.score)
        except Exception as error:  # a file of another program leads to errors of any type
            if isinstance(error, ValueError) and str(checkpoint.path) in str(error):
                if not checkpoint.version_note():
                    raise
                raise ValueError(f"{error}{checkpoint.version_note()}") from error
            name = type(error).__name__ + (f": {error}" if isinstance(error, KeyError) else "")
            raise checkpoint.unusable(f" ({name})") from error

    def close(self) -> None:
        """Wait for the checkpoint in progress.

        Raises:
            OSError: it could not be written.
        """
        self._files.close()

    def bytes(self) -> int:
        """Return the disk space of the checkpoints in bytes, 0 in a process that does not write them."""
        return self._files.bytes() if self._learner.main_process else 0


def verify(path: Path) -> dict[str, Any]:
    """Compare the files of a checkpoint with its manifest.

    Returns:
        The orchestrator's part.

    Raises:
        ValueError: a file is missing, differs or is not in the manifest; the error names it.
    """
    try:
        listed = read_json((path / MANIFEST).read_bytes())
        if RUN not in listed:
            raise ValueError(f"it does not list {RUN}")
        present = _files(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {MANIFEST} cannot be used ({error})") from error
    for name in sorted(listed.keys() | present.keys()):
        if listed.get(name) != present.get(name):
            missing, unlisted = name not in present, name not in listed
            problem = "is missing" if missing else "is not in the manifest" if unlisted else "differs"
            raise ValueError(f"checkpoint {path} is damaged: {name} {problem}")
    try:
        return read_json((path / RUN).read_bytes())
    except ValueError as error:
        raise ValueError(f"checkpoint {path} is damaged: {RUN} cannot be used ({error})") from error


def _numbered(directory: Path, name: str = NAME) -> list[Path]:
    """Return the paths whose name matches a pattern that starts with a number, sorted by the number."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in paths if re.fullmatch(name, path.name)), key=_number)


def _number(path: Path) -> int:
    return int(path.name.partition(".")[0])


def _files(path: Path) -> dict[str, Any]:
    """Return size and sha256 of every file below a path except the manifest, by relative path."""
    files: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name != MANIFEST:
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            files[name] = {"bytes": file.stat().st_size, "sha256": digest}
    return files


def _remove(path: Path) -> None:
    """Remove a checkpoint, its manifest first, so that what is left of it is never used."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)

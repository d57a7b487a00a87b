"""Lightning's loggers for a run of several Trainers, with images, tables, resuming and closing."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning.loggers import CometLogger, CSVLogger, Logger, TensorBoardLogger, WandbLogger

from sequel_core.runs.formatting import markdown_table
from sequel_core.runs.loggers import (
    FLUSH_SECONDS,
    ConsoleTable,
    CsvTable,
    JsonLines,
    Loggers,
    end_summary,
    hparams_summaries,
)
from sequel_core.runs.services import comet_experiment, wandb_arguments
from sequel_lightning._compat import (
    add_summary,
    has_experiment,
    purge_after,
    set_experiment,
    without_anonymous,
)

GUARDED = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
"""The methods that Trainers and callbacks call on loggers."""


class GuardedLogger:
    """Wraps a user's logger for the Trainers of a learner. After its first error, a logger is not used again.

    The wrapper also drops `epoch`, which Lightning adds to what callbacks log and which restarts with every
    task. Attributes are those of the user's logger, and `isinstance` sees its class.

    Args:
        logger: the user's logger.
        attempt: calls a function for a logger; see `Loggers.attempt`.
    """

    _logger: Logger
    _attempt: Callable[..., None]

    def __init__(self, logger: Logger, attempt: Callable[..., None]) -> None:
        vars(self).update(_logger=logger, _attempt=attempt)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class of the user's logger."""
        return type(self._logger)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._logger, name)
        if name == "log_metrics":
            value = partial(_without_epoch, value)
        return partial(self._attempt, self._logger, value) if name in GUARDED else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._logger, name, value)

    def __reduce__(self) -> Any:
        return GuardedLogger, (self._logger, self._attempt)  # for copy and pickle


class TrainersLoggers(Loggers):
    """Loggers that a learner and its Trainers share."""

    def for_trainer(self) -> list[Any]:
        """Return the loggers that still work, as a Trainer gets them."""
        return [GuardedLogger(logger, self.attempt) for logger in self]

    def close(self, failed: bool) -> None:
        """Close the loggers."""
        self.each(lambda logger: close(logger, failed))


def _without_epoch(
    log_metrics: Callable[..., None], metrics: Mapping[str, Any], step: int | None = None
) -> None:
    kept = {name: value for name, value in metrics.items() if name != "epoch"}
    if kept:
        log_metrics(kept, step)


def log_hparams(logger: Logger, config: Mapping[str, Any]) -> None:
    """Send a run's configuration; to TensorBoard also for its HParams dashboard, without `hp_metric`."""
    if not isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(dict(config))
        return
    logger.log_hyperparams(dict(config), metrics={})
    for summary in hparams_summaries(config):
        add_summary(logger, summary)


def log_image(logger: Logger, name: str, image: NDArray[np.uint8], step: int) -> None:
    """Log an image `[H, W, 3]`, if the logger takes images."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, image, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [image], step=step)
    elif isinstance(logger, CometLogger):
        logger.experiment.log_image(Image.fromarray(image), name, step=step)


def log_table(
    logger: Logger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """Log a table, if the logger takes tables; TensorBoard gets it as Markdown."""
    data = [list(row) for row in rows]
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(name, markdown_table(columns, rows), step)
    elif isinstance(logger, WandbLogger):
        logger.log_table(name, columns=list(columns), data=data, step=step)
    elif isinstance(logger, CometLogger):
        logger.experiment.log_table(f"{name}.csv", tabular_data=data, headers=list(columns))
    elif isinstance(logger, JsonLinesLogger):
        logger.lines.write_table(step, name, columns, rows)


def resume_logger(logger: Logger, step: int) -> None:
    """Let a logger continue after a step, and remove what it wrote after that, if its format allows it."""
    resume = getattr(logger, "resume", None)
    if resume is not None:
        resume(step)
    elif isinstance(logger, TensorBoardLogger):
        purge_after(logger, step)
    elif isinstance(logger, CSVLogger):
        directory = Path(logger.log_dir)
        table = CsvTable(directory)
        table.resume(step)
        content = table.path.read_bytes() if table.path.is_file() else b""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            writer: Any = logger.experiment  # deletes the file
        if content:
            table.path.write_bytes(content)
            writer.metrics_keys = table.columns


def close(logger: Logger, failed: bool = False) -> None:
    """Flush and close a logger, with the status of the run."""
    if isinstance(logger, TensorBoardLogger) and has_experiment(logger):
        add_summary(logger, end_summary(failed))
    logger.save()
    logger.finalize("failed" if failed else "success")
    if isinstance(logger, WandbLogger) and has_experiment(logger):
        logger.experiment.finish(exit_code=int(failed))  # else the next run would continue this one
    elif isinstance(logger, CometLogger) and has_experiment(logger):
        logger.experiment.end()


class ConsoleLogger(Logger):
    """Prints the newest value of every number after each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self._table = ConsoleTable()

    @property
    def name(self) -> str:
        """The name."""
        return "console"

    @property
    def version(self) -> str:
        """Empty, as nothing is kept."""
        return ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Print the newest values after an evaluation."""
        self._table.write(step or 0, metrics)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


class JsonLinesLogger(Logger):
    """Writes `metrics.jsonl`: numbers, tables and the settings, one JSON object per line.

    Args:
        directory: created at the first write.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self._directory = Path(directory)
        self.lines = JsonLines(directory)
        self.resume = self.lines.resume

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self._directory.name

    @property
    def version(self) -> str:
        """Empty, as a directory holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The parent of the directory."""
        return str(self._directory.parent)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a line of numbers."""
        self.lines.write_numbers(step or 0, metrics)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Add a line with the settings."""
        self.lines.write({"hparams": vars(params) if isinstance(params, Namespace) else params})


class LateCometLogger(CometLogger):
    """A CometLogger whose experiment starts at the first write, and which can write an archive offline.

    Lightning 2.6 makes an offline experiment with `disabled=True`, which writes nothing.

    Args:
        run_dir: the archive of an offline experiment is written to `<run_dir>/comet`.
        settings: workspace, project, name, tags, mode ("online", "offline").
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self._start: Callable[[], Any] | None = None
        super().__init__(
            workspace=settings.get("workspace"),
            project=settings.get("project"),
            offline_directory=str(run_dir / "comet"),
        )
        self._start = partial(comet_experiment, settings, run_dir)

    def _create_experiment(self) -> None:
        if self._start is not None:  # not yet in the constructor
            set_experiment(self, self._start())


def csv_logger(run_dir: Path, settings: Mapping[str, Any]) -> CSVLogger:
    """Return Lightning's logger of `<run_dir>/csv`, which writes each row at once."""
    return CSVLogger(run_dir, name="csv", version="", flush_logs_every_n_steps=1)


def tensorboard_logger(run_dir: Path, settings: Mapping[str, Any]) -> TensorBoardLogger:
    """Return Lightning's logger of `<run_dir>/tensorboard`."""
    return TensorBoardLogger(
        run_dir,
        name="tensorboard",
        version="",
        default_hp_metric=False,
        flush_secs=FLUSH_SECONDS,
        purge_step=0,  # removes the events of an earlier run
    )


def wandb_logger(run_dir: Path, settings: Mapping[str, Any]) -> WandbLogger:
    """Return Lightning's Weights & Biases logger; the run starts at the first write."""
    return without_anonymous(WandbLogger(save_dir=run_dir, **wandb_arguments(settings, run_dir)))


LOGGERS: dict[str, Callable[[Path, Mapping[str, Any]], Logger]] = {
    "comet": LateCometLogger,
    "console": lambda run_dir, settings: ConsoleLogger(),
    "csv": csv_logger,
    "jsonl": lambda run_dir, settings: JsonLinesLogger(run_dir / "jsonl"),
    "tensorboard": tensorboard_logger,
    "wandb": wandb_logger,
}
"""Functions that make the logger of each name, from a run's directory and the logger's settings."""

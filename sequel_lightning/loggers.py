"""Lightning's loggers across the Trainers of a run, and what they lack: pictures, tables, files, an end."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
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

GUARDED = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")


class TrainersLoggers(Loggers):
    """Loggers that a learner and its Trainers share.

    Until `close` each logger's own methods are replaced, on the object, by ones whose first error ends its
    part in the run, as Trainers and callbacks call them too. They also leave out `epoch`, which Lightning
    adds to what callbacks log and which begins again with every task.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        super().__init__(loggers)
        self._all = tuple(self)
        for logger in self._all:
            for name in GUARDED:
                own = getattr(logger, name)
                call = partial(_without_epoch, own) if name == "log_metrics" else own
                setattr(logger, name, partial(self.attempt, logger, call))

    def close(self, failed: bool) -> None:
        """Close the loggers and give them back as they were."""
        self.each(lambda logger: close(logger, failed))
        for logger in self._all:
            for name in GUARDED:
                logger.__dict__.pop(name, None)


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
        logger.experiment._get_file_writer().add_summary(summary)


def log_image(logger: Logger, name: str, image: NDArray[np.uint8], step: int) -> None:
    """Send a picture `[H, W, 3]`; to a logger that takes none, nothing."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, image, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [image], step=step)
    elif isinstance(logger, CometLogger):
        logger.experiment.log_image(Image.fromarray(image), name, step=step)


def log_table(
    logger: Logger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """Send a table, to TensorBoard as Markdown; to a logger that takes none, nothing."""
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
    """Let a logger go on after a step, and forget what it wrote after it, where its format allows that."""
    own = getattr(logger, "resume", None)
    if own is not None:
        own(step)
    elif isinstance(logger, TensorBoardLogger):
        logger._kwargs["purge_step"] = step + 1
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
    """Write what a logger still holds and close it, with the status that the run ended with."""
    if isinstance(logger, TensorBoardLogger) and logger._experiment is not None:
        logger.experiment._get_file_writer().add_summary(end_summary(failed))
    logger.save()
    logger.finalize("failed" if failed else "success")
    if isinstance(logger, WandbLogger) and logger._experiment is not None:
        logger.experiment.finish(
            exit_code=int(failed)
        )  # Lightning leaves it open, and the next run would join
    elif isinstance(logger, CometLogger) and logger._experiment is not None:
        logger.experiment.end()


class ConsoleLogger(Logger):
    """Prints the newest value of every number after each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self._table = ConsoleTable()

    @property
    def name(self) -> str:
        """Its name."""
        return "console"

    @property
    def version(self) -> str:
        """None, as it keeps nothing."""
        return ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take numbers in, and print after an evaluation."""
        self._table.write(step or 0, metrics)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Print none."""


class JsonLinesLogger(Logger):
    """Writes `metrics.jsonl`: numbers, tables and the settings, one JSON object a line.

    Args:
        directory: made at the first write.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self._directory = Path(directory)
        self.lines = JsonLines(directory)
        self.resume = self.lines.resume

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self._directory.name

    @property
    def version(self) -> str:
        """None, as a directory holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder that its directory lies in."""
        return str(self._directory.parent)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a line of numbers."""
        self.lines.write_numbers(step or 0, metrics)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Add a line with the settings."""
        self.lines.write({"hparams": vars(params) if isinstance(params, Namespace) else params})


class LateCometLogger(CometLogger):
    """Lightning's, but for two things: the experiment starts at the first write, and offline it is kept.

    Lightning 2.6 makes an offline experiment with `disabled=True`, which writes nothing.

    Args:
        run_dir: an offline experiment's archive goes to `<run_dir>/comet`.
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
            self._experiment = self._start()


def csv_logger(run_dir: Path, settings: Mapping[str, Any]) -> CSVLogger:
    """Return Lightning's logger of `<run_dir>/csv`; each row is on the disk at once."""
    return CSVLogger(run_dir, name="csv", version="", flush_logs_every_n_steps=1)


def tensorboard_logger(run_dir: Path, settings: Mapping[str, Any]) -> TensorBoardLogger:
    """Return Lightning's logger of `<run_dir>/tensorboard`."""
    return TensorBoardLogger(
        run_dir,
        name="tensorboard",
        version="",
        default_hp_metric=False,
        flush_secs=FLUSH_SECONDS,
        purge_step=0,  # what the directory holds of an earlier run
    )


def wandb_logger(run_dir: Path, settings: Mapping[str, Any]) -> WandbLogger:
    """Return Lightning's Weights & Biases logger; the run starts at the first write."""
    logger = WandbLogger(save_dir=run_dir, **wandb_arguments(settings, run_dir))
    logger._wandb_init.pop("anonymous")  # which W&B warns of wherever it is passed
    return logger


LOGGERS: dict[str, Callable[[Path, Mapping[str, Any]], Logger]] = {
    "comet": LateCometLogger,
    "console": lambda run_dir, settings: ConsoleLogger(),
    "csv": csv_logger,
    "jsonl": lambda run_dir, settings: JsonLinesLogger(run_dir / "jsonl"),
    "tensorboard": tensorboard_logger,
    "wandb": wandb_logger,
}
"""What makes the logger of each name, of a run's directory and its settings."""

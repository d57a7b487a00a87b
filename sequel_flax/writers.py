"""Metric writers of Flax runs; they have the methods of `clu.metric_writers.MetricWriter`."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from sequel_core.runs.formatting import markdown_table
from sequel_core.runs.loggers import (
    FLUSH_SECONDS,
    ConsoleTable,
    CsvTable,
    JsonLines,
    end_summary,
    hparams_summaries,
    number,
)
from sequel_core.runs.services import comet_experiment, wandb_arguments

QUEUED_EVENTS = 100


class MetricWriter(Protocol):
    """The methods of `clu.metric_writers.MetricWriter` that a learner calls. All writers of clu have them.

    Example:
        >>> writer: MetricWriter = ConsoleWriter()
        >>> writer.write_scalars(1, {"train/loss": 0.5})
    """

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write scalars.

        Args:
            step: The optimizer step.
            scalars: Values by name.
        """
        ...

    def write_images(self, step: int, images: Mapping[str, NDArray[np.uint8]]) -> None:
        """Write images.

        Args:
            step: The optimizer step.
            images: Arrays `[N, H, W, C]` by name.
        """
        ...

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts.

        Args:
            step: The optimizer step.
            texts: Markdown by name.
        """
        ...

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings of the run.

        Args:
            hparams: Settings by name; they may be nested.
        """
        ...

    def flush(self) -> None:
        """Write buffered data."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class SilentWriter:
    """A writer whose methods, those of `clu.metric_writers.MetricWriter`, do nothing.

    It is the base class of the writers in this module: data that a writer does not support is ignored.

    Example:
        >>> class Printer(SilentWriter):
        ...     def write_scalars(self, step, scalars):
        ...         print(step, scalars)
        >>> writer = Printer()
        >>> writer.write_scalars(1, {"train/loss": 0.5})
        1 {'train/loss': 0.5}
        >>> writer.write_texts(1, {"note": "ignored"})
    """

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write scalars by name."""

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Write images `[N, H, W, C]` or `[H, W, C]` by name, uint8 or floats in [0, 1]."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write Markdown texts by name."""

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Write histograms of arrays by name."""

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Write audio `[N, T, C]` by name."""

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Write videos `[N, T, H, W, C]` by name."""

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Write tensors by name, for plug-ins of TensorBoard."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings of the run; they may be nested."""

    def flush(self) -> None:
        """Write buffered data."""

    def close(self) -> None:
        """Flush and close."""


def write_table(
    writer: MetricWriter, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Write a table with the writer's `write_table` if it has one, else as a Markdown text.

    Args:
        writer: The metric writer.
        step: The optimizer step.
        name: The name of the table.
        columns: The headings.
        rows: The cells of each row.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write_table(JsonLinesWriter(directory), 1, "accuracy", ["task", "value"], [[0, 0.9]])
        ...     print((Path(directory) / "metrics.jsonl").read_text(), end="")
        {"step": 1, "accuracy": {"columns": ["task", "value"], "rows": [[0, 0.9]]}}
    """
    if hasattr(writer, "write_table"):
        writer.write_table(step, name, columns, rows)
    else:
        writer.write_texts(step, {name: markdown_table(columns, rows)})


def resume_writer(writer: MetricWriter, step: int) -> None:
    """Remove what a writer wrote after a step, if the writer has a method `resume`.

    Args:
        writer: The metric writer.
        step: The optimizer step from which the run resumes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     writer = CsvWriter(directory)
        ...     for step in (1, 2):
        ...         writer.write_scalars(step, {"loss": 0.5})
        ...     resume_writer(CsvWriter(directory), 1)
        ...     print((Path(directory) / "metrics.csv").read_text().split())
        ['loss,step', '0.5,1']
    """
    if hasattr(writer, "resume"):
        writer.resume(step)


def close_writer(writer: MetricWriter, failed: bool) -> None:
    """Flush and close a writer.

    Args:
        writer: The metric writer.
        failed: Whether the run failed. If so, the writer's `fail` is called first, if it has one.

    Example:
        >>> close_writer(ConsoleWriter(), failed=False)
    """
    if failed and hasattr(writer, "fail"):
        writer.fail()
    try:
        writer.flush()
    finally:
        writer.close()


class ConsoleWriter(SilentWriter):
    """Prints the latest value of every scalar after each evaluation.

    Example:
        >>> ConsoleWriter().write_scalars(1, {"train/loss": 0.5})  # printed with the next evaluation
    """

    def __init__(self) -> None:
        self._table = ConsoleTable()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Store scalars; print all of them if some are of an evaluation."""
        self._table.write(step, scalars)


class JsonLinesWriter(SilentWriter):
    """Writes scalars, texts, tables and the settings to `metrics.jsonl`, one JSON object per line.

    Args:
        directory: It is created at the first write.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     JsonLinesWriter(directory).write_scalars(1, {"loss": 0.5})
        ...     print((Path(directory) / "metrics.jsonl").read_text(), end="")
        {"step": 1, "loss": 0.5}
    """

    def __init__(self, directory: str | Path) -> None:
        self._lines = JsonLines(directory)
        self.resume = self._lines.resume

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Add a line with scalars."""
        self._lines.write_numbers(step, scalars)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Add a line with texts."""
        self._lines.write({"step": step, **texts})

    def write_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """Add a line with a table."""
        self._lines.write_table(step, name, columns, rows)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Add a line with the settings."""
        self._lines.write({"hparams": hparams})


class CsvWriter(SilentWriter):
    """Writes `metrics.csv` and `hparams.yaml`, the files of Lightning's CSVLogger.

    Args:
        directory: It is created at the first write.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     CsvWriter(directory).write_scalars(1, {"loss": 0.5})
        ...     print((Path(directory) / "metrics.csv").read_text().split())
        ['loss,step', '0.5,1']
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._table = CsvTable(directory)
        self.resume = self._table.resume

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Add a row."""
        self._table.write_numbers(step, scalars)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings."""
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / "hparams.yaml").write_text(yaml.safe_dump(dict(hparams)), encoding="utf-8")


class TensorBoardWriter(SilentWriter):
    """Writes event files of TensorBoard, without TensorFlow or torch.

    Args:
        directory: It is created at the first write.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     writer = TensorBoardWriter(directory)
        ...     writer.write_scalars(1, {"loss": 0.5})
        ...     writer.close()
        ...     len(list(Path(directory).glob("events.out.tfevents.*")))
        1
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._file: Any = None
        self._first_step = 0  # readers ignore earlier events from this step on
        self._configured = self._failed = False

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write scalars as float32."""
        self._write(step, ({"tag": name, "simple_value": number(v)} for name, v in scalars.items()))

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Write images as PNG; several of one name as `name/0`, `name/1`, ..."""
        tagged: dict[str, NDArray[np.uint8]] = {}
        for name, batch in images.items():
            pictures = as_pictures(batch)
            several = len(pictures) > 1
            tagged |= {f"{name}/{k}" if several else name: picture for k, picture in enumerate(pictures)}
        self._write(step, ({"tag": tag, "image": _png(picture)} for tag, picture in tagged.items()))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts with the tags of torch's SummaryWriter, `name/text_summary`."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        for name, text in texts.items():
            self._add(step, summary=text_pb(f"{name}/text_summary", text))

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Write histograms; the default is 30 buckets."""
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        for name, array in arrays.items():
            self._add(step, summary=histogram_pb(name, np.asarray(array), (num_buckets or {}).get(name)))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings for the HParams dashboard."""
        for summary in hparams_summaries(hparams):
            self._add(0, summary=summary)
        self._configured = True

    def fail(self) -> None:
        """Mark the run as failed."""
        self._failed = True

    def resume(self, step: int) -> None:
        """Make readers ignore what was written after a step; call it before any other method."""
        self._first_step, self._configured = step + 1, True

    def flush(self) -> None:
        """Write the queued events."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Write the status of the run and close the file."""
        if self._file is not None:
            try:
                if self._configured:
                    self._add(0, summary=end_summary(self._failed))
                self._file.flush()  # raises errors that `close` would not
            finally:
                self._file.close()
                self._file = None

    def _write(self, step: int, values: Iterable[Mapping[str, Any]]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, summary=Summary(value=[Summary.Value(**value) for value in values]))

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if self._file is None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._file = EventFileWriter(str(self._directory), QUEUED_EVENTS, FLUSH_SECONDS)
            self._add(self._first_step, session_log=SessionLog(status=SessionLog.START))
        self._file.add_event(Event(wall_time=time.time(), step=int(step), **content))


class WandbWriter(SilentWriter):
    """Writes to Weights & Biases, as Lightning's WandbLogger does. The run starts at the first write.

    Args:
        run_dir: Local files are written to `<run_dir>/wandb`.
        settings: `entity`, `project`, `group`, `name`, `tags` and `mode` ("online", "offline", "disabled").

    Example:
        >>> writer = WandbWriter(Path("run"), {"project": "sequel", "mode": "disabled"})
        >>> writer.close()  # without a write, no run was started
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self._run_dir, self._settings = run_dir, settings
        self._run: Any = None
        self._exit_code = 0

    @property
    def run(self) -> Any:
        """The run; it is started at the first access."""
        if self._run is None:
            import wandb

            self._run = wandb.init(**wandb_arguments(self._settings, self._run_dir))
            self._run.define_metric("trainer/global_step")
            self._run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._run

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write scalars."""
        self._write(step, {name: number(value) for name, value in scalars.items()})

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Write images."""
        import wandb

        self._write(step, {k: [wandb.Image(one) for one in as_pictures(v)] for k, v in images.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write each text as a table with one cell."""
        for name, text in texts.items():
            self.write_table(step, name, ["text"], [[text]])

    def write_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """Write a table."""
        import wandb

        self._write(step, {name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Write histograms; the default is 30 buckets."""
        import wandb

        buckets = num_buckets or {}
        counts = {name: np.histogram(array, buckets.get(name) or 30) for name, array in arrays.items()}
        self._write(step, {name: wandb.Histogram(np_histogram=value) for name, value in counts.items()})

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings."""
        self.run.config.update(dict(hparams), allow_val_change=True)

    def fail(self) -> None:
        """Mark the run as failed."""
        self._exit_code = 1

    def close(self) -> None:
        """Finish the run if one was started."""
        if self._run is not None:
            self._run.finish(exit_code=self._exit_code)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.log({**values, "trainer/global_step": step})


class CometWriter(SilentWriter):
    """Writes to Comet. The experiment starts at the first write.

    Args:
        run_dir: The archive of an offline experiment is written to `<run_dir>/comet`.
        settings: `workspace`, `project`, `name`, `tags` and `mode` ("online", "offline").

    Example:
        >>> writer = CometWriter(Path("run"), {"project": "sequel", "mode": "offline"})
        >>> writer.close()  # without a write, no experiment was started
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self._run_dir, self._settings = run_dir, settings
        self._experiment: Any = None

    @property
    def experiment(self) -> Any:
        """The experiment; it is started at the first access."""
        if self._experiment is None:
            self._experiment = comet_experiment(self._settings, self._run_dir)
        return self._experiment

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write scalars."""
        self.experiment.log_metrics({name: number(v) for name, v in scalars.items()}, step=step)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Write images."""
        for name, batch in images.items():
            for picture in as_pictures(batch):
                self.experiment.log_image(Image.fromarray(picture), name, step=step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts."""
        for name, text in texts.items():
            self.experiment.log_text(text, step=step, metadata={"name": name})

    def write_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """Write a table."""
        data = [list(row) for row in rows]
        self.experiment.log_table(f"{name}.csv", tabular_data=data, headers=list(columns))

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Write histograms; Comet chooses the buckets."""
        for name, array in arrays.items():
            self.experiment.log_histogram_3d(np.asarray(array), name, step=step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings."""
        self.experiment.log_parameters(dict(hparams))

    def close(self) -> None:
        """End the experiment if one was started."""
        if self._experiment is not None:
            self._experiment.end()


WRITERS: dict[str, Callable[[Path, Mapping[str, Any]], MetricWriter]] = {
    "comet": CometWriter,
    "console": lambda run_dir, settings: ConsoleWriter(),
    "csv": lambda run_dir, settings: CsvWriter(run_dir / "csv"),
    "jsonl": lambda run_dir, settings: JsonLinesWriter(run_dir / "jsonl"),
    "tensorboard": lambda run_dir, settings: TensorBoardWriter(run_dir / "tensorboard"),
    "wandb": WandbWriter,
}
"""Factories of the built-in loggers by name; each takes a run directory and the logger's settings."""


def as_pictures(images: ArrayLike) -> list[NDArray[np.uint8]]:
    """Return images in the format of PIL.

    Args:
        images: Arrays `[N, H, W, C]` or `[H, W, C]`, uint8 or floats in [0, 1].

    Returns:
        A uint8 array per image, `[H, W]` for one channel and `[H, W, C]` otherwise.

    Example:
        >>> as_pictures(np.ones((1, 2, 2, 1)))[0].tolist()
        [[255, 255], [255, 255]]
    """
    batch = np.asarray(images)
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.dtype != np.uint8:
        batch = (255 * batch.clip(0, 1)).round().astype(np.uint8)
    return [picture[..., 0] if picture.shape[-1] == 1 else picture for picture in batch]


def _png(picture: NDArray[np.uint8]) -> dict[str, Any]:
    """Return the fields of TensorBoard's `Summary.Image` for an image."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    height, width, *channels = picture.shape
    colours = channels[0] if channels else 1
    return {
        "height": height,
        "width": width,
        "colorspace": colours,
        "encoded_image_string": file.getvalue(),
    }

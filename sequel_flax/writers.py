"""Where a Flax run sends its numbers: objects with the methods of clu's MetricWriter."""

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

from sequel_core.runs.loggers import (
    FLUSH_SECONDS,
    ConsoleTable,
    CsvTable,
    JsonLines,
    end_summary,
    hparams_summaries,
    leave_event_errors_to_the_caller,
    markdown_table,
    number,
)
from sequel_core.runs.services import comet_experiment, wandb_arguments

QUEUED_EVENTS = 100


class MetricWriter(Protocol):
    """The methods of `clu.metric_writers.MetricWriter` that a learner calls; any writer of clu's has them."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers by name."""
        ...

    def write_images(self, step: int, images: Mapping[str, NDArray[np.uint8]]) -> None:
        """Write pictures by name, `[N, H, W, C]`."""
        ...

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts by name, Markdown."""
        ...

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings of the run, which may be nested."""
        ...

    def flush(self) -> None:
        """Write what is still buffered."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class SilentWriter:
    """All methods of `clu.metric_writers.MetricWriter`, doing nothing: what a writer has no place for.

    The parent of ours, which so can be passed wherever a writer of clu's is expected.
    """

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers by name."""

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Write pictures by name, `[N, H, W, C]` or `[H, W, C]`, uint8 or floats from 0 to 1."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts by name, Markdown."""

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Write how the elements of arrays are distributed, by name."""

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Write sounds by name, `[N, T, C]`."""

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Write videos by name, `[N, T, H, W, C]`."""

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Write tensors by name, for a plug-in of TensorBoard."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings of the run, which may be nested."""

    def flush(self) -> None:
        """Write what is still buffered."""

    def close(self) -> None:
        """Flush and close."""


def write_table(
    writer: MetricWriter, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Write a table with a writer that has `write_table`, as ours for services have; else as Markdown."""
    own = getattr(writer, "write_table", None)
    if own is not None:
        own(step, name, columns, rows)
    else:
        writer.write_texts(step, {name: markdown_table(columns, rows)})


def resume_writer(writer: MetricWriter, step: int) -> None:
    """Let a writer that has `resume` go on after a step, and forget what it wrote after it."""
    own = getattr(writer, "resume", None)
    if own is not None:
        own(step)


def close_writer(writer: MetricWriter, failed: bool) -> None:
    """Flush and close a writer; one that has `fail` is told before that the run failed."""
    if failed and hasattr(writer, "fail"):
        writer.fail()
    try:
        writer.flush()
    finally:
        writer.close()


class ConsoleWriter(SilentWriter):
    """Prints the newest value of every number after each evaluation."""

    def __init__(self) -> None:
        self._table = ConsoleTable()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Take numbers in, and print after an evaluation."""
        self._table.write(step, scalars)


class JsonLinesWriter(SilentWriter):
    """Writes `metrics.jsonl`: numbers, texts, tables and the settings, one JSON object a line.

    Args:
        directory: made at the first write.
    """

    def __init__(self, directory: str | Path) -> None:
        self._lines = JsonLines(directory)
        self.resume = self._lines.resume

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Add a line of numbers."""
        self._lines.write_numbers(step, scalars)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Add a line of texts."""
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
        directory: made at the first write.
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
    """Writes TensorBoard's event files with TensorBoard's own writer: needs neither TensorFlow nor torch.

    Args:
        directory: made at the first write.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._file: Any = None
        self._first_step = 0  # from which on readers forget what the directory holds of an earlier run
        self._configured = self._failed = False

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers, as float32."""
        self._write(step, ({"tag": name, "simple_value": number(v)} for name, v in scalars.items()))

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Write pictures as PNG; several of one name as `name/0`, `name/1`, ..."""
        named: dict[str, NDArray[np.uint8]] = {}
        for name, batch in images.items():
            pictures = as_pictures(batch)
            many = len(pictures) > 1
            named |= {f"{name}/{k}" if many else name: picture for k, picture in enumerate(pictures)}
        self._write(step, ({"tag": name, "image": _png(picture)} for name, picture in named.items()))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts, under the names that torch's SummaryWriter gives them: `name/text_summary`."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        for name, text in texts.items():
            self._add(step, summary=text_pb(f"{name}/text_summary", text))

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Write histograms, of 30 buckets unless told otherwise."""
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        for name, array in arrays.items():
            self._add(step, summary=histogram_pb(name, np.asarray(array), (num_buckets or {}).get(name)))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings for the HParams dashboard."""
        for summary in hparams_summaries(hparams):
            self._add(0, summary=summary)
        self._configured = True

    def fail(self) -> None:
        """Note that the run failed."""
        self._failed = True

    def resume(self, step: int) -> None:
        """Let readers forget what was written after a step; comes before everything else."""
        self._first_step, self._configured = step + 1, True

    def flush(self) -> None:
        """Write what is still in the queue."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Write how the run ended, and close the file."""
        if self._file is not None:
            try:
                if self._configured:
                    self._add(0, summary=end_summary(self._failed))
                self._file.flush()  # raises what `close` would keep to itself
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

            leave_event_errors_to_the_caller()
            self._file = EventFileWriter(str(self._directory), QUEUED_EVENTS, FLUSH_SECONDS)
            self._add(self._first_step, session_log=SessionLog(status=SessionLog.START))
        self._file.add_event(Event(wall_time=time.time(), step=int(step), **content))


class WandbWriter(SilentWriter):
    """Writes to Weights & Biases as Lightning's WandbLogger does; the run starts at the first write.

    Args:
        run_dir: its local files go to `<run_dir>/wandb`.
        settings: entity, project, group, name, tags, mode ("online", "offline", "disabled").
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self._run_dir, self._settings = run_dir, settings
        self._run: Any = None
        self._exit_code = 0

    @property
    def run(self) -> Any:
        """The run, started when first asked for."""
        if self._run is None:
            import wandb

            self._run = wandb.init(**wandb_arguments(self._settings, self._run_dir))
            self._run.define_metric("trainer/global_step")
            self._run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._run

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers."""
        self._write(step, {name: number(value) for name, value in scalars.items()})

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Write pictures."""
        import wandb

        self._write(step, {k: [wandb.Image(one) for one in as_pictures(v)] for k, v in images.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write each text as a table of one cell."""
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
        """Write histograms, of 30 buckets unless told otherwise."""
        import wandb

        buckets = num_buckets or {}
        found = {name: np.histogram(array, buckets.get(name) or 30) for name, array in arrays.items()}
        self._write(step, {name: wandb.Histogram(np_histogram=counts) for name, counts in found.items()})

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings."""
        self.run.config.update(dict(hparams), allow_val_change=True)

    def fail(self) -> None:
        """Note that the run failed."""
        self._exit_code = 1

    def close(self) -> None:
        """Finish the run, if one was started."""
        if self._run is not None:
            self._run.finish(exit_code=self._exit_code)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.log({**values, "trainer/global_step": step})


class CometWriter(SilentWriter):
    """Writes to Comet; the experiment starts at the first write.

    Args:
        run_dir: an offline experiment's archive goes to `<run_dir>/comet`.
        settings: workspace, project, name, tags, mode ("online", "offline").
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self._run_dir, self._settings = run_dir, settings
        self._experiment: Any = None

    @property
    def experiment(self) -> Any:
        """The experiment, started when first asked for."""
        if self._experiment is None:
            self._experiment = comet_experiment(self._settings, self._run_dir)
        return self._experiment

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers."""
        self.experiment.log_metrics({name: number(v) for name, v in scalars.items()}, step=step)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Write pictures."""
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
        """End the experiment, if one was started."""
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
"""What makes the logger of each name, of a run's directory and its settings."""


def as_pictures(images: ArrayLike) -> list[NDArray[np.uint8]]:
    """Return pictures `[N, H, W, C]` or `[H, W, C]` as PIL takes them: uint8, and `[H, W]` if grey."""
    batch = np.asarray(images)
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.dtype != np.uint8:
        batch = (255 * batch.clip(0, 1)).round().astype(np.uint8)
    return [picture[..., 0] if picture.shape[-1] == 1 else picture for picture in batch]


def _png(picture: NDArray[np.uint8]) -> dict[str, Any]:
    """Return a picture in the fields of TensorBoard's `Summary.Image`."""
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

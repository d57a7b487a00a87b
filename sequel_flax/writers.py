"""Where a Flax run sends its numbers: objects with the methods of clu's MetricWriter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class MetricWriter(Protocol):
    """The methods of `clu.metric_writers.MetricWriter` that a learner calls."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers at a step."""
        ...

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings of the run."""
        ...

    def flush(self) -> None:
        """Write what is still buffered."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class WandbWriter:
    """Writes to Weights & Biases; the run starts at the first write.

    Args:
        directory: where its local files go.
        settings: of `wandb.init`: entity, project, group, name, tags, mode ("online", "offline", "disabled").
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self._arguments = {"dir": str(directory), **settings}
        self._run: Any = None

    @property
    def run(self) -> Any:
        """The run, started when first asked for."""
        if self._run is None:
            import wandb

            self._run = wandb.init(**self._arguments)
        return self._run

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers at a step; a step may be written to again, not an earlier one."""
        self.run.log(dict(scalars), step=step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings of the run."""
        self.run.config.update(dict(hparams))

    def flush(self) -> None:
        """Do nothing: the library sends in the background."""

    def close(self) -> None:
        """Finish the run, if one was started."""
        if self._run is not None:
            self._run.finish()

"""The sweeper of `sequel run -m`: it launches the jobs that the command gives it."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

CONF = {"_target_": "hydra_plugins.sequel_jobs.JobsSweeper", "max_batch_size": None}
ConfigStore.instance().store(group="hydra/sweeper", name="jobs", node=CONF, provider="sequel")


class JobsSweeper(Sweeper):
    """Launches the jobs in the attribute `jobs` of the task function, a list of overrides for each.

    Args:
        max_batch_size: The maximum number of jobs that are launched at a time, >= 1; None for all.

    Raises:
        ValueError: `max_batch_size` is not such a number.
    """

    def __init__(self, max_batch_size: int | None = None) -> None:
        super().__init__()
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(
                f"hydra.sweeper.max_batch_size must be >= 1, got {max_batch_size}; leave it out to launch "
                "all runs"
            )
        self._size = max_batch_size

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take the jobs from the task function, and make the launcher."""
        self._jobs: list[list[str]] = vars(task_function).pop("jobs")  # launchers pickle the function
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Sequence[Sequence[JobReturn]]:
        """Launch the jobs; return their results.

        Args:
            arguments: The overrides of the sweep, from which the jobs were made.
        """
        size = self._size or len(self._jobs)
        starts = range(0, len(self._jobs), size)
        return [self._launcher.launch(self._jobs[k : k + size], initial_job_idx=k) for k in starts]

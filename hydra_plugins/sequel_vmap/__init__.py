"""The launcher `hydra/launcher=vmap` of `sequel run -m mode=jax`: the runs of a sweep in one program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

CONF = {"_target_": "hydra_plugins.sequel_vmap.VmapLauncher", "width": None}
ConfigStore.instance().store(group="hydra/launcher", name="vmap", node=CONF, provider="sequel")


class VmapLauncher(Launcher):
    """Starts all jobs at once, by the attribute `together` of the task function.

    Args:
        width: The maximum number of runs in a program; None for as many as fit into half of the memory.
    """

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self._width = width

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the arguments for `launch`."""
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs, and return their results in the same order.

        Args:
            job_overrides: The overrides of each job.
            initial_job_idx: The number of the first job.

        Raises:
            ValueError: The task function has no attribute `together`, or it raises this error.
        """
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        together: Any = getattr(self._task, "together", None)
        if together is None:
            raise ValueError("hydra/launcher=vmap is for `sequel run -m mode=jax`; use another launcher")
        configs = []
        for k, overrides in enumerate(job_overrides, initial_job_idx):
            config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = k, k
            configs.append(config)
        jobs = [
            (list(c.hydra.overrides.task), Path(c.hydra.sweep.dir, c.hydra.sweep.subdir)) for c in configs
        ]
        returns = []
        for config, value in zip(configs, together(jobs, self._width), strict=True):
            job = JobReturn(
                overrides=list(config.hydra.overrides.task), cfg=config, status=JobStatus.COMPLETED
            )
            job.return_value = value
            returns.append(job)
        return returns

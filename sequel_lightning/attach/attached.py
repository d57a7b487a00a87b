"""The tasks of a callback: one fit is one task, which is consolidated when the fit ends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from sequel_core.runs.learner import check_same_settings
from sequel_lightning.attach.loaders import task_loader
from sequel_lightning.attach.steps import metric_copies, without_logging
from sequel_lightning.distributed import Ranks
from sequel_lightning.lifecycle import check_unspent, finished_task, set_generators
from sequel_lightning.module import ContinualModule
from sequel_lightning.networks import evaluating


class Attached(Callback):
    """A method as a callback; all classes of `sequel_lightning.attach` are subclasses.

    The state is in the checkpoints of the Trainer, with that of torch's random generators, so a fit that is
    resumed by `ckpt_path` continues within its task.

    With strategy `ddp`, every process has the same state. Call `consolidate` in every process, too.

    Attributes:
        tasks: number of tasks that were consolidated.
        ranks: the processes of the latest Trainer.

    Raises:
        ValueError: in `fit`, if the module optimizes manually or is a ContinualModule; if the Trainer has
            a strategy that is not supported or no epochs left; if the previous fit ended with an error, so
            that its task was never consolidated; if `ckpt_path` is a checkpoint of a finished task; or if
            processes have different settings.

    Example:
        >>> from sequel_lightning import attach
        >>> keep = attach.SI(strength=0.1)
        >>> isinstance(keep, attach.Attached), keep.tasks
        (True, 0)
    """

    def __init__(self) -> None:
        self.tasks = 0
        self.ranks = Ranks()
        self._open = False  # whether a task has begun and is not consolidated
        self._resumes = False
        self._generators: list[list[Tensor]] = []  # states of each process in the resumed checkpoint

    # -- hooks of Lightning

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module and the Trainer."""
        if stage != "fit":
            return
        name = type(self).__name__
        if isinstance(pl_module, ContinualModule):
            raise ValueError(
                f"attach.{name} needs a module of your own, got a {type(pl_module).__name__}, which is a "
                "method itself; leave the callback out"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"attach.{name} needs automatic optimization, got automatic_optimization=False in "
                f"{type(pl_module).__name__}: only automatic optimization says when a step is taken"
            )
        self.ranks.follow(trainer)
        check_unspent(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a task, or continue with the task of a checkpoint."""
        resumes, self._resumes = self._resumes, False
        if resumes and not self._open and trainer.ckpt_path is not None:
            raise finished_task(
                self.tasks - 1,
                'call load_state_dict of the module and the callback with its "state_dict" and "callbacks"',
            )
        if self._open and not resumes:
            raise ValueError(
                f"task {self.tasks} was never consolidated, because its fit ended with an error; call "
                f"consolidate(module, loader) of the callback {type(self).__name__}, or resume with ckpt_path"
            )
        check_same_settings(self.ranks.gather_objects, {f"attach.{type(self).__name__}": self._settings()})
        if resumes:
            same = len(self._generators) == self.ranks.size
            set_generators(self._generators[self.ranks.rank if same else 0])
        self.prepare(pl_module)
        if not self._open:
            self._open = True
            self.start_task(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Consolidate the task, at the weights that the module has now."""
        if trainer.train_dataloader is not None and not trainer.interrupted:
            self.consolidate(pl_module, task_loader(trainer.train_dataloader))

    # -- the task

    def prepare(self, module: pl.LightningModule) -> None:
        """Prepare for a module with the parameters that it has now."""

    def start_task(self, module: pl.LightningModule) -> None:
        """Begin a task with the weights that a module has now."""

    def consolidate(self, module: pl.LightningModule, batches: Iterable[Any]) -> None:
        """Do the work at the end of a task; `fit` calls it, unless it ends with an error.

        Args:
            module: at the weights at which the task is consolidated.
            batches: of the task's training samples, as `fit` takes them.

        Raises:
            ValueError: no task has begun, or there are no batches.
        """
        if not self._open:
            raise ValueError("no task has begun, or it is consolidated already; call fit first")
        self.ranks.copy_from_first(module)  # running statistics are of the rows of a process
        self.prepare(module)
        with isolate_rng(), evaluating(module), without_logging(module, metric_copies(module)):
            self.end_task(module, batches)
        self.tasks += 1
        self._open = False

    def end_task(self, module: pl.LightningModule, batches: Iterable[Any]) -> None:
        """Update what the method keeps of past tasks."""
        raise TypeError(f"{type(self).__name__} has to override end_task(module, batches)")

    # -- checkpoints

    def memory(self) -> dict[str, Any]:
        """Return what the method keeps of past tasks, for a checkpoint."""
        raise TypeError(f"{type(self).__name__} has to override memory()")

    def load_memory(self, memory: dict[str, Any]) -> None:
        """Continue with what `memory` returned."""
        for name in self.memory():
            setattr(self, name, memory[name])

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the coming steps depend on."""
        generators = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        return {"tasks": self.tasks, "open": self._open, "generators": [generators], **self.memory()}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the random generators of the other processes to the state of the callback."""
        state = checkpoint["callbacks"][self.state_key]
        state["generators"] = self.ranks.gather_objects(state["generators"][0])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self.tasks, self._open = state_dict["tasks"], state_dict["open"]
        self._generators = state_dict["generators"]
        self.load_memory(state_dict)
        self._resumes = True

    def _settings(self) -> dict[str, Any]:
        """Return the arguments that are numbers or texts; `hparams` is a dataclass of such."""
        arguments = {**vars(self), **vars(getattr(self, "hparams", self))}
        plain = (bool, int, float, str)
        return {k: v for k, v in arguments.items() if not k.startswith("_") and isinstance(v, plain)}

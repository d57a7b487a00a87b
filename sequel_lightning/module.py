"""ContinualModule: a continual-learning algorithm as a LightningModule. One `Trainer.fit` is one task.

The hooks of Lightning are here, and each calls one of three objects of the module:

- `module.lifecycle`: starts, ends and consolidates tasks, see `sequel_lightning.lifecycle`;
- `module.reporting`: computes and logs scores, see `sequel_lightning.reporting`;
- `module.preprocessing`: normalises inputs and masks logits, see `sequel_lightning.preprocessing`.

The hooks that methods override are in `sequel_lightning.algorithm`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from multiprocessing.context import get_spawning_popen
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from sequel_core.stream.task import Batch, Task
from sequel_lightning._compat import LoadHook
from sequel_lightning.algorithm import Algorithm
from sequel_lightning.batches import inputs_of
from sequel_lightning.consolidation import CONSOLIDATED, IDLE, TRAINING
from sequel_lightning.distributed import spawned_processes
from sequel_lightning.lifecycle import check_open_task, check_trainer
from sequel_lightning.objectives import map_outputs
from sequel_lightning.optimizers import OptimizerFactory, configured_optimizer
from sequel_lightning.scores import with_loaders_task
from sequel_lightning.trees import Params, adopt_names

__all__ = ["CONSOLIDATED", "IDLE", "TRAINING", "ContinualModule", "OptimizerFactory", "Params"]


class ContinualModule(Algorithm, LoadHook):
    """A network that learns tasks one after another. Methods are subclasses.

    Each `Trainer.fit` trains on one task, and consolidates it when it ends. See `help(EWC)` for the loop over
    tasks, and `Algorithm` for the hooks that a method overrides. The constructor's docstring lists its
    arguments.

    Raises:
        ValueError: in `fit`, if the Trainer has nothing left to run, or a strategy that is not supported; if
            a task before it was never consolidated; if both `lr_decay` and a scheduler set the learning rate;
            if a batch is neither `(x, y)` nor `(x, y, t)` nor a dict, or a label does not belong to its task.

    Example:
        A method that adds the norm of the weights to the loss:

        >>> import torch
        >>> from sequel_core import NaiveHParams
        >>> from sequel_lightning import MLP, ContinualModule
        >>> class Ridge(ContinualModule):
        ...     hparams_class = NaiveHParams
        ...
        ...     def loss(self, outputs, batch):
        ...         norm = sum(p.square().sum() for p in self.params().values())
        ...         return super().loss(outputs, batch) + 0.01 * norm
        >>> module = Ridge(MLP(), torch.optim.SGD)
        >>> module.algorithm_hparams
        NaiveHParams(lr_decay=1.0, min_lr=0.0, reset_optimizer=True, consolidate='last', task_given=False)
    """

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied or pickled.

        Raises:
            ValueError: a Trainer starts processes with `ddp_spawn`, which would need a pickle of the module.
        """
        if get_spawning_popen() is not None:
            raise spawned_processes()
        return super().__getstate__()

    def memory_bytes(self) -> int:
        """Return the bytes of what the algorithm keeps of past tasks: anchors, samples, outputs, ..."""
        others = ("net.", "metrics.", "preprocessing.", *(f"{name}." for name in self.trained()))
        tensors = chain(self.named_parameters(), self.named_buffers())
        return sum(
            a.nbytes
            for name, a in tensors
            if not name.startswith(others) and name not in ("task_index", "phase")
        )

    def consolidate_task(self, batches: Iterable[Any] | pl.LightningDataModule) -> None:
        """Do the end-of-task work of a task whose fit did not, at the weights that the module has now.

        That is a task whose fit ended with an error, or the task of a checkpoint that was loaded. The next
        fit then begins the next task:

            module = EWC.load_from_checkpoint(keep.best_model_path, ...)
            module.consolidate_task(loader)

        Args:
            batches: of the task's training samples, each sample once, as `fit` takes them: a loader or any
                iterable that ends, of `(x, y)`, `(x, y, t)` or dicts; or a data module such as
                TaskDataModule.

        Raises:
            ValueError: no task is open, the data module is of another task, or the method sums up importances
                along the steps of the training (SI).
        """
        check_open_task(self)
        task = getattr(batches, "task", None)
        if isinstance(task, Task) and task.index != self.task_index:
            raise ValueError(
                f"consolidate_task ends task {int(self.task_index)}, got data of task {task.index}; give "
                "samples of the task that was trained last"
            )
        loader: Any = batches.train_dataloader() if isinstance(batches, pl.LightningDataModule) else batches
        if hasattr(loader, "consolidation_batches"):
            loader = loader.consolidation_batches()
        self.lifecycle.end_task(loader, loader)

    # -- Lightning: training

    def configure_callbacks(self) -> list[Any]:
        """Check the Trainer and its callbacks; add no callback."""
        check_trainer(self, self.trainer)
        return []

    def setup(self, stage: str) -> None:
        """Prepare for a Trainer."""
        self.lifecycle.setup(stage)

    def configure_optimizers(self) -> Any:
        """Return what the factory makes, with the task's learning rate and the carried state.

        Raises:
            ValueError: the fit would leave the task before it unconsolidated, or cannot use the optimizer.
        """
        self.lifecycle.check_unfinished()
        self.lifecycle.start_network(self.lifecycle.current_index())
        return configured_optimizer(self)

    def on_fit_start(self) -> None:
        """Check that the Trainer has something to train."""
        self.lifecycle.start_fit()

    def on_train_start(self) -> None:
        """Start the next task, unless this fit resumes one."""
        self.reporting.start_fit()
        self.lifecycle.start_task()

    def on_train_epoch_start(self) -> None:
        """Follow the trained parameters: a callback may unfreeze some, as `BaseFinetuning` does here."""
        self.lifecycle.follow_trained()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch; the means of several steps are logged at the Trainer's log interval."""
        if self.ranks.size > 1:
            with self.ranks.divided():
                return self._training_step(batch, batch_idx)
        return self._training_step(batch, batch_idx)

    def _training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch, reporting = self.as_batch(batch), self.reporting
        batch = self.ranks.whole(batch, self.trainer.train_dataloader, batch_idx)
        if reporting.unchecked:
            reporting.check_first_batch(batch)
        loss, outputs = self.training_loss(batch)
        if self.objective.weight is not None:
            self.accumulation.weight = self.loss_weight(batch)
        reporting.add_step(loss.detach(), map_outputs(Tensor.detach, outputs), batch, batch_idx)
        return loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        """Start to accumulate gradients for a step."""
        self.accumulation.total = None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradient of a batch, with the weight that its loss has in the mean over all batches."""
        super().backward(self.accumulation.weighted(self, loss), *args, **kwargs)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Pass the step to the observer."""
        self.reporting.after_step(batch_idx)

    def on_train_end(self) -> None:
        """Consolidate the task."""
        self.lifecycle.end_training()

    def on_fit_end(self) -> None:
        """Consolidate a task that was resumed from a checkpoint made after its last step."""
        if self.lifecycle.resumes:
            self.lifecycle.end_training()
        self.lifecycle.end_fit()

    def teardown(self, stage: str) -> None:
        """After the evaluation of a checkpoint, restore the module's state if the weights are the same."""
        self.lifecycle.restore_saved(before_fit=False)

    # -- Lightning: evaluation

    def on_validation_epoch_start(self) -> None:
        """Start the scores of the validation or test samples."""
        self.reporting.start_scores("test" if self.trainer.testing else "val")

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int | None = None) -> None:
        """Add a batch to the scores of its tasks.

        A batch without task indices belongs to the current task. If there are several loaders, it belongs to
        the task with the index of its loader.
        """
        if dataloader_idx is not None:
            batch = with_loaders_task(batch, dataloader_idx, self.spec, self.objective.target)
        loaders: Any = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        loader = loaders if dataloader_idx is None else loaders[dataloader_idx]
        batch = self.ranks.whole(self.as_batch(batch), loader, batch_idx)
        if batch_idx == 0:
            self.ranks.check_same(batch)
        with self.ranks.divided():
            self.reporting.add_scores(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int | None = None) -> None:
        """Add a batch to the scores of its tasks, as `validation_step` does."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the score, such as `<stage>/accuracy` and `<stage>/accuracy/task_<j>`, loss and metrics."""
        self.reporting.log_scores()

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return what `predict` returns for a batch `x`, `(x,)`, `(x, y)`, `(x, y, t)`, a dict or a Batch."""
        if isinstance(batch, Tensor):
            return self.predict(batch)
        if isinstance(batch, Mapping):
            return self.predict(inputs_of(batch, self.objective.target), batch.get("t"))
        if isinstance(batch, Batch) or len(batch) > 2:
            batch = self.as_batch(batch)
            return self.predict(batch.x, batch.t)
        return self.predict(batch[0])

    # -- Lightning: checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is not a buffer: the step count, unreported steps, the carried optimizer state."""
        checkpoint["sequel"] = {"lr": self.lr, **self.running_metrics.state(), **self.lifecycle.state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` added."""
        if "waiting" not in checkpoint.get("sequel", {}):
            raise ValueError("the checkpoint was not written by a ContinualModule of this version of sequel")
        self.lifecycle.load(checkpoint)

    def get_extra_state(self) -> Tensor:
        """Return the planner's state, for `state_dict`."""
        return torch.from_numpy(self.planner.state)

    def set_extra_state(self, state: Tensor) -> None:
        """Set the planner's state, from `load_state_dict`."""
        self.planner.state = state.cpu().numpy()

    def before_load(self, state_dict: Any, prefix: str) -> None:
        """Let each `ParameterTree` hold the parameters that it holds in the checkpoint."""
        adopt_names(self, state_dict, prefix)

"""Private names of other packages; nothing else in `sequel_lightning` uses any.

Each function says what it uses, the version in which that was seen, and why no public name does the same.
`tests/lightning/test_compat.py` tests each. The packages have upper bounds in `pyproject.toml`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

# -- pytorch-lightning 2.6.6


def attached_trainer(module: pl.LightningModule) -> Any:
    """Return the Trainer of a module or None: `_trainer`. The property `trainer` raises without a Trainer."""
    return module._trainer


def set_logging_step(trainer: pl.Trainer, step: int) -> None:
    """Set the x-axis of the Trainer's loggers: `_batches_that_stepped`, which starts every fit at 0."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def logging_step(trainer: pl.Trainer) -> int:
    """Return the x-axis of the Trainer's loggers: `_batches_that_stepped`."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


class StepLogs:
    """The part of a Trainer that keeps what `log` was given, for steps that its loop does not take itself.

    `_results` of the loop is empty unless something was logged. `_logger_connector` passes it on.
    `_current_fx_name` is the hook that calls `log`. `_first_loop_iter` is whether the step is the first of an
    epoch. `_batches_that_stepped` is the x-axis of loggers.
    """

    def __init__(self, trainer: Any) -> None:
        self._loop, self._connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
        self._module, self._results = trainer.lightning_module, trainer.fit_loop.epoch_loop._results

    @contextmanager
    def training_steps(self) -> Iterator[None]:
        """Let `log` work within the context, at steps that are not the first of an epoch."""
        self._connector._first_loop_iter = False
        self._module._current_fx_name = "training_step"
        try:
            yield
        finally:
            self._module._current_fx_name = None

    def start(self, batch: Any) -> None:
        """Start a step."""
        self._results.batch = batch

    def end_batch(self) -> None:
        """Called after the hooks of a step."""
        if self._results:
            self._connector.on_batch_end()

    def end(self) -> None:
        """Called when a step is counted."""
        if self._results:
            self._connector.update_train_step_metrics()

    def count(self) -> None:
        """Move the x-axis of the loggers to the next step."""
        self._loop._batches_that_stepped += 1


def loaders_batches(fetcher: Any) -> Iterator[Any]:
    """Yield the next batches of the only loader: `_iterator`, which `next(fetcher)` wraps five times."""
    (batches,) = fetcher.combined_loader._iterator.iterators
    for batch in batches:
        fetcher.fetched += 1
        yield batch


def before_batch_transfer(module: pl.LightningModule, batch: Any) -> Any:
    """Return a batch after the user's hook: `_on_before_batch_transfer`, which chooses the hook's owner."""
    return module._on_before_batch_transfer(batch)


def keep_signal_handlers(trainer: pl.Trainer) -> None:
    """Let a Trainer leave the process's signal handlers as they are: `_signal_connector`."""
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None


def without_launcher(trainer: pl.Trainer) -> None:
    """Let a Trainer start no processes, since they run already: `_launcher` of its strategy."""
    trainer.strategy._launcher = None


def dump_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """Return a checkpoint: `_checkpoint_connector`. `save_checkpoint` waits for all processes, too."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def checkpoint_directory(callback: ModelCheckpoint, trainer: pl.Trainer) -> Any:
    """Return the directory that a callback would choose: `_ModelCheckpoint__resolve_ckpt_dir`."""
    checkpoint: Any = callback
    return checkpoint._ModelCheckpoint__resolve_ckpt_dir(trainer)


def has_experiment(logger: Any) -> bool:
    """Return whether a logger has started: `_experiment`. The property `experiment` would start it."""
    return logger._experiment is not None


def set_experiment(logger: Any, experiment: Any) -> None:
    """Start a logger with an experiment that was made elsewhere: `_experiment`."""
    logger._experiment = experiment


def purge_after(logger: TensorBoardLogger, step: int) -> None:
    """Let a TensorBoard logger that has not started replace what follows a step: `_kwargs`."""
    logger._kwargs["purge_step"] = step + 1


def add_summary(logger: TensorBoardLogger, summary: Any) -> None:
    """Write a summary message: `_get_file_writer` of torch's SummaryWriter, seen in torch 2.13."""
    logger.experiment._get_file_writer().add_summary(summary)


def without_anonymous(logger: WandbLogger) -> WandbLogger:
    """Return a W&B logger that does not pass `anonymous`, which W&B warns about: `_wandb_init`."""
    logger._wandb_init.pop("anonymous")
    return logger


# -- torch 2.13: operators on lists of tensors, which have no public names


def foreach_add_(tensors: Sequence[Tensor], others: Sequence[Tensor], alpha: float = 1) -> None:
    """Add `alpha` times another tensor to each, in place: `_foreach_add_`."""
    torch._foreach_add_(list(tensors), list(others), alpha=alpha)


def foreach_add(tensors: Sequence[Tensor], others: Sequence[Tensor], alpha: float = 1) -> list[Tensor]:
    """Return each tensor plus `alpha` times another: `_foreach_add`."""
    return list(torch._foreach_add(list(tensors), list(others), alpha=alpha))


def foreach_sub(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Return the difference of each pair of tensors: `_foreach_sub`."""
    return list(torch._foreach_sub(list(tensors), list(others)))


def foreach_mul(tensors: Sequence[Tensor], factors: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """Return the product of each pair of tensors, or of each tensor with one factor: `_foreach_mul`."""
    if isinstance(factors, Tensor):
        return list(torch._foreach_mul(list(tensors), factors))
    return list(torch._foreach_mul(list(tensors), list(factors)))


def foreach_mul_(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply each tensor by another, in place: `_foreach_mul_`."""
    torch._foreach_mul_(list(tensors), list(factors))


def foreach_copy_(tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into a tensor: `_foreach_copy_`."""
    torch._foreach_copy_(list(tensors), list(sources))


# -- torch 2.13: optimizers


@contextmanager
def without_records(optimizer: Optimizer) -> Iterator[None]:
    """Let an optimizer leave out its records for torch's profiler, a tenth of the time of a small step.

    Within the context, `step` is the function without the wrapper that records it and calls hooks:
    `__wrapped__`. `zero_grad` clears the same gradients as torch's. Nothing changes if either could be
    noticed: hooks of the optimizer or of all optimizers, which are private dicts, a `step` or `zero_grad` of
    its own, or a profiler that runs, `_is_profiler_enabled`.
    """
    before: Any = (_global_optimizer_pre_hooks, optimizer._optimizer_step_pre_hooks)
    after: Any = (_global_optimizer_post_hooks, optimizer._optimizer_step_post_hooks)
    step: Any = type(optimizer).step
    plain = hasattr(step, "hooked") and type(optimizer).zero_grad is Optimizer.zero_grad
    changed = vars(optimizer).keys() & {"step", "zero_grad"}  # by a scheduler, for example
    if not plain or changed or any(before + after) or torch.autograd.profiler._is_profiler_enabled:
        yield
        return
    instance: Any = optimizer
    instance.step, instance.zero_grad = partial(step.__wrapped__, optimizer), partial(_clear, optimizer)
    try:
        yield
    finally:
        del instance.step, instance.zero_grad


def _clear(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


# -- torch 2.13: modules and tensors


def tensor_version(tensor: Tensor) -> int | None:
    """Return a number that changes when a tensor is written to, None for inference tensors: `_version`."""
    return None if tensor.is_inference() else tensor._version


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dict that holds a module's own buffers, which is faster than an attribute: `_buffers`."""
    return module._buffers


class LoadHook(nn.Module):
    """A module with a hook before `load_state_dict` copies tensors: `_load_from_state_dict`.

    `register_load_state_dict_pre_hook` is not in every supported version of torch.
    """

    def before_load(self, state_dict: Any, prefix: str) -> None:
        """Called before tensors are loaded; `prefix` is that of this module's names in the state_dict."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.before_load(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ConvertHook(nn.Module):
    """A module with a hook that is called when `to`, `cuda`, `double`, ... convert its tensors: `_apply`."""

    def converted(self, tensor: Tensor, convert: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what replaces a tensor; `convert` is the conversion of the module."""
        return convert(tensor)

    def after_convert(self) -> None:
        """Called after tensors were replaced."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result: Any = super()._apply(lambda t: self.converted(t, fn), recurse)  # type: ignore[no-untyped-call]
        self.after_convert()
        return result

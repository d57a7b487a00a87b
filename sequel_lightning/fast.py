"""The fast path: the steps of an epoch in one loop, without what Lightning does around each of them.

Lightning looks for hooks, callbacks and logged values at every step, which takes as long as the step of a
small network. If nothing can observe the difference, `LightningLearner` lets `FastSteps` take the steps
between the first and the last one of an epoch. It calls what Lightning would call, in the same order, and
counts the steps in Lightning's own counters. So weights, reports and checkpoints are the same, and a run may
be resumed with or without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.precision import DoublePrecision, Precision
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from sequel_lightning._compat import StepLogs, loaders_batches, without_records
from sequel_lightning.module import ContinualModule

CALLBACK_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
"""Hooks of callbacks that Lightning calls at every step. The fast path calls none of them."""
LIGHTNINGS = ("pytorch_lightning",)
KNOWN = ("pytorch_lightning", "sequel_lightning")
MODULE_HOOKS = {
    "on_before_batch_transfer": LIGHTNINGS,
    "transfer_batch_to_device": LIGHTNINGS,
    "on_after_batch_transfer": LIGHTNINGS,
    "on_train_batch_start": LIGHTNINGS,
    "training_step": KNOWN,
    "on_before_zero_grad": KNOWN,  # ours, and that of `backward`, are for accumulated gradients
    "optimizer_zero_grad": KNOWN,
    "on_before_backward": LIGHTNINGS,
    "backward": KNOWN,
    "on_after_backward": LIGHTNINGS,
    "on_before_optimizer_step": KNOWN,
    "configure_gradient_clipping": KNOWN,
    "optimizer_step": KNOWN,
    "lr_scheduler_step": KNOWN,
    "on_train_batch_end": KNOWN,
}
"""Hooks of a module at every step, and the packages whose versions of it the fast path replaces or calls.

It calls the hooks that methods override. Lightning's versions of the others do nothing that is needed.
"""

_logger = logging.getLogger(__name__)


class NoProfiler(PassThroughProfiler):
    """Profiles nothing. Lightning calls it 24 times a step, and Lightning's own costs 4 % of the speed."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        """Return a context that does nothing."""
        return self._nothing


class FastSteps:
    """Takes the steps of a learner's Trainers, unless there is a reason not to.

    Attributes:
        reason: why Lightning takes the steps of the current epoch; None if the fast path takes them.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._reported = False

    def attach(self, trainer: pl.Trainer) -> None:
        """Let a Trainer's fit take its steps here."""
        loop: Any = trainer.fit_loop.epoch_loop
        loop.advance = partial(self._advance, trainer, loop, loop.advance)

    def _advance(self, trainer: Any, loop: Any, advance: Callable[[Any], None], fetcher: Any) -> None:
        """Take the next steps. Lightning takes the first one of a fit, and the first and last of an epoch."""
        ready = loop.batch_progress.current.ready
        if ready == 0 or loop.restarting:
            self._choose(slow_reason(trainer, trainer.lightning_module))
        elif self.reason is None and ready < trainer.num_training_batches - 1:
            _Steps(trainer, loop).take(loaders_batches(fetcher))
            return
        advance(fetcher)

    def _choose(self, reason: str | None) -> None:
        if not self._reported or reason != self.reason:
            _logger.info("fast path: %s", "on" if reason is None else f"off, because {reason}")
        self.reason, self._reported = reason, True


class _Steps:
    """The steps up to the last but one of an epoch, each as Lightning's `advance` takes it."""

    def __init__(self, trainer: Any, loop: Any) -> None:
        self._trainer, self._loop = trainer, loop
        self._module: ContinualModule = trainer.lightning_module
        built_in = type(self._module).__module__.startswith("sequel_lightning.")
        self._clears_first = built_in  # another method may read the last gradient in its loss
        self._optimizer: Any = trainer.optimizers[0]
        self._schedulers = bool(trainer.lr_scheduler_configs)
        self._epoch: int = trainer.current_epoch
        self._precision = trainer.precision_plugin
        self._plain = type(self._precision) is Precision  # which has no context and converts nothing
        self._on_cpu = trainer.strategy.root_device.type == "cpu"  # where the loader's batches are
        self._clips = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        self._progress = loop.batch_progress
        self._counts = loop.automatic_optimization.optim_progress.optimizer
        self._logs = StepLogs(trainer)

    def take(self, batches: Iterator[Any]) -> None:
        """Take the steps; stop early if the Trainer is to stop."""
        trainer, done = self._trainer, self._progress.current
        last = trainer.num_training_batches - 1
        with self._logs.training_steps(), without_records(self._optimizer):
            for batch in batches:
                if not self._plain:
                    batch = self._precision.convert_input(batch)
                self._step(batch if self._on_cpu else trainer.strategy.batch_to_device(batch), done.ready)
                if done.ready == last or trainer.should_stop:
                    return
                if self._schedulers:
                    self._loop.update_lr_schedulers("step", update_plateau_schedulers=True)
                self._logs.count()

    def _step(self, batch: Any, batch_idx: int) -> None:
        progress, module, logs = self._progress, self._module, self._logs
        progress.increment_ready()
        progress.increment_started()
        logs.start(batch)
        self._counts.step.increment_ready()
        closure = partial(self._closure, batch, batch_idx)
        module.optimizer_step(self._epoch, batch_idx, self._optimizer, closure)
        self._counts.step.increment_completed()
        progress.increment_processed()
        if self._schedulers:
            self._loop.update_lr_schedulers("step", update_plateau_schedulers=False)
        module.on_train_batch_end({}, batch, batch_idx)
        logs.end_batch()
        progress.increment_completed()
        logs.end()

    def _closure(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch, with its gradient in the parameters; the optimizer calls this.

        Lightning clears the last gradient after the forward pass. Before it, its memory is still in the
        processor's cache, and the forward pass can use it.
        """
        module, optimizer = self._module, self._optimizer
        if self._clears_first:
            module.optimizer_zero_grad(self._epoch, batch_idx, optimizer)
        with nullcontext() if self._plain else self._precision.train_step_context():
            loss = module.training_step(batch, batch_idx)
        self._counts.zero_grad.increment_ready()
        self._counts.zero_grad.increment_started()
        if not self._clears_first:
            module.optimizer_zero_grad(self._epoch, batch_idx, optimizer)
        self._counts.zero_grad.increment_completed()
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        if self._clips[0]:
            module.configure_gradient_clipping(optimizer, *self._clips)
        return loss


def slow_reason(trainer: Any, module: ContinualModule) -> str | None:
    """Return why Lightning must take the steps itself; None if nothing can observe the difference."""
    if not module.automatic_optimization:
        return f"{module.algorithm_hparams.name} takes its steps itself"
    for hook, packages in MODULE_HOOKS.items():
        owner = next(cls for cls in type(module).__mro__ if hook in vars(cls))
        if hook in vars(module):
            return f"{type(module).__name__} overrides {hook}"
        if owner.__module__.partition(".")[0] not in packages:
            return f"{owner.__name__} overrides {hook}"
    for callback in trainer.callbacks:
        for hook in CALLBACK_HOOKS:
            if getattr(getattr(callback, hook), "__func__", None) is not getattr(Callback, hook):
                return f"the callback {type(callback).__name__} has {hook}"
    return _unusual_setting(trainer, module)


def _unusual_setting(trainer: Any, module: ContinualModule) -> str | None:
    precision, strategy = trainer.precision_plugin, trainer.strategy
    validates = trainer.enable_validation
    for name, value, unusual in (
        ("accumulate_grad_batches", trainer.accumulate_grad_batches, trainer.accumulate_grad_batches != 1),
        ("max_steps", trainer.max_steps, trainer.max_steps != -1),
        ("precision", trainer.precision, type(precision) not in (Precision, DoublePrecision)),
        ("profiler", type(trainer.profiler).__name__, type(trainer.profiler) is not NoProfiler),
        ("val_check_interval", trainer.val_check_interval, validates and trainer.val_check_interval != 1.0),
        ("check_val_every_n_epoch", None, validates and trainer.check_val_every_n_epoch is None),
        ("strategy", type(strategy).__name__, type(strategy) not in (SingleDeviceStrategy, DDPStrategy)),
        ("strategy", type(strategy).__name__, strategy.model is not module),
    ):
        if unusual:
            return f"trainer.{name}={value}"
    return None

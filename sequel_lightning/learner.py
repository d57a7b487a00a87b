"""LightningLearner: one Trainer.fit per task, run by the orchestrator."""

from __future__ import annotations

import logging
import math
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback, Checkpoint, ProgressBar
from pytorch_lightning.loggers import Logger
from torch import Tensor

from sequel_core.hparams import TrainingHParams
from sequel_core.runs.files import errors_naming
from sequel_core.runs.learner import DivergenceError, Evaluation, FitMonitor, Mode, Progress
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch, Samples, Task
from sequel_core.stream.trees import tree_map
from sequel_lightning._compat import dump_checkpoint, keep_signal_handlers, without_launcher
from sequel_lightning.backbones import canonical_weights
from sequel_lightning.callbacks import (
    callbacks_of_task,
    check_callbacks,
    check_monitors,
    separate_checkpoints,
)
from sequel_lightning.consolidation import TRAINING, best_keeper
from sequel_lightning.data import EvaluationBatches, TaskDataModule
from sequel_lightning.distributed import (
    check_strategy,
    lost_process_named,
    spawned_processes,
    starts_scripts,
)
from sequel_lightning.fast import FastSteps, NoProfiler
from sequel_lightning.launch import started, starts_processes
from sequel_lightning.loggers import TrainersLoggers, log_hparams, log_image, log_table, resume_logger
from sequel_lightning.module import ContinualModule
from sequel_lightning.networks import evaluating, modes_kept_at_errors
from sequel_lightning.objectives import given
from sequel_lightning.preprocessing import mask_outputs
from sequel_lightning.replay import Memory, stored_samples
from sequel_lightning.reporting import PhasePosition, Report, RunningMetrics
from sequel_lightning.scores import ScoreSums, sums_of
from sequel_lightning.trees import adopt_names

TORCH_DTYPES = {"float32": torch.float32, "float64": torch.float64}
SEEDS = 2**63
T = TypeVar("T")
CHECKPOINT = "lightning.ckpt"


class LightningLearner:
    """Trains a ContinualModule on a stream, with a new Trainer for each task.

    Args:
        module: for example `EWC(net, optimizer, EWCHParams(), benchmark.spec)`.
        training: batch size, epochs, clipping, seed, dtype; see `help(TrainingHParams)`.
        trainer: further arguments of `pytorch_lightning.Trainer`: accelerator, devices, precision,
            accumulate_grad_batches, ...
        callbacks: callbacks of Lightning. Lightning's own callbacks and their subclasses are copied for each
            task, so that early stopping starts again; the copies are in `learner.trainer.callbacks`.
            Checkpoints go into `task_<index>/`. User-defined subclasses of Callback are not copied.
        loggers: loggers of Lightning, shared by all tasks. Their x-axis is the number of steps since the
            start of the stream.

    Raises:
        ValueError: the module has no spec; `training.dtype` is not that of the network; a callback cannot be
            used for each task; `consolidate="best"` without a ModelCheckpoint that has a monitor; `trainer`
            contains an argument that the learner sets.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import EWCHParams, run
        >>> from sequel_lightning import EWC, MLP
        >>> digits = RotatedDigits(num_tasks=2, subset=100)
        >>> net = MLP((16,), num_classes=10, image_shape=digits.image_shape)
        >>> module = EWC(net, partial(torch.optim.SGD, lr=0.1), EWCHParams(), digits.spec)
        >>> learner = LightningLearner(module, trainer={"accelerator": "cpu"})
        >>> result = run(learner, digits, progress=False)
        >>> learner.step  # 100 samples in batches of 10, for each of two tasks
        20
    """

    mode: Mode = "pytorch"

    def __init__(
        self,
        module: ContinualModule,
        training: TrainingHParams | None = None,
        *,
        trainer: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        loggers: Sequence[Logger] = (),
    ) -> None:
        if module.spec is None:
            raise ValueError("the module has no spec; construct it with spec=benchmark.spec")
        self.module = module
        module.save_hyperparameters(dict(module.hparams), logger=False)  # the run's configuration is logged
        self.hparams = module.algorithm_hparams
        self.score = module.objective.score
        self.training = training or TrainingHParams()
        self.spec: StreamSpec = module.spec
        self.hparams.check(self.spec, self.training)
        self.callbacks = tuple(callbacks)
        check_callbacks(self.callbacks, self.training)
        if self.hparams.consolidate == "best":
            best_keeper(self.callbacks)
        self.loggers = TrainersLoggers(loggers)
        dtypes = {p.dtype for p in module.net.parameters()}
        if dtypes != {TORCH_DTYPES[self.training.dtype]}:
            raise ValueError(
                f"dtype={self.training.dtype} but the network's weights are {', '.join(map(str, dtypes))}; "
                f"convert them with net.to({TORCH_DTYPES[self.training.dtype]}) before the module is made"
            )
        self._settings = self._trainer_settings(dict(trainer or {}))
        self.fast_steps = FastSteps()
        self._joined = False  # whether the processes of the run communicate
        self._resumed: str | None = None  # the checkpoint that the next task's fit resumes
        self.trainer = self._make_trainer(0)  # of the latest task
        self.shows_progress = self.trainer.progress_bar_callback is not None
        check_strategy(self.trainer.strategy)  # here, before other processes are started
        self.num_devices = self.trainer.world_size
        self.settings: Mapping[str, Any] | None = None  # of an experiment; see `launch`

    @property
    def step(self) -> int:
        """Training steps since the start of the stream."""
        return self.module.running_metrics.steps_done

    @property
    def main_process(self) -> bool:
        """Whether this process records the run; the others only train with it."""
        return self.module.ranks.rank == 0

    def launch(self, function: Callable[[], T]) -> T:
        """Call a function in every process; see `sequel_core.runs.learner.OneProcess`.

        The other processes run this script again. If `settings` of an experiment are given, they run that.

        Raises:
            LostProcessError: one of the processes has ended.
            ValueError: the strategy is `ddp_spawn`, and there are no settings of an experiment.
        """
        strategy = self.trainer.strategy
        launcher = strategy.launcher
        if launcher is None or self._joined:
            return function()
        runs_scripts = starts_scripts(strategy)
        if starts_processes(strategy):
            if self.settings is not None:
                with started(self.settings, self.trainer):
                    self._join()
                    return function()
            if not runs_scripts:
                raise spawned_processes()
        if runs_scripts:
            launcher.launch(int)
        self._join()
        return function()

    def agree(self, value: T | None) -> T:
        """Return the value of the main process, in every process; the others may pass None."""
        if self._joined:
            with lost_process_named():
                value = self.trainer.strategy.broadcast(value)
        return cast(T, value)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in every process, from the main process on."""
        return self.module.ranks.gather_objects(value)

    def _join(self) -> None:
        """Connect this process with the others."""
        with lost_process_named(), quiet():
            self.trainer.strategy.setup_environment()
        self._joined = True
        without_launcher(self.trainer)
        self.module.ranks.follow(self.trainer)
        if not self.main_process:
            self.loggers = TrainersLoggers(())

    def fit_task(self, task: Task, monitor: FitMonitor) -> None:
        """Train on one task, then consolidate it; see `sequel_core.runs.learner.Learner`."""
        training = self.training
        check_monitors(self.callbacks, task)
        data = TaskDataModule(
            task,
            training.batch_size,
            training.eval_batch_size,
            training.seed,
            drop_last=training.drop_last,
        )
        torch.manual_seed(int(plan.words(training.seed, "dropout", task.index, count=1)[0]) % SEEDS)
        watcher = _Watcher(task, training, monitor, self.module.running_metrics, bool(self.callbacks))
        self.trainer = self._make_trainer(training.epochs(task.index), watcher)
        separate_checkpoints(self.trainer, task)
        self.fast_steps.attach(self.trainer)
        data.trainer = self.trainer  # not attached: Lightning looks up its batch hooks at every step
        data.plan_ahead = self.module.plan_ahead
        self.module.reporting.observer = watcher
        loaders = data.train_dataloader(), data.val_dataloader()
        resumed, self._resumed = self._resumed, None
        keep_signal_handlers(self.trainer)  # the orchestrator's
        on_sigint = signal.getsignal(signal.SIGINT)
        try:
            with quiet(), modes_kept_at_errors(self.module):
                self.trainer.fit(self.module, *loaders, ckpt_path=resumed, weights_only=True)
        except SystemExit as error:  # Lightning's own end at Ctrl-C, after which it ignores the next
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, on_sigint)
            raise KeyboardInterrupt from error
        finally:
            self.module.reporting.observer = None

    def evaluate(self, task: Task, split: str) -> Evaluation:
        """Measure score and loss on a split of a task; see `sequel_core.runs.learner.Learner`."""
        device = self.trainer.strategy.root_device
        module = self.module.to(device)
        objective = module.objective
        mask = torch.from_numpy(self.spec.mask).to(device)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        sums: dict[str, ScoreSums] = {}  # of the predictions, of the masked ones, and of alternatives
        samples = task.split(split)
        forward_context = self.trainer.precision_plugin.forward_context
        with evaluating(module), torch.no_grad(), forward_context(), module.ranks.divided():
            for tensors in EvaluationBatches(samples, self.training.eval_batch_size):
                batch = Batch(*(tree_map(methodcaller("to", device), tree) for tree in tensors))
                outputs = module.predict(batch.x, batch.t)
                predictions = {"": outputs}
                if objective.classification:
                    predictions["masked"] = mask_outputs(outputs, mask[batch.t])
                predictions |= {
                    f"alternative {k}": v for k, v in module.alternatives(batch.x, batch.t).items()
                }
                for name, predicted in predictions.items():
                    model = given(predicted, batch.x, partial(module.predict, t=batch.t))
                    added = sums_of(objective, model, batch).to(zero).sum(1)
                    sums.setdefault(name, ScoreSums(objective, zero)).add(added, predicted, batch.y)
        results = {name: tuple(map(float, part.compute())) for name, part in sums.items()}
        loss, score = results.pop("")
        _, masked_score = results.pop("masked", (math.nan, math.nan))
        alternatives = {name.removeprefix("alternative "): value for name, (_, value) in results.items()}
        return Evaluation(score, len(samples), loss, masked_score, alternatives)

    @property
    def logs(self) -> bool:
        """Whether there are loggers."""
        return len(self.loggers) > 0

    def start_stream(self, config: Mapping[str, Any], resumed: bool = False) -> None:
        """Log the run's configuration; see `sequel_core.runs.learner.Learner`."""
        if resumed:
            self.loggers.each(lambda logger: resume_logger(logger, self.step))
        else:
            self.loggers.each(lambda logger: log_hparams(logger, config))

    def end_stream(self) -> None:
        """Flush the loggers."""
        self.loggers.each(lambda logger: logger.save())

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log numbers at the current step."""
        self.loggers.each(lambda logger: logger.log_metrics(dict(metrics), step=self.step))

    def log_image(self, name: str, image: NDArray[np.uint8]) -> None:
        """Log an image `[H, W, 3]` at the current step, to loggers that take images."""
        self.loggers.each(lambda logger: log_image(logger, name, image, self.step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table at the current step, to loggers that take tables."""
        self.loggers.each(lambda logger: log_table(logger, name, columns, rows, self.step))

    def memory_samples(self) -> Samples:
        """Return copies of the samples that a replay method holds; images are `[n, H, W, C]`.

        Raises:
            ValueError: the algorithm keeps no samples.
        """
        kept: Any = getattr(self.module, "state", ())
        memories = [part for part in (kept, *kept) if isinstance(part, Memory)]
        if not memories:
            raise ValueError(f"{self.hparams.name} keeps no samples; methods with a memory do")
        return stored_samples(memories[0])

    def memory_bytes(self) -> int:
        """Return the bytes of what the algorithm keeps of past tasks."""
        return self.module.memory_bytes()

    def save(self, directory: Path) -> Callable[[], None]:
        """Write a checkpoint in Lightning's format; see `sequel_core.runs.learner.Learner`."""
        strategy = self.trainer.strategy
        if self.trainer.model is None:  # nothing was fitted since the start, or since `restore`
            strategy.connect(self.module)
        StraightToFile().save_checkpoint(dump_checkpoint(self.trainer), directory / CHECKPOINT)
        return lambda: None

    def restore(self, directory: Path) -> None:
        """Restore what `save` wrote; see `sequel_core.runs.learner.Learner`."""
        path = directory / CHECKPOINT
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        adopt_names(self.module, checkpoint["state_dict"])
        check_tensors(directory, checkpoint["state_dict"], self.module.state_dict())
        self.module.load_state_dict(checkpoint["state_dict"])
        self.module.on_load_checkpoint(checkpoint)
        self._resumed = str(path) if self.module.phase == TRAINING else None

    def weights(self) -> dict[str, FloatArray]:
        """Return weights and running statistics in the canonical layout, which is Flax's."""
        weights: dict[str, FloatArray] = {}
        for name, part in self.module.trained().items():
            prefix = f"{name}/" if name else ""
            weights |= {f"{prefix}{path}": array for path, array in canonical_weights(part).items()}
        return dict(sorted(weights.items()))

    def describe(self) -> dict[str, Any]:
        """Return the model and its number of parameters as plain values."""
        parameters = sum(p.numel() for part in self.module.trained().values() for p in part.parameters())
        return {"model": repr(self.module.net), "parameters": parameters}

    def threads(self) -> int:
        """Return the number of threads of PyTorch's operators."""
        return torch.get_num_threads()

    def close(self, failed: bool = False) -> None:
        """Flush and close the loggers; see `sequel_core.runs.learner.Learner`."""
        self.loggers.close(failed)

    # -- parts of the above

    def _trainer_settings(self, trainer: dict[str, Any]) -> dict[str, Any]:
        training = self.training
        ours = {
            "max_epochs": "training.epochs_per_task",
            "gradient_clip_val": "training.grad_clip",
            "gradient_clip_algorithm": "training.grad_clip_algorithm",
            "log_every_n_steps": "training.log_every_n_steps",
            "logger": "loggers",
            "callbacks": "callbacks",
        }
        for name, instead in ours.items():
            if name in trainer:
                raise ValueError(f"trainer.{name} is set by the learner; use {instead}")
        check_strategy(trainer.get("strategy", "auto"))
        double = "64-true", "64", 64
        if training.dtype == "float64" and trainer.setdefault("precision", "64-true") not in double:
            raise ValueError(f"dtype=float64 needs trainer.precision=64-true, got {trainer['precision']!r}")
        return {
            "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in self.callbacks),
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in self.callbacks),
            "num_sanity_val_steps": 0,
            "profiler": NoProfiler(),
            "devices": 1,
            "limit_val_batches": None if self.callbacks else 0,
            **{name: value for name, value in trainer.items() if (name, value) != ("profiler", None)},
            "gradient_clip_val": training.grad_clip,
            "gradient_clip_algorithm": training.grad_clip_algorithm,
            "log_every_n_steps": training.log_every_n_steps,
        }

    def _make_trainer(self, epochs: int, *watchers: Callback) -> pl.Trainer:
        callbacks = callbacks_of_task(self.callbacks, first=self.step == 0)
        if callbacks:  # one alone would cost 3% of the rate whatever it does
            callbacks[:0] = watchers
        loggers = self.loggers.for_trainer() or False
        with quiet():
            made = pl.Trainer(**self._settings, max_epochs=epochs, callbacks=callbacks, logger=loggers)
        if self._joined:
            without_launcher(made)
        return made


class StraightToFile(TorchCheckpointIO):
    """Writes checkpoints directly to the file; Lightning's own first makes a copy in memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a file; an error may leave an incomplete one."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with errors_naming(file), file.open("wb") as stream:
            try:
                torch.save(checkpoint, stream)
            except RuntimeError as error:  # of the archive's end, which torch writes after a failed write too
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


class _Watcher(Callback):
    """Observes the steps of a fit: reports progress, and evaluates or writes a checkpoint when due.

    It is also a callback, added only if the Trainer has other callbacks. One of them may stop training at an
    epoch's end, so an evaluation due there is postponed to the start of the next epoch; if there is none, the
    end-of-task evaluation replaces it.
    """

    def __init__(
        self,
        task: Task,
        training: TrainingHParams,
        monitor: FitMonitor,
        running_metrics: RunningMetrics,
        postpones: bool,
    ) -> None:
        self.task = task
        self._monitor = monitor
        self._noting = monitor._replace(on_evaluate=self._postpone, on_checkpoint=self._checkpoint)
        self._running_metrics = running_metrics
        self._epochs = training.epochs(task.index)
        self._every_step = bool(monitor.intervals)
        self._postpones, self._postponed = postpones, False

    def _postpone(self) -> None:
        self._postponed = True

    def _checkpoint(self) -> None:
        """Write a checkpoint, after the evaluation that was postponed."""
        self._evaluate()
        self._monitor.on_checkpoint()

    def _evaluate(self) -> None:
        if self._postponed:
            self._postponed = False
            self._monitor.on_evaluate()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do the evaluation that was postponed, before other callbacks log the next step."""
        self._evaluate()

    def after_step(self, trainer: pl.Trainer, batch_idx: int, report: Report | None) -> None:
        """Report progress if the step made a report, and evaluate or write a checkpoint if due."""
        if report is None and not self._every_step and not self._monitor.checkpoint_due():
            return
        steps_per_epoch = int(trainer.num_training_batches)
        done = trainer.current_epoch * steps_per_epoch + batch_idx + 1
        if report is not None:
            optimizers = trainer.optimizers
            if report.first_bad_step is not None:
                place = divmod(done - report.first_bad_step, steps_per_epoch)
                raise DivergenceError(self.task.index, *place)
            self._monitor.on_progress(
                Progress(
                    step=self._running_metrics.steps_done,
                    epoch=trainer.current_epoch,
                    task_step=done,
                    task_steps=steps_per_epoch * self._epochs,
                    loss=report.loss,
                    score=report.score,
                    learning_rate=optimizers[0].param_groups[0]["lr"] if optimizers else math.nan,
                    extra=report.extra,
                )
            )
        epoch_end = batch_idx + 1 == steps_per_epoch
        monitor = self._noting if self._postpones and epoch_end else self._monitor
        monitor.after_step(done, steps_per_epoch * self._epochs, epoch_end)

    def after_phase_step(self, position: PhasePosition, report: Report | None) -> None:
        """Do the same after a step of a second phase."""
        before, done, count = position[:3]
        self._postponed = False  # the evaluations of the phase replace it
        if report is not None:
            if report.first_bad_step is not None:
                epoch, step = divmod(done - report.first_bad_step, position.steps_per_epoch)
                raise DivergenceError(self.task.index, self._epochs + epoch, step)
            self._monitor.on_progress(
                Progress(
                    step=self._running_metrics.steps_done,
                    epoch=self._epochs + (done - 1) // position.steps_per_epoch,
                    task_step=before + done,
                    task_steps=before + count,
                    loss=report.loss,
                    score=report.score,
                    learning_rate=position.learning_rate,
                    extra=report.extra,
                )
            )
        self._monitor.after_step(before + done, before + count, position.epoch_end)


def check_tensors(path: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError at the first tensor, by name, whose shape or dtype is not as expected."""
    there, here = ({name: f"{t.dtype} {list(t.shape)}" for name, t in d.items()} for d in (stored, expected))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"checkpoint {path} does not fit: {name} is {there.get(name, 'missing')} there, and "
                f"{here.get(name, 'unknown')} here; resume with the settings of the run"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's hardware report and advice that does not apply, which repeat for every task."""
    names = "pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.distributed"
    loggers = [*map(logging.getLogger, names), logging.getLogger("lightning_fabric.utilities.rank_zero")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)

"""Which fits begin a task and which end one: failures, tuners, dry runs, early stops, spent Trainers."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder
from pytorch_lightning.tuner.tuning import Tuner
from torch import nn

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_lightning import EWC, TaskDataModule
from sequel_lightning.consolidation import CONSOLIDATED, IDLE, TRAINING
from tests.lightning.parts import (
    ADAM,
    BATCH,
    ER,
    MOMENTUM,
    STATEFUL,
    STEPS,
    At,
    assert_same,
    counted,
    data,
    everything,
    float_spec,
    learn,
    module,
    own_loader,
    position,
    stream,
    trainer,
)

CARRY = EWCHParams(ewc_lambda=10.0, lr_decay=0.8, reset_optimizer=False)


class Failure(RuntimeError):
    pass


def fail(trainer: pl.Trainer, hook: str) -> None:
    raise Failure(hook)


def stop(trainer: pl.Trainer, hook: str) -> None:
    trainer.should_stop = True


def interrupt(trainer: pl.Trainer, hook: str) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_train_end"])
def test_an_exception_leaves_the_task_open_and_the_next_fit_resumes_it(hook: str) -> None:
    benchmark = stream()
    model = module(benchmark)
    assert isinstance(model, EWC)
    calls = counted(model)
    learn(model, benchmark, 0)
    importance = {k: v.clone() for k, v in model.importance.get().items()}
    with pytest.raises(Failure):
        learn(model, benchmark, 1, callbacks=[At(fail, hook, step=3 if "batch" in hook else None)])
    assert position(model) == (1, TRAINING)
    assert calls == [0]
    assert all(torch.equal(v, importance[k]) for k, v in model.importance.get().items())
    learn(model, benchmark, 1)
    assert position(model) == (1, CONSOLIDATED)
    assert calls == [0, 1]


def test_a_fit_after_an_exception_starts_from_the_optimizer_state_of_the_last_task() -> None:
    benchmark = stream()
    model = module(benchmark, CARRY)
    learn(model, benchmark, 0)
    before = everything(model)
    with pytest.raises(Failure):
        learn(model, benchmark, 1, callbacks=[At(fail, "on_train_batch_end", step=3)])
    after = everything(model)
    momenta = [k for k in before["tensors"] if k.endswith("momentum_buffer")]
    assert len(momenta) == 4
    assert all(torch.equal(after["tensors"][k], before["tensors"][k]) for k in momenta)


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM])
def test_the_learning_rate_finder_changes_nothing(task: int, optimizer: Any, tmp_path: Path) -> None:
    benchmark = stream()
    model, twin = module(benchmark, CARRY, optimizer), module(benchmark, CARRY, optimizer)
    for before in range(task):
        learn(model, benchmark, before)
        learn(twin, benchmark, before)
    calls, expected = counted(model), everything(model)
    search = trainer(default_root_dir=tmp_path)
    Tuner(search).lr_find(model, datamodule=data(benchmark, task), update_attr=False, num_training=7)
    assert_same(everything(model), expected)
    assert position(model) == position(twin)
    assert calls == []

    learn(model, benchmark, task)
    learn(twin, benchmark, task)
    assert_same(everything(model), everything(twin))
    assert calls == [task]


def test_a_fit_on_the_trainer_that_searched_the_learning_rate_is_the_same() -> None:
    benchmark = stream()
    model, twin = module(benchmark, CARRY), module(benchmark, CARRY)
    one = trainer()
    Tuner(one).lr_find(model, datamodule=data(benchmark, 0), update_attr=False, num_training=7)
    one.fit(model, datamodule=data(benchmark, 0))
    learn(twin, benchmark, 0)
    assert_same(everything(model), everything(twin))


def test_the_learning_rate_finder_as_a_callback_is_outside_the_task(tmp_path: Path) -> None:
    benchmark = stream()
    model, twin = module(benchmark, CARRY), module(benchmark, CARRY)
    calls = counted(model)
    for task in range(2):
        finder = LearningRateFinder(num_training_steps=7, update_attr=False)
        learn(model, benchmark, task, callbacks=[finder], default_root_dir=tmp_path)
        assert finder.optimal_lr is not None
        assert len(finder.optimal_lr.results["loss"]) > 0
        learn(twin, benchmark, task)
        assert_same(everything(model), everything(twin))
    assert calls == [0, 1]


def test_the_batch_size_finder_is_outside_the_task(tmp_path: Path) -> None:
    benchmark = stream(steps=8)
    model, twin = module(benchmark, CARRY), module(benchmark, CARRY)
    calls = counted(model)
    finder = BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=2)
    actual = data(benchmark, 0)
    trainer(callbacks=[finder], default_root_dir=tmp_path).fit(model, datamodule=actual)
    assert calls == [0]
    assert actual.batch_size == finder.optimal_batch_size
    same = data(benchmark, 0)
    same.batch_size = actual.batch_size
    trainer().fit(twin, datamodule=same)
    assert_same(everything(model), everything(twin))


def test_the_batch_size_finder_stops_at_the_size_of_the_task(tmp_path: Path) -> None:
    benchmark = stream()
    model = module(benchmark)
    before = everything(model)
    finder = BatchSizeFinder(steps_per_trial=1)
    with pytest.raises(
        ValueError, match="batch_size must be <= the samples of a task, got 32 with 22 training samples"
    ):
        learn(model, benchmark, 0, callbacks=[finder], default_root_dir=tmp_path)
    assert_same(everything(model), before)
    assert list(tmp_path.iterdir()) == []


def test_fast_dev_run_leaves_the_state_alone() -> None:
    benchmark = stream(validation=5)
    model = module(benchmark)
    calls = counted(model)
    learn(model, benchmark, 0, fast_dev_run=2)
    assert position(model) == (-1, IDLE)
    learn(model, benchmark, 0)
    learn(model, benchmark, 1, fast_dev_run=2)
    assert position(model) == (0, CONSOLIDATED)
    assert calls == [0]


@pytest.mark.parametrize("hparams", STATEFUL, ids=lambda hparams: hparams.name)
def test_a_search_and_a_dry_run_leave_no_trace(hparams: AlgorithmHParams, tmp_path: Path) -> None:
    """Nothing moves in memory, planner, path or anchor; a dry run trains the network, and nothing else."""
    benchmark = stream()
    model, twin = module(benchmark, hparams), module(benchmark, hparams)
    for task in range(2):
        before = everything(model)
        search = trainer(default_root_dir=tmp_path)
        refusal = pytest.raises(ValueError, match="takes its steps itself")  # it would measure a single rate
        with nullcontext() if model.automatic_optimization else refusal:
            Tuner(search).lr_find(model, datamodule=data(benchmark, task), update_attr=False, num_training=7)
        assert_same(everything(model), before)
        learn(model, benchmark, task)
        learn(twin, benchmark, task)
        assert_same(everything(model), everything(twin))
    before = everything(model)["tensors"]
    learn(model, benchmark, 2, fast_dev_run=3)
    after = everything(model)["tensors"]
    changed = [k for k, v in before.items() if not torch.equal(after[k], v)]
    assert bool(changed) is (hparams.name != "gdumb")  # which trains at the end of a task only
    assert all(k.startswith("net.") for k in changed)


@pytest.mark.parametrize("hparams", [NaiveHParams(), ER], ids=lambda hparams: hparams.name)
def test_a_search_before_a_later_task_takes_batches_without_a_task(
    hparams: AlgorithmHParams, tmp_path: Path
) -> None:
    benchmark = stream(scenario="task")
    model = module(benchmark, hparams, spec=float_spec(benchmark))
    loader = partial(own_loader, benchmark, with_task=False)
    trainer().fit(model, loader(0))
    search = trainer(default_root_dir=tmp_path)
    actual = Tuner(search).lr_find(model, loader(1), update_attr=False, num_training=4)
    assert actual is not None
    assert max(actual.results["loss"]) < 10


def test_early_stopping_ends_the_task() -> None:
    benchmark = stream(validation=8)
    model = module(benchmark, optimizer=partial(torch.optim.SGD, lr=0.0))
    calls = counted(model)
    stopping = EarlyStopping("val/loss", patience=2)
    stopped = learn(model, benchmark, 0, epochs=9, callbacks=[stopping])
    assert stopped.current_epoch == 3
    assert stopping.stopped_epoch == 2
    assert position(model) == (0, CONSOLIDATED)
    assert calls == [0]
    assert model.running_metrics.steps_done == 3 * STEPS


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"callbacks": [At(stop, "on_train_batch_end", step=3)]}, 3),
        ({"max_steps": 7}, 7),
        ({"limit_train_batches": 2}, 4),
    ],
    ids=["should_stop", "max_steps", "limit_train_batches"],
)
def test_a_task_cut_short_on_purpose_is_consolidated(options: dict[str, Any], steps: int) -> None:
    benchmark = stream()
    model = module(benchmark)
    calls = counted(model)
    learn(model, benchmark, 0, epochs=2, **options)
    assert model.running_metrics.steps_done == steps
    assert position(model) == (0, CONSOLIDATED)
    assert calls == [0]


def test_an_interrupt_is_not_the_end_of_the_task() -> None:
    benchmark = stream()
    model = module(benchmark)
    calls = counted(model)
    with pytest.raises(SystemExit):
        learn(model, benchmark, 0, callbacks=[At(interrupt, "on_train_batch_end", step=2)])
    assert position(model) == (0, TRAINING)
    assert calls == []
    learn(model, benchmark, 0)
    assert position(model) == (0, CONSOLIDATED)
    assert calls == [0]


@pytest.mark.parametrize("limits", [{"epochs": 1}, {"epochs": None, "max_steps": 3}])
def test_a_spent_trainer_raises_before_anything_changes(limits: dict[str, Any]) -> None:
    benchmark = stream()
    model = module(benchmark)
    spent = trainer(**limits)
    spent.fit(model, datamodule=data(benchmark, 0))
    before = everything(model)
    with pytest.raises(ValueError, match=r"spent.*make a new Trainer for each task"):
        spent.fit(model, datamodule=data(benchmark, 1))
    assert_same(everything(model), before)
    learn(model, benchmark, 1)
    assert position(model) == (1, CONSOLIDATED)


def test_a_trainer_with_raised_max_epochs_learns_the_next_task() -> None:
    benchmark = stream()
    model = module(benchmark)
    calls = counted(model)
    one = trainer()
    for task in range(3):
        one.fit_loop.max_epochs = task + 1
        one.fit(model, datamodule=data(benchmark, task))
    assert calls == [0, 1, 2]
    assert model.running_metrics.steps_done == 3 * STEPS


@pytest.mark.parametrize("hparams", [NaiveHParams(lr_decay=0.5), EWCHParams(lr_decay=0.5)])
def test_lr_decay_beside_a_scheduler_raises(hparams: AlgorithmHParams) -> None:
    def scheduled(params: Any) -> dict[str, Any]:
        optimizer = torch.optim.SGD(params, lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}

    benchmark = stream()
    with pytest.raises(ValueError, match=r"lr_decay=0.5 and a learning-rate scheduler both set"):
        learn(module(benchmark, hparams, scheduled), benchmark, 0)


def test_hparams_of_another_algorithm_raise() -> None:
    with pytest.raises(ValueError, match="EWC needs EWCHParams, got NaiveHParams"):
        EWC(nn.Linear(2, 2), MOMENTUM, NaiveHParams())


def test_a_batch_larger_than_the_task_raises() -> None:
    benchmark = stream()
    with pytest.raises(ValueError, match=f"got 99 with {BATCH * STEPS + 2} training samples in task 0"):
        TaskDataModule(benchmark.tasks[0], batch_size=99)

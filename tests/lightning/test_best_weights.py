"""At which weights a task is consolidated, and what a checkpoint from before its end may not do unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from sequel_benchmarks import RotatedDigits
from sequel_core import run
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.stream.benchmark import Benchmark
from sequel_lightning import ALGORITHMS, EWC, MLP, ContinualModule, algorithms, initialise, make_learner
from sequel_lightning.consolidation import CONSOLIDATED, TRAINING
from tests.lightning.parts import (
    CLASSES,
    DERPP,
    ER,
    ICARL,
    KCL,
    LAMAML,
    LFL,
    MCSGD,
    MOMENTUM,
    ONLINE,
    SI,
    SIDE,
    At,
    assert_same,
    counted,
    data,
    everything,
    learn,
    module,
    network,
    own_loader,
    own_stream,
    position,
    stream,
    trainer,
)

LAST = EWCHParams(ewc_lambda=10.0, fisher_samples=None)
BEST = replace(LAST, consolidate="best")
SCORES = (0.1, 0.9, 0.3)  # the second epoch of three is the best


class Scores(Callback):
    """Says how good each epoch was."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("score", SCORES[trainer.current_epoch])


def keeper(directory: Path, **options: Any) -> ModelCheckpoint:
    """Keep the weights after the second of three epochs."""
    return ModelCheckpoint(directory, monitor="score", mode="max", save_on_train_epoch_end=True, **options)


def fit(model: ContinualModule, benchmark: Benchmark, task: int, *callbacks: Callback) -> pl.Trainer:
    return learn(model, benchmark, task, 3, callbacks=[Scores(), *callbacks], enable_checkpointing=True)


def state_of(path: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def normalised(benchmark: Benchmark, task: int) -> tuple[Tensor, Tensor]:
    """Return a task's training images in float64 and its labels, in NumPy but for the last step."""
    split = benchmark.tasks[task].train
    x, y, _ = split.take(np.arange(len(split)))
    mean, std = (np.asarray(a) for a in (benchmark.normalisation.mean, benchmark.normalisation.std))
    return torch.from_numpy(((x / 255 - mean) / std).transpose(0, 3, 1, 2)), torch.from_numpy(y)


def with_batch_norm() -> nn.Module:
    torch.manual_seed(1)
    first, norm, last = nn.Linear(SIDE * SIDE, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)
    return nn.Sequential(nn.Flatten(), first, norm, nn.ReLU(), last)


def test_anchor_and_fisher_are_those_of_the_best_weights(tmp_path: Path) -> None:
    benchmark, net = stream(), with_batch_norm().double()
    model = EWC(net, MOMENTUM, BEST, benchmark.spec)
    kept = keeper(tmp_path)
    last: dict[str, Tensor] = {}
    note = At(lambda t, _: last.update(everything(model)["tensors"]), "on_train_end")
    fit(model, benchmark, 0, kept, note)
    file = state_of(kept.best_model_path)
    current = model.state_dict()
    names = [name for name in file if name.startswith("net.")]
    assert all(torch.equal(current[name], file[name]) for name in names)
    changed = {name for name in names if not torch.equal(last[name], file[name])}
    assert {"net.1.weight", "net.2.running_mean", "net.2.running_var"} <= changed

    by_hand = with_batch_norm().double()
    by_hand.load_state_dict({name.removeprefix("net."): file[name] for name in names})
    by_hand.eval()
    images, labels = normalised(benchmark, 0)
    fisher = {name: torch.zeros_like(p) for name, p in by_hand.named_parameters()}
    for x, y in zip(images, labels, strict=True):
        by_hand.zero_grad()
        F.cross_entropy(by_hand(x[None]), y[None]).backward()
        for name, p in by_hand.named_parameters():
            assert p.grad is not None
            fisher[name] += p.grad**2 / len(labels)
    for name, expected in fisher.items():
        assert torch.equal(model.anchor.get()[name], file[f"net.{name}"])
        torch.testing.assert_close(model.importance.get()[name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "hparams",
    [EWCHParams(ewc_lambda=10.0), SI, LFL, KCL, ER, ICARL, MCSGD, ONLINE, LAMAML],
    ids=lambda hparams: hparams.name,
)
def test_an_evaluation_of_the_best_file_changes_nothing(hparams: AlgorithmHParams, tmp_path: Path) -> None:
    """Two tasks with it end exactly as without it, in every method."""
    hparams = replace(hparams, consolidate="best", reset_optimizer=False)
    benchmark = own_stream(hparams, validation=6)
    model, twin = module(benchmark, hparams), module(benchmark, hparams)
    for task in range(2):
        kept = keeper(tmp_path / f"{task}")
        done = fit(model, benchmark, task, kept)
        for evaluate in (done.test, done.validate):
            evaluate(model, datamodule=data(benchmark, task), ckpt_path="best", verbose=False)
        fit(twin, benchmark, task, keeper(tmp_path / f"twin {task}"))
        if hparams.name != "mcsgd":  # whose network between tasks is not the one that was trained
            assert_same(everything(model), everything(twin))
    learn(model, benchmark, 0, fast_dev_run=1)
    learn(twin, benchmark, 0, fast_dev_run=1)
    assert_same(everything(model), everything(twin))


def kept_at_the_end(model: ContinualModule, into: dict[str, Tensor]) -> At:
    return At(lambda t, _: into.update(everything(model)["tensors"]), "on_train_end")


def test_the_path_integral_is_that_of_the_best_weights(tmp_path: Path) -> None:
    benchmark = stream()
    model = module(benchmark, replace(SI, consolidate="best"))
    assert isinstance(model, algorithms.SI)
    start = {name: p.detach().clone() for name, p in model.net.named_parameters()}
    kept, last = keeper(tmp_path), dict[str, Tensor]()
    fit(model, benchmark, 0, kept, kept_at_the_end(model, last))
    file = state_of(kept.best_model_path)
    for name, actual in model.importance.get().items():
        path, end = file[f"path.{name.replace('.', '/')}"], file[f"net.{name}"]
        assert not torch.equal(path, last[f"path.{name.replace('.', '/')}"])
        torch.testing.assert_close(actual, path / ((end - start[name]) ** 2 + SI.xi), rtol=1e-6, atol=1e-9)
        assert torch.equal(model.anchor.get()[name], end)


def test_the_memory_stays_as_training_left_it(tmp_path: Path) -> None:
    benchmark = stream()
    model = module(benchmark, replace(DERPP, consolidate="best"))
    kept, last = keeper(tmp_path), dict[str, Tensor]()
    fit(model, benchmark, 0, kept, kept_at_the_end(model, last))
    current, file = model.state_dict(), state_of(kept.best_model_path)
    stays = [name for name in current if name == "_extra_state" or name.startswith("memory.")]
    assert len(stays) == 5
    assert all(torch.equal(current[name], last[name]) for name in stays)
    assert not torch.equal(current["_extra_state"], file["_extra_state"])
    assert not torch.equal(current["memory.outputs"], file["memory.outputs"])


def test_what_moves_with_the_weights_is_that_of_the_best_weights(tmp_path: Path) -> None:
    benchmark = stream()
    model = module(benchmark, replace(ONLINE, consolidate="best"))
    for task in range(2):
        kept = keeper(tmp_path / f"online {task}")
        fit(model, benchmark, task, kept)
    assert isinstance(model, algorithms.MCSGD)
    file = state_of(kept.best_model_path)
    for name, actual in model.w_bar.get().items():
        assert torch.equal(actual, file[f"moving.0.{name.replace('.', '/')}"])
        assert torch.equal(model.w_hat.get()[name], file[f"net.{name}"])
        assert not torch.equal(actual, file[f"net.{name}"])

    rates = module(benchmark, replace(LAMAML, consolidate="best"))
    kept = keeper(tmp_path / "rates")
    last: dict[str, Tensor] = {}
    fit(rates, benchmark, 0, kept, kept_at_the_end(rates, last))
    file, current = state_of(kept.best_model_path), rates.state_dict()
    assert all(torch.equal(current[name], file[name]) for name in current if name.startswith("rates."))
    assert not torch.equal(last["rates.head/weight"], file["rates.head/weight"])


@pytest.mark.parametrize("hparams", [EWCHParams(ewc_lambda=10), SIHParams()], ids=["ewc", "si"])
def test_best_weights_and_an_evaluation_of_them_on_digits(hparams: AlgorithmHParams, tmp_path: Path) -> None:
    """The numbers of all tasks are those without the evaluation, and importances and memories are there."""
    benchmark = RotatedDigits(num_tasks=3, subset=120, validation=0.2)
    actual = []
    for evaluates in (False, True):
        net = initialise(MLP((16,), 10, image_shape=(8, 8, 1)), seed=0)
        optimizer = partial(torch.optim.SGD, lr=0.1)
        last = replace(hparams, consolidate="best")
        model = ALGORITHMS[last.name](net, optimizer, last, benchmark.spec)
        for task in range(3):
            kept = ModelCheckpoint(tmp_path / f"{evaluates} {task}", monitor="val/accuracy", mode="max")
            done = learn(model, benchmark, task, 3, callbacks=[kept], enable_checkpointing=True)
            if evaluates:
                done.test(model, datamodule=data(benchmark, task), ckpt_path="best", verbose=False)
        assert sum(float(a.abs().sum()) for k, a in model.state_dict().items() if "importance." in k) > 0
        done = trainer()
        scores = [done.test(model, datamodule=data(benchmark, i), verbose=False)[0] for i in range(3)]
        actual.append((everything(model), [score["test/accuracy"] for score in scores]))
    assert_same(actual[1][0], actual[0][0])
    assert actual[1][1] == actual[0][1]
    assert np.mean(actual[0][1]) > 0.3


# -- fits that would leave a task behind


def after_an_evaluation(hparams: AlgorithmHParams, benchmark: Benchmark, path: Path) -> ContinualModule:
    model, kept = module(benchmark, hparams), keeper(path)
    done = fit(model, benchmark, 0, kept)
    done.test(model, datamodule=data(benchmark, 0), ckpt_path="best", verbose=False)
    return model


def loaded(hparams: AlgorithmHParams, benchmark: Benchmark, path: Path) -> ContinualModule:
    kept = keeper(path)
    fit(module(benchmark, hparams), benchmark, 0, kept)
    model = module(benchmark, hparams)
    return type(model).load_from_checkpoint(
        kept.best_model_path, net=model.net, optimizer=MOMENTUM, hparams=hparams, spec=benchmark.spec
    )


def after_an_error(hparams: AlgorithmHParams, benchmark: Benchmark, path: Path) -> ContinualModule:
    def fail(*_: Any) -> None:
        raise RuntimeError("failed")

    model = module(benchmark, hparams)
    with pytest.raises(RuntimeError, match="failed"):
        learn(model, benchmark, 0, 3, callbacks=[At(fail, "on_train_batch_end", step=11)])
    return model


left_open = pytest.mark.parametrize("leave", [after_an_evaluation, loaded, after_an_error])
Leave = Callable[[AlgorithmHParams, Benchmark, Path], ContinualModule]


@left_open
@pytest.mark.parametrize(
    ("hparams", "known"), [(LAST, False), (SI, True), (ER, True)], ids=["ewc-loader", "si", "er"]
)
def test_the_next_fit_raises(leave: Leave, hparams: AlgorithmHParams, known: bool, tmp_path: Path) -> None:
    benchmark = stream()
    model = leave(hparams, benchmark, tmp_path)
    before = everything(model)
    message = (
        "was consolidated at other weights" if leave is after_an_evaluation else "was never consolidated"
    )
    call = "si cannot consolidate it at other" if hparams is SI else r"call module.consolidate_task\(loader\)"
    next_task: dict[str, Any] = {"datamodule": data(benchmark, 1)}
    if not known:
        next_task = {"train_dataloaders": own_loader(benchmark, 1, with_task=True)}
    with pytest.raises(ValueError, match=rf'task 0 {message}.*consolidate="best".*{call}'):
        trainer().fit(model, **next_task)
    assert_same(everything(model), before)
    assert position(model) == (0, TRAINING)
    learn(model, benchmark, 0)  # the task itself may go on
    assert position(model) == (0, CONSOLIDATED)


@left_open
def test_consolidate_task_ends_a_task_at_the_weights_of_the_moment(leave: Leave, tmp_path: Path) -> None:
    benchmark = stream()
    model = leave(LAST, benchmark, tmp_path)
    assert isinstance(model, EWC)
    calls = counted(model)
    weights = {name: p.detach().clone() for name, p in model.net.named_parameters()}
    loader = own_loader(benchmark, 0, with_task=False)
    given: dict[Leave, Any] = {after_an_evaluation: data(benchmark, 0), loaded: loader}
    model.consolidate_task(given.get(leave, list(loader)))
    assert position(model) == (0, CONSOLIDATED)
    assert calls == [0]
    images, labels = normalised(benchmark, 0)
    for name, actual in model.importance.get().items():
        grads = []
        for x, y in zip(images.float(), labels, strict=True):
            model.zero_grad()
            F.cross_entropy(model.net(x[None]), y[None]).backward()
            grads.append(dict(model.net.named_parameters())[name].grad)
        expected = torch.stack([g**2 for g in grads if g is not None]).mean(0)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
        assert torch.equal(model.anchor.get()[name], weights[name])
    model.zero_grad()
    learn(model, benchmark, 1)
    assert position(model) == (1, CONSOLIDATED)
    assert calls == [0, 1]


def test_consolidate_task_raises_if_it_cannot_be_right(tmp_path: Path) -> None:
    benchmark = stream()
    fresh = module(benchmark)
    with pytest.raises(ValueError, match="no task was trained yet"):
        fresh.consolidate_task(data(benchmark, 0))
    learn(fresh, benchmark, 0)
    before = everything(fresh)
    with pytest.raises(ValueError, match="task 0 is consolidated already"):
        fresh.consolidate_task(data(benchmark, 0))
    assert_same(everything(fresh), before)
    open_one = after_an_error(LAST, benchmark, tmp_path)
    with pytest.raises(ValueError, match="ends task 0, got data of task 1"):
        open_one.consolidate_task(data(benchmark, 1))
    with pytest.raises(ValueError, match="the loader gave no batch for the end of task 0"):
        open_one.consolidate_task([])
    assert position(open_one) == (0, TRAINING)
    path = after_an_error(SI, benchmark, tmp_path)
    with pytest.raises(ValueError, match="si cannot consolidate task 0 from a loader: its importances are"):
        path.consolidate_task(data(benchmark, 0))


def test_the_state_comes_back_if_the_file_has_the_same_weights(tmp_path: Path) -> None:
    """Without consolidate="best", the file of the last epoch is of the weights that were consolidated."""
    benchmark = stream()
    model, twin = module(benchmark, LAST), module(benchmark, LAST)
    path = tmp_path / "last.ckpt"
    save = At(lambda t, _: t.save_checkpoint(path), "on_train_epoch_end")
    done = learn(model, benchmark, 0, callbacks=[save])
    learn(twin, benchmark, 0)
    done.test(model, datamodule=data(benchmark, 0), ckpt_path=path, verbose=False)
    assert_same(everything(model), everything(twin))
    learn(model, benchmark, 1)
    learn(twin, benchmark, 1)
    assert_same(everything(model), everything(twin))


def test_an_evaluation_sees_the_state_of_the_file(tmp_path: Path) -> None:
    """iCaRL predicts by the means of exemplars, which the file from before the end of the task lacks."""
    benchmark = stream()
    model = module(benchmark, replace(ICARL, consolidate="best"))
    kept = keeper(tmp_path)
    done = fit(model, benchmark, 0, kept)
    images, labels = benchmark.tasks[0].test, benchmark.tasks[0].test.targets
    x = model.normalise(torch.from_numpy(images.take(np.arange(len(images))).x).movedim(-1, 1))
    last = float(
        (model.predict(x, torch.zeros(len(x), dtype=torch.int64)).argmax(1).numpy() == labels).mean()
    )
    head = float((model.net(x).argmax(1).numpy() == labels).mean())
    assert last != head
    scores = done.test(model, datamodule=data(benchmark, 0), ckpt_path="best", verbose=False)[0]
    assert scores["test/accuracy"] == pytest.approx(head)
    scores = done.test(model, datamodule=data(benchmark, 0), verbose=False)[0]
    assert scores["test/accuracy"] == pytest.approx(last)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_checkpoint_of_a_task_is_not_resumed_on_another(tmp_path: Path) -> None:
    benchmark = stream()
    kept = keeper(tmp_path)
    fit(module(benchmark), benchmark, 0, kept)
    again = trainer(4, callbacks=[keeper(tmp_path)], enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"task 0 was never consolidated.*a fit on task 1 would start"):
        again.fit(module(benchmark), datamodule=data(benchmark, 1), ckpt_path=kept.best_model_path)


# -- where there is no best file


@pytest.mark.parametrize("number", [0, 2])
def test_one_callback_must_say_what_is_best(number: int, tmp_path: Path) -> None:
    benchmark = stream()
    model = module(benchmark, BEST)
    keepers = [keeper(tmp_path, every_n_epochs=i + 1) for i in range(number)]
    callbacks = [Scores(), ModelCheckpoint(tmp_path), *keepers]
    with pytest.raises(ValueError, match=rf"needs exactly one ModelCheckpoint with a.*, got {number};"):
        learn(model, benchmark, 0, callbacks=callbacks, enable_checkpointing=True)
    assert position(model) == (-1, 0)
    learn(model, benchmark, 0, fast_dev_run=1)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_best_file_of_an_earlier_fit_raises(tmp_path: Path) -> None:
    benchmark = stream()
    model, kept = module(benchmark, BEST), keeper(tmp_path)
    fit(model, benchmark, 0, kept)
    with pytest.raises(ValueError, match=r"already has a best file of an earlier one, .*make a new"):
        fit(model, benchmark, 1, kept)
    assert position(model) == (0, CONSOLIDATED)


@pytest.mark.parametrize("lost", ["no epoch ended", "deleted", "broken"])
def test_without_a_best_file_the_last_weights_are_consolidated(lost: str, tmp_path: Path) -> None:
    benchmark = stream()
    model, twin = module(benchmark, BEST), module(benchmark, LAST)
    kept = keeper(tmp_path)

    def lose(*_: Any) -> None:
        if lost == "deleted":
            Path(kept.best_model_path).unlink()
        elif lost == "broken":
            Path(kept.best_model_path).write_bytes(b"nothing")

    options: dict[str, Any] = {"max_steps": 3} if lost == "no epoch ended" else {}
    if lost == "no epoch ended":
        kept = keeper(tmp_path, every_n_epochs=2)
    callbacks = [Scores(), kept, At(lose, "on_train_end")]
    with pytest.warns(UserWarning, match=r"no best weights of task 0 .*consolidated at its last weights"):
        learn(model, benchmark, 0, 3, callbacks=callbacks, enable_checkpointing=True, **options)
    learn(twin, benchmark, 0, 3, **options)
    assert_same(everything(model), everything(twin))


# -- under the learner


def test_the_learner_consolidates_each_task_at_its_best_weights(tmp_path: Path) -> None:
    benchmark = RotatedDigits(num_tasks=2, subset=60, validation=0.3)
    training = TrainingHParams(batch_size=10, epochs_per_task=3, log_every_n_steps=3)
    net = MLP((8,), 10, image_shape=(8, 8, 1))
    kept = keeper(tmp_path / "kept", filename="best")
    hparams = EWCHParams(ewc_lambda=10, accumulation="online", consolidate="best")
    optimizer = partial(torch.optim.SGD, lr=0.1)
    last = {"accelerator": "cpu"}
    made = make_learner(
        hparams, net, optimizer, benchmark, training, callbacks=[Scores(), kept], trainer=last
    )
    run(made, benchmark, run_dir=tmp_path / "run", progress=False)
    assert isinstance(made.module, EWC)
    file = state_of(str(tmp_path / "kept" / "task_1" / "best.ckpt"))
    assert (int(file["task_index"]), int(file["phase"])) == (1, TRAINING)
    for name, anchor in made.module.anchor.get().items():
        assert torch.equal(anchor, file[f"net.{name}"])
        assert torch.equal(made.module.params()[name], file[f"net.{name}"])
    with pytest.raises(ValueError, match='consolidate="best" needs exactly one ModelCheckpoint'):
        make_learner(hparams, net, optimizer, benchmark, training, trainer=last)


def test_naive_finetuning_continues_from_the_best_weights(tmp_path: Path) -> None:
    benchmark = stream()
    model, kept = module(benchmark, NaiveHParams(consolidate="best")), keeper(tmp_path)
    fit(model, benchmark, 0, kept)
    file = state_of(kept.best_model_path)
    assert all(torch.equal(p, file[f"net.{name}"]) for name, p in model.net.named_parameters())


@pytest.mark.parametrize("epochs", [1, 2], ids=["nothing left", "one epoch left"])
def test_the_file_of_a_task_that_has_ended_cannot_begin_the_next(epochs: int, tmp_path: Path) -> None:
    """Lightning would go on after the epochs in the file: the next task would be trained too briefly."""
    benchmark, path = stream(), str(tmp_path / "ended.ckpt")
    learn(module(benchmark), benchmark, 0).save_checkpoint(path)
    model = module(benchmark)
    with pytest.raises(ValueError, match="ckpt_path is a checkpoint from after the end of task 0"):
        learn(model, benchmark, 1, epochs, ckpt_path=path)
    loaded = EWC.load_from_checkpoint(path, net=network(benchmark), optimizer=MOMENTUM)
    learn(loaded, benchmark, 1)
    assert position(loaded) == (1, CONSOLIDATED)

"""Lightning's tuners: what they find, and that a search leaves no trace in a module."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateFinder
from pytorch_lightning.tuner.tuning import Tuner
from torch import Tensor
from torch.nn import functional as F

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_lightning import EWC
from tests.lightning.parts import (
    KCL,
    LAMAML,
    MOMENTUM,
    STEPS,
    assert_same,
    data,
    everything,
    learn,
    module,
    network,
    own_loader,
    own_stream,
    stream,
    trainer,
)


def found_rate(model: pl.LightningModule, tmp_path: Path, loaders: Any) -> Any:
    """Return the finder after a search over as many rates as an epoch has steps."""
    searching = trainer(default_root_dir=tmp_path)
    return Tuner(searching).lr_find(model, **loaders, min_lr=1e-3, num_training=STEPS)


@pytest.mark.parametrize(
    ("hparams", "task"),
    [(NaiveHParams(), 0), (EWCHParams(), 1), (KCL, 1)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_search_sets_the_rate_and_leaves_nothing_else(
    hparams: AlgorithmHParams, task: int, tmp_path: Path
) -> None:
    benchmark = own_stream(hparams)
    model, twin = module(benchmark, hparams), module(benchmark, hparams)
    for one in (model, twin):
        for earlier in range(task):
            learn(one, benchmark, earlier)
    before, modes = everything(model), [part.training for part in model.modules()]
    suggestion = found_rate(model, tmp_path, {"datamodule": data(benchmark, task)}).suggestion(0, 0)
    assert_same(everything(model), before)
    assert [part.training for part in model.modules()] == modes
    model.lr = twin.lr = suggestion if suggestion is not None else 0.05
    for one in (model, twin):
        learn(one, benchmark, task)
    assert_same(everything(model), everything(twin))


class Bare(pl.LightningModule):
    """The same network and loss without this library."""

    def __init__(self, net: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=self.lr, momentum=0.9)


def test_a_search_finds_what_it_finds_for_a_bare_module_and_the_fit_uses_it(tmp_path: Path) -> None:
    benchmark = stream(steps=20)
    model, bare = module(benchmark, NaiveHParams(), spec=None), Bare(network(benchmark), 0.1)
    results = []
    for one in (model, bare):
        loader = own_loader(benchmark, 0, with_task=False)
        searching = trainer(default_root_dir=tmp_path)
        finder = Tuner(searching).lr_find(one, loader, min_lr=1e-3, max_lr=10, num_training=20)
        assert finder is not None
        results.append(finder.results)
        trainer().fit(one, loader)
    assert results[0] == results[1]
    assert model.lr == bare.lr != 0.1
    assert all(torch.equal(p, q) for p, q in zip(model.net.parameters(), bare.net.parameters(), strict=True))


def test_the_rate_is_in_a_checkpoint_and_decays_from_task_to_task(tmp_path: Path) -> None:
    benchmark, path = stream(), tmp_path / "after.ckpt"
    model = module(benchmark, EWCHParams(lr_decay=0.5))
    model.lr = 0.04
    learn(model, benchmark, 0).save_checkpoint(path)
    again = EWC.load_from_checkpoint(path, net=network(benchmark), optimizer=MOMENTUM)
    assert learn(again, benchmark, 1).optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02)


def test_the_finder_as_a_callback(tmp_path: Path) -> None:
    benchmark = stream(steps=20)
    model = module(benchmark, NaiveHParams())
    finder = LearningRateFinder(min_lr=1e-3, num_training_steps=20)
    new = learn(model, benchmark, 0, callbacks=[finder], default_root_dir=tmp_path)
    assert finder.optimal_lr is not None
    assert model.lr == finder.optimal_lr.suggestion()
    assert new.optimizers[0].param_groups[0]["lr"] == model.lr
    assert model.running_metrics.steps_done == 20


def test_a_method_with_its_own_steps_raises_in_a_search_for_the_rate(tmp_path: Path) -> None:
    benchmark = stream()
    model = module(benchmark, LAMAML)
    with pytest.raises(ValueError, match="lamaml takes its steps itself, so that Lightning's learning-rate"):
        found_rate(model, tmp_path, {"datamodule": data(benchmark, 0)})


def test_a_rate_beside_a_scheduler_raises(tmp_path: Path) -> None:
    def scheduled(params: Any) -> Any:
        optimizer = torch.optim.SGD(params, lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}

    benchmark = stream()
    model = module(benchmark, optimizer=scheduled)
    model.lr = 0.2
    with pytest.raises(ValueError, match=r"module\.lr=0\.2 and a learning-rate scheduler both set"):
        learn(model, benchmark, 0)

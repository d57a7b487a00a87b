"""What training leaves in `trainer.callback_metrics`: the loss, and the penalty that is a part of it."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_lightning import ContinualModule, kernels
from tests.lightning.parts import (
    DERPP,
    ER,
    KCL,
    LFL,
    SI,
    At,
    data,
    float_spec,
    learn,
    module,
    own_loader,
    own_stream,
    stream,
    trainer,
)

EWC = EWCHParams(ewc_lambda=10.0, fisher_samples=None)
MAS = MASHParams(mas_lambda=0.1)
DER = DERHParams(mem_size=9, mem_batch_size=6)
RBF = KCLHParams(core_size=4, kernel_type="rbf", task_given=True)


class Rate:
    """An optimizer factory whose learning rate can be changed between tasks."""

    lr = 0.1

    def __call__(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr)


def by_hand(
    net: nn.Module, loader: Any, anchor: dict[str, Tensor], importance: dict[str, Tensor], strength: float
) -> dict[str, float]:
    """Train with SGD on CE + strength * sum F (p - a)^2; return the means over the last two of six steps."""
    losses, penalties = [], []
    for x, y in loader:
        net.zero_grad()
        terms = [(importance[k] * (p - anchor[k]) ** 2).sum() for k, p in net.named_parameters()]
        penalty = strength * torch.stack(terms).sum()
        loss = F.cross_entropy(net(x), y) + penalty
        loss.backward()
        losses.append(float(loss.detach()))
        penalties.append(float(penalty.detach()))
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(0.1 * p.grad)  # type: ignore[operator]
    return {"train/loss": sum(losses[4:]) / 2, "train/penalty": sum(penalties[4:]) / 2}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(("hparams", "strength"), [(EWC, 5.0), (MAS, 0.1), (SI, 2.0)])
def test_loss_and_penalty_equal_a_loop_written_by_hand(
    hparams: AlgorithmHParams, strength: float, watched: bool, tmp_path: Path
) -> None:
    benchmark = stream()
    model: Any = module(benchmark, hparams, Rate(), spec=None)
    trainer().fit(model, own_loader(benchmark, 0, with_task=False))
    net, loader = copy.deepcopy(model.net), own_loader(benchmark, 1, with_task=False)
    expected = by_hand(net, loader, model.anchor.get(), model.importance.get(), strength)
    new = trainer()
    if watched:
        stop = EarlyStopping("train/penalty", patience=3, check_on_train_epoch_end=True)
        new = trainer(callbacks=[stop], logger=CSVLogger(tmp_path))
    new.fit(model, loader)
    actual = {name: float(new.callback_metrics[name]) for name in expected}
    assert actual == pytest.approx(expected, rel=1e-4)
    assert expected["train/penalty"] > 1e-3
    if watched:
        assert float(stop.best_score) == pytest.approx(expected["train/penalty"], rel=1e-4)
        logged = (Path(new.loggers[0].log_dir or "") / "metrics.csv").read_text()
        assert "train/penalty" in logged


def lfl_by_hand(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return cross-entropy, and lambda/2 times the squared distance of features, with numbers written out."""
    x, y = batch
    with torch.no_grad():
        distance = sum(
            ((model.net.features(one[None]) - model.old.features(one[None])) ** 2).sum() for one in x
        ) / len(x)
        return float(F.cross_entropy(model.net(x), y)), 0.5 * 0.5 * float(distance)


def test_lfls_penalty_is_the_distance_of_features_and_0_in_the_first_task() -> None:
    benchmark, rate = stream(), Rate()
    model = module(benchmark, LFL, rate, spec=None)
    new = trainer()
    new.fit(model, own_loader(benchmark, 0, with_task=False))
    assert float(new.callback_metrics["train/penalty"]) == 0
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(0.1)
    rate.lr, loader, new = 0.0, own_loader(benchmark, 1, with_task=False), trainer()
    kept = copy.deepcopy(model)
    new.fit(model, loader)
    last = [lfl_by_hand(kept, batch) for batch in list(loader)[-2:]]
    loss, penalty = (sum(values) / 2 for values in zip(*last, strict=True))
    assert float(new.callback_metrics["train/penalty"]) == pytest.approx(penalty, rel=1e-5)
    assert float(new.callback_metrics["train/loss"]) == pytest.approx(loss + penalty, rel=1e-5)
    assert penalty > 1e-3


@pytest.mark.parametrize("hparams", [DER, DERPP], ids=lambda hparams: hparams.name)
def test_replay_terms_are_what_is_beside_the_batchs_own_cross_entropy(hparams: AlgorithmHParams) -> None:
    benchmark, rate = stream(), Rate()
    model = module(benchmark, hparams, rate, spec=float_spec(benchmark))
    trainer().fit(model, own_loader(benchmark, 0, with_task=False))
    rate.lr, loader, new = 0.0, own_loader(benchmark, 1, with_task=False), trainer()
    new.fit(model, loader)
    with torch.no_grad():
        expected = sum(float(F.cross_entropy(model.net(x), y)) for x, y in list(loader)[-2:]) / 2
    actual = {name: float(value) for name, value in new.callback_metrics.items()}
    assert actual["train/penalty"] == pytest.approx(actual["train/loss"] - expected, rel=1e-4)
    assert actual["train/penalty"] > 1e-3


def test_kcls_penalty_is_the_divergence_of_the_bases() -> None:
    """Of the posterior from the prior; the logits of the same step are in the loss."""
    benchmark, seen = own_stream(KCL), []
    model = module(benchmark, KCL)
    kl = kernels.gaussian_kl

    def note(p: Any, q: Any) -> Tensor:
        normal = [
            torch.distributions.Normal(g.mean.detach(), (g.log_variance.detach() / 2).exp()) for g in (p, q)
        ]
        seen.append(float(torch.distributions.kl_divergence(*normal).sum()))
        return kl(p, q)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "gaussian_kl", note)
        new = learn(model, benchmark, 0)
    steps = len(seen)
    last = seen[-(steps % 2 or 2) :]
    expected = KCL.tau * sum(last) / len(last)
    assert float(new.callback_metrics["train/penalty"]) == pytest.approx(expected, rel=1e-3)
    rbf = learn(module(own_stream(RBF), RBF), own_stream(RBF), 0)
    assert float(rbf.callback_metrics["train/penalty"]) == 0


@pytest.mark.parametrize("hparams", [NaiveHParams(), ER], ids=lambda hparams: hparams.name)
def test_a_method_that_adds_nothing_has_no_penalty(hparams: AlgorithmHParams) -> None:
    new = learn(module(stream(), hparams), stream(), 0)
    assert {"train/loss", "train/accuracy"} <= new.callback_metrics.keys()
    assert "train/penalty" not in new.callback_metrics


def test_a_resumed_fit_reports_the_same_penalty(tmp_path: Path) -> None:
    def fitted(model: ContinualModule, path: str | None = None, *callbacks: Any) -> dict[str, float]:
        new = trainer(callbacks=list(callbacks))
        new.log_every_n_steps = 50  # type: ignore[attr-defined]  # one report, at the end of the epoch
        new.fit(model, datamodule=data(benchmark, 1), ckpt_path=path)
        return {name: float(value) for name, value in new.callback_metrics.items()}

    benchmark, path = stream(), str(tmp_path / "third.ckpt")
    model, resumed = module(benchmark, EWC), module(benchmark, EWC)
    for one in (model, resumed):
        learn(one, benchmark, 0)
    keep = At(lambda trainer, hook: trainer.save_checkpoint(path), "on_train_batch_end", step=3)
    expected = fitted(model, None, keep)
    assert fitted(resumed, path) == expected
    assert expected["train/penalty"] > 0

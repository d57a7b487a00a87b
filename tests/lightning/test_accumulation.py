"""Accumulated gradients of weighted mean losses: four batches are one batch of all their samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.trees import LeafSpec
from sequel_lightning import ALGORITHMS, Objective
from sequel_lightning.objectives import cross_entropy, token_cross_entropy

CLASSES, LENGTH, SIZE, WINDOW = 4, 5, 6, 4
SGD = partial(torch.optim.SGD, lr=0.1)


class Tagger(nn.Module):
    """Logits of each token, `[B, L, V]`."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, LENGTH * CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x).reshape(len(x), LENGTH, CLASSES)
        return logits


def samples(tokens: bool) -> TensorDataset:
    """Return samples of one window, of which each batch has other classes, or another number of tokens."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(WINDOW * SIZE, 3)))
    if not tokens:
        return TensorDataset(
            x, torch.from_numpy(np.minimum(np.arange(len(x)) // SIZE, rng.integers(0, 4, len(x))))
        )
    y = rng.integers(0, CLASSES, (len(x), LENGTH))
    y[np.arange(LENGTH) >= 1 + np.arange(len(x))[:, None] // SIZE] = -100
    return TensorDataset(x, torch.from_numpy(y))


def trained(
    hparams: AlgorithmHParams,
    objective: Objective,
    net: nn.Module,
    batch_size: int,
    tasks: int = 2,
    **trainer: Any,
) -> dict[str, Tensor]:
    """Return the weights after tasks of one step."""
    data = samples(isinstance(net, Tagger))
    y = data.tensors[1]
    leaf = LeafSpec(tuple(y.shape[1:]), "int64")
    spec = StreamSpec(LeafSpec((3,)), CLASSES, 2, "domain", np.ones((2, CLASSES), bool), y=leaf)
    torch.manual_seed(0)
    module: Any = ALGORITHMS[hparams.name](net.double(), SGD, hparams, spec, objective=objective)
    for _ in range(tasks):
        made = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            precision="64-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **trainer,
        )
        made.fit(module, DataLoader(data, batch_size))
        assert made.global_step == 1
    return {name: p.detach().clone() for name, p in module.net.named_parameters()}


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def tagger() -> nn.Module:
    torch.manual_seed(1)
    return Tagger()


WEIGHTED = cross_entropy(class_weights=(0.2, 3.0, 1.0, 0.5))


@pytest.mark.parametrize(
    ("hparams", "objective", "net"),
    [
        (NaiveHParams(), WEIGHTED, classifier),
        (NaiveHParams(), token_cross_entropy(), tagger),
        (EWCHParams(ewc_lambda=50, fisher_samples=None), WEIGHTED, classifier),
        (ERHParams(memory="task_quota", mem_size=48, mem_batch_size=24), WEIGHTED, classifier),
    ],
    ids=["class weights", "tokens", "ewc", "er"],
)
def test_accumulated_batches_are_one_batch(hparams: AlgorithmHParams, objective: Objective, net: Any) -> None:
    """ER reads nothing in its first task; in the second, each batch has a draw of its own."""
    tasks = 1 if hparams.name == "er" else 2
    whole = trained(hparams, objective, net(), WINDOW * SIZE, tasks)
    parts = trained(hparams, objective, net(), SIZE, tasks, accumulate_grad_batches=WINDOW)
    bare = objective._replace(weight=None)  # the mean of each batch, with equal weights
    equal = trained(hparams, bare, net(), SIZE, tasks, accumulate_grad_batches=WINDOW)
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-10, atol=1e-12)
    assert any((equal[name] - p).abs().max() > 1e-3 for name, p in whole.items())


def test_losses_without_weights_are_lightnings() -> None:
    """The gradients of plain means are those that Lightning adds up, bit for bit."""
    net = classifier()
    expected = trained(NaiveHParams(), cross_entropy(), net, SIZE, accumulate_grad_batches=WINDOW)
    net = classifier().double()
    optimizer, data = SGD(net.parameters()), samples(tokens=False)
    for _ in range(2):
        optimizer.zero_grad()
        for x, y in DataLoader(data, SIZE):
            (nn.functional.cross_entropy(net(x), y) / WINDOW).backward()
        optimizer.step()
    for name, p in net.named_parameters():
        assert torch.equal(expected[name], p)

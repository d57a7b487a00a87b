"""Inputs that are not images, and outputs of another shape, under a plain Trainer."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.trees import LeafSpec
from sequel_lightning import ALGORITHMS, ContinualModule, Naive
from sequel_lightning.networks import blank_input
from tests.lightning.parts import BATCH, CLASSES, KCL, network, own_stream, stream, trainer

# Lightning's remarks on a user's loader, and on a module that is fitted without validation data.
VOCABULARY, LENGTH, WIDTH = 30_002, 8, 4
TOKENS = np.array([30_001, 29_953, 257, 3])  # bfloat16 has no such numbers but 3
SGD = partial(torch.optim.SGD, lr=0.5)


class Words(nn.Module):
    """The mean of the embeddings of tokens `[B, ...]`, and a linear layer, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.bfloat16)
        self.last = nn.Linear(WIDTH, CLASSES, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.table(x.flatten(1)).mean(1))
        return logits


def spec_of_tokens(dtype: str = "int64") -> StreamSpec:
    """Return a spec of sequences."""
    return stream().spec._replace(x=LeafSpec((LENGTH,), dtype))


def tokens() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    count = 4 * BATCH
    return torch.from_numpy(rng.choice(TOKENS, (count, LENGTH))), torch.from_numpy(
        rng.integers(0, CLASSES, count)
    )


def fitted(hparams: AlgorithmHParams, spec: StreamSpec | None) -> tuple[ContinualModule, Words]:
    """Return a module that a Trainer fitted to tokens, and its network as it was before."""
    net = Words()
    before, module = copy.deepcopy(net), ALGORITHMS[hparams.name](net, SGD, hparams, spec)
    x, y = tokens()
    trainer().fit(module, DataLoader(TensorDataset(x, y), batch_size=BATCH))
    return module, before


def rows_that_moved(module: ContinualModule, before: Words) -> Any:
    net: Any = module.net
    return (net.table.weight != before.table.weight).any(1).nonzero().flatten().numpy()


@pytest.mark.parametrize("spec", [None, spec_of_tokens()], ids=["no spec", "spec"])
@pytest.mark.parametrize("hparams", [NaiveHParams(), EWCHParams(ewc_lambda=0)], ids=["naive", "ewc"])
def test_tokens_in_bfloat16_train_as_in_a_loop_by_hand(
    hparams: AlgorithmHParams, spec: StreamSpec | None
) -> None:
    module, net = fitted(hparams, spec)
    changed, optimizer = rows_that_moved(module, net), SGD(net.parameters())
    np.testing.assert_array_equal(changed, np.sort(TOKENS))
    x, y = tokens()
    for rows in torch.arange(len(y)).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    for p, q in zip(module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    if hparams.name == "ewc":
        table: Tensor = module.get_buffer("importance.table/weight")
        np.testing.assert_array_equal(table.any(1).nonzero().flatten().numpy(), np.sort(TOKENS))


def test_a_memory_gives_tokens_back_as_they_came() -> None:
    module, before = fitted(ERHParams(mem_size=2 * BATCH, mem_batch_size=4), spec_of_tokens())
    kept: Tensor = module.get_buffer("memory.x")
    assert kept.dtype == torch.int64
    assert {x.numpy().tobytes() for x in kept} <= {x.numpy().tobytes() for x in tokens()[0]}
    np.testing.assert_array_equal(rows_that_moved(module, before), np.sort(TOKENS))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "bool"])
def test_integers_and_booleans_are_not_cast(dtype: str) -> None:
    module = Naive(Words(), SGD, NaiveHParams(), spec_of_tokens())
    x = torch.tensor([[1, 0, 99]]).to(getattr(torch, dtype))
    actual = module.normalise(x)
    assert actual.dtype == x.dtype
    assert torch.equal(actual, x)
    for other in (torch.float32, torch.bfloat16):
        assert module.normalise(torch.ones(1, LENGTH, dtype=other)).dtype == torch.bfloat16
    assert module.normalise(torch.ones(1, LENGTH, dtype=torch.uint8)).dtype == torch.uint8
    assert blank_input(spec_of_tokens(dtype), torch.zeros(1)).dtype == x.dtype


def test_a_coreset_of_another_dtype_than_the_spec_raises() -> None:
    benchmark = own_stream(KCL)
    spec = benchmark.spec._replace(x=LeafSpec(benchmark.spec.image_shape, "float32"))
    module: Any = ALGORITHMS["kcl"](network(benchmark), SGD, KCL, spec)
    module.coreset.x = module.coreset.x.to(torch.int32)
    x, y = torch.zeros((4, 1, 3, 3), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"the coresets hold int32 images, got uint8; give a spec with"):
        module.keep_coreset(0, x, y)


# -- outputs


class Spread(nn.Module):
    """Logits of every position of a sequence, once a batch has more than one sample."""

    def __init__(self, outputs: int = 6) -> None:
        super().__init__()
        self.last, self.every = nn.Linear(9, outputs), nn.Linear(1, outputs)

    def forward(self, x: Tensor) -> Tensor:
        actual: Tensor = self.last(x.flatten(1)) if len(x) == 1 else self.every(x.flatten(1)[:, :4, None])
        return actual


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_logits_that_are_not_one_row_for_each_sample_raise(scenario: Any) -> None:
    benchmark = stream(scenario=scenario)
    classes = benchmark.num_classes
    module = Naive(Spread(classes), SGD, NaiveHParams(), benchmark.spec)
    x, t = torch.zeros(4, 1, 3, 3), torch.zeros(4, dtype=torch.int64)
    message = re.escape(f"for task indices t [B]; got logits [4, 4, {classes}] and t [4]; reduce a sequence")
    with pytest.raises(ValueError, match=message):
        module(x, t)
    bare = Naive(Spread(classes), SGD, NaiveHParams())
    with pytest.raises(ValueError, match=message):
        bare(x, t)


def test_one_task_index_for_a_whole_batch_and_a_narrow_head_raise() -> None:
    module = Naive(network(stream(scenario="task")), SGD, NaiveHParams(), stream(scenario="task").spec)
    for logits, t, message in (
        (torch.zeros(4, 6), torch.tensor(0), "got logits [4, 6] and t Tensor"),
        (torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64), "got logits [4, 5] and t [4]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            module.masked(logits, t)

"""Networks that `torch.func` cannot follow: their importances are those of a loop over samples.

The loops are written out here: one ordinary backward pass per sample, at the weights that a task ends with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sequel_benchmarks import RotatedDigits
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Batch
from sequel_lightning import ALGORITHMS, EWC, MAS, ContinualModule
from sequel_lightning.algorithms.ewc import diagonal_fisher
from tests.lightning.parts import MCSGD, ONLINE, At, data, own_loader, stream, trainer

# torch's remark on reentrant checkpointing without gradients, for example when the network is tried.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")

SGD = partial(torch.optim.SGD, lr=0.05)


class Rows(nn.Module):
    """A recurrent network over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 5, batch_first=True)
        self.head = nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.gru(x.flatten(1, 2))[0][:, -1])
        return logits


class Dense(nn.Module):
    """Two layers, the second with what a subclass does to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 6), nn.Linear(6, 10)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(torch.tanh(self.first(x.flatten(1)))))
        return logits

    def hidden(self, h: Tensor) -> Tensor:
        return h


class Branching(Dense):
    """Control flow that depends on the data."""

    def hidden(self, h: Tensor) -> Tensor:
        return h if h.sum() > 0 else 2 * h


class Checkpointed(Dense):
    """Activation checkpointing."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def hidden(self, h: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(lambda a: torch.tanh(self.inner(a)), h, use_reentrant=self.reentrant)
        return hidden


class Reentrant(Checkpointed):
    """The older kind of activation checkpointing."""

    reentrant = True


class Counting(Dense):
    """A buffer that counts passes in place."""

    seen: Tensor

    def hidden(self, h: Tensor) -> Tensor:
        self.seen += 1
        return h


class Averaging(Dense):
    """A buffer that is replaced in every pass, in evaluation mode too, and that the outputs depend on."""

    seen: Tensor

    def hidden(self, h: Tensor) -> Tensor:
        self.seen = (0.9 * self.seen + 0.1 * h.mean()).detach()
        return h - self.seen


class Drawing(Dense):
    """Dropout in evaluation mode too."""

    def hidden(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.5, training=True)


class Attending(nn.Module):
    """A transformer over the rows of an image that looks back only."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 10)
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(x.flatten(1, 2), mask=self.mask).mean(1))
        return logits


NETWORKS = (Rows, Branching, Checkpointed, Reentrant, Counting, Averaging, Drawing, Attending)
each_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)


@cache
def digits() -> Benchmark:
    return RotatedDigits(num_tasks=2, subset=21)


def made(network: Callable[[], nn.Module], hparams: AlgorithmHParams, **options: Any) -> ContinualModule:
    torch.manual_seed(0)
    options.setdefault("spec", digits().spec)
    return ALGORITHMS[hparams.name](network().double(), SGD, hparams, **options)


def squared_norm(logits: Tensor, y: Tensor) -> Tensor:
    return logits.square().sum()


def by_hand(
    net: nn.Module,
    batches: list[Batch],
    loss: Callable[[Tensor, Tensor], Tensor],
    of: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return the mean over samples of a function of the gradient; buffers are the same for each sample."""
    net.eval()
    buffers = copy.deepcopy(dict(net.named_buffers()))
    total = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    samples = [(x[None], y[None]) for batch in batches for x, y in zip(batch.x, batch.y, strict=True)]
    for x, y in samples:
        net.zero_grad()
        loss(net(x), y).backward()
        total = {k: total[k] + of(p.grad) for k, p in net.named_parameters() if p.grad is not None}
        net.load_state_dict(buffers, strict=False)
    return {k: f / len(samples) for k, f in total.items()}


def task_batches(module: ContinualModule) -> list[Batch]:
    """Return the first task's samples as its end reads them, normalised."""
    actual = data(digits(), 0).train_dataloader().consolidation_batches()
    return [batch._replace(x=module.normalise(batch.x)) for batch in actual]


@each_network
@pytest.mark.parametrize(
    ("hparams", "loss", "of"),
    [
        (EWCHParams(fisher_samples=None), F.cross_entropy, torch.square),
        (MASHParams(), squared_norm, torch.abs),
    ],
    ids=["ewc", "mas"],
)
def test_importances_are_those_of_a_loop_over_samples(
    network: Any, hparams: AlgorithmHParams, loss: Any, of: Any
) -> None:
    module = made(network, hparams)
    assert isinstance(module, EWC | MAS)
    before: dict[str, Any] = {}

    def note(trainer: Any, hook: str) -> None:
        before.update(rng=torch.get_rng_state(), buffers=copy.deepcopy(dict(module.net.named_buffers())))

    trainer(callbacks=[At(note, "on_train_end")]).fit(module, datamodule=data(digits(), 0))
    assert torch.equal(torch.get_rng_state(), before["rng"])
    for name, buffer in module.net.named_buffers():
        assert torch.equal(buffer, before["buffers"][name])
    expected = by_hand(copy.deepcopy(module.net), task_batches(module), loss, of)
    actual = module.importance.get()
    assert actual.keys() == expected.keys()
    assert max(float(f.max()) for f in actual.values()) > 1e-3
    for name, f in expected.items():
        torch.testing.assert_close(actual[name], f, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("network", [Rows, Reentrant, Counting], ids=lambda network: network.__name__)
def test_mas_with_one_gradient_for_each_batch(network: Any) -> None:
    module = made(network, MASHParams(gradients="batch"))
    assert isinstance(module, MAS)
    trainer().fit(module, datamodule=data(digits(), 0))
    net, batches = copy.deepcopy(module.net).eval(), task_batches(module)
    total = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    for batch in batches:
        net.zero_grad()
        squared_norm(net(batch.x), batch.y).backward()
        total = {k: total[k] + p.grad.abs() for k, p in net.named_parameters() if p.grad is not None}
    for name, f in total.items():
        expected = f / sum(len(batch.y) for batch in batches)
        torch.testing.assert_close(module.importance.get()[name], expected, rtol=1e-10, atol=1e-13)


def test_the_buffers_of_a_pass_count_training_steps_alone() -> None:
    module = made(Counting, EWCHParams())
    net: Any = module.net
    before, steps = float(net.seen), 0
    for task in range(2):
        one = trainer()
        one.fit(module, datamodule=data(digits(), task))
        steps += one.global_step
    assert float(net.seen) == before + steps


def test_a_network_that_changes_after_the_first_batch_is_consolidated() -> None:
    """What the first batch shows is no promise: control flow appears at the end of training."""

    class Changing(Branching):
        branches = False

        def hidden(self, h: Tensor) -> Tensor:
            return super().hidden(h) if self.branches else h

    module = made(Changing, EWCHParams(fisher_samples=None))
    assert isinstance(module, EWC)
    change = At(lambda trainer, hook: setattr(module.net, "branches", True), "on_train_end")
    trainer(callbacks=[change]).fit(module, datamodule=data(digits(), 0))
    expected = by_hand(copy.deepcopy(module.net), task_batches(module), F.cross_entropy, torch.square)
    for name, f in expected.items():
        torch.testing.assert_close(module.importance.get()[name], f, rtol=1e-10, atol=1e-13)


def test_gradients_are_those_at_the_weights_given_and_leave_those_of_the_network() -> None:
    module = made(Rows, EWCHParams())
    other = {k: p + 0.1 for k, p in module.frozen_params().items()}
    batches = [Batch(*batch[:3]) for batch in data(digits(), 0).train_dataloader().consolidation_batches()]
    before = {k: (p.detach().clone(), torch.ones_like(p)) for k, p in module.params().items()}
    for k, p in module.params().items():
        p.grad = before[k][1]
    with torch.enable_grad():
        actual = diagonal_fisher(other, module.eval(), batches, EWCHParams(fisher_samples=None), 0, 0)
    for k, p in module.params().items():
        assert torch.equal(p, before[k][0])
        assert p.grad is before[k][1]
        assert bool((p.grad == 1).all())
    net = copy.deepcopy(module.net)
    net.load_state_dict(other)
    expected = by_hand(net, task_batches(module), F.cross_entropy, torch.square)
    for name, f in expected.items():
        torch.testing.assert_close(actual[name], f, rtol=1e-10, atol=1e-13)


class Pairs(nn.Module):
    """A network that takes no single sample."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            raise RuntimeError("at least two samples")
        logits: Tensor = self.head(x.flatten(1))
        return logits


def test_a_network_without_gradients_of_single_samples_raises_before_training() -> None:
    benchmark = stream()
    for hparams in (EWCHParams(), MASHParams()):
        module = made(Pairs, hparams, spec=None)
        before = copy.deepcopy(module.net.state_dict())
        with pytest.raises(ValueError, match=f"{hparams.name} takes .* batches of one.*at least two"):
            trainer().fit(module, own_loader(benchmark, 0, with_task=False))
        assert all(torch.equal(p, before[k]) for k, p in module.net.state_dict().items())
    module = ALGORITHMS["mas"](Pairs(), SGD, MASHParams(gradients="batch"))
    trainer().fit(module, own_loader(benchmark, 0, with_task=False, batch_size=11))
    assert isinstance(module, MAS)
    assert float(module.importance.get()["head.weight"].sum()) > 0


@pytest.mark.parametrize("hparams", [MCSGD, ONLINE], ids=["offline", "online"])
def test_mcsgd_takes_its_gradients_on_the_lines_with_activation_checkpointing(hparams: Any) -> None:
    """A checkpointed layer computes with the weights that the network holds in the backward pass."""
    ends = []
    for network in (Checkpointed, Plain):
        module = made(network, replace(hparams, lmc_lr=0.05))
        for task in range(2):
            trainer().fit(module, datamodule=data(digits(), task))
        x = task_batches(module)[0].x
        others = module.alternatives(x, torch.zeros(len(x), dtype=torch.long))
        ends.append({**module.frozen_params(), **others})
    assert ends[0].keys() == ends[1].keys()
    for name, p in ends[1].items():
        torch.testing.assert_close(ends[0][name], p, rtol=1e-12, atol=1e-14)


class Plain(Checkpointed):
    """The same without checkpointing."""

    def hidden(self, h: Tensor) -> Tensor:
        return torch.tanh(self.inner(h))


LAMAML = LaMAMLHParams(mem_size=9, mem_batch_size=4, glances=1, sync_update=True)


def test_lamaml_learns_with_a_recurrent_network_and_raises_for_a_checkpointed_one() -> None:
    module = made(Rows, LAMAML)
    before = module.frozen_params()
    trainer().fit(module, datamodule=data(digits(), 0))
    assert all(not torch.equal(p, before[k]) for k, p in module.params().items())
    module = made(Checkpointed, LAMAML)
    before = module.frozen_params()
    with pytest.raises(ValueError, match=r"lamaml takes .*Checkpointed.*leave activation checkpointing out"):
        trainer().fit(module, datamodule=data(digits(), 0))
    assert all(torch.equal(p, before[k]) for k, p in module.params().items())

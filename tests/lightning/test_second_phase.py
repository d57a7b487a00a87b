"""The second training phase, against a hand-written loop with torch's optimizer and scheduler."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from sequel_core.algorithms.gdumb import GDumbHParams
from sequel_core.stream.images import Augmentation
from sequel_core.stream.phase import phase_steps
from sequel_lightning import attach
from tests.lightning.parts import GDUMB, assert_same, everything, learn, module, network, stream

HPARAMS = GDumbHParams(mem_size=9, phase_epochs=9, phase_batch_size=4, phase_lr=0.2, phase_grad_clip=0.5)


def scheduled(hparams: GDumbHParams, optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the learning rate of each epoch as the official code sets it, with torch's scheduler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scheduler's, which counts optimizer steps
        scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=1, T_mult=2, eta_min=hparams.phase_min_lr)
        rates = [0.1 * hparams.phase_lr, hparams.phase_lr]
        while len(rates) < hparams.phase_epochs:
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_learning_rates_are_those_of_torchs_scheduler() -> None:
    hparams = GDumbHParams(phase_epochs=140)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=hparams.phase_lr)
    ours = [hparams.phase_learning_rate(epoch) for epoch in range(140)]
    np.testing.assert_allclose(ours, scheduled(hparams, optimizer), rtol=1e-12)


def test_weights_are_those_of_a_hand_written_loop() -> None:
    benchmark = stream()
    model = module(benchmark, HPARAMS)
    for task in range(2):
        learn(model, benchmark, task)
        net = network(benchmark)  # the initial weights
        optimizer = torch.optim.SGD(net.parameters(), lr=HPARAMS.phase_lr, momentum=0.9, weight_decay=1e-6)
        state: Any = model.state
        memory = state.memory
        steps = phase_steps(HPARAMS, Augmentation(), memory.t.numpy(), task, seed=0)
        rates = np.repeat(scheduled(HPARAMS, optimizer), 3)  # 9 samples are 3 batches
        for slots, rate in zip(steps.slots, rates, strict=True):
            read = torch.from_numpy(slots[slots < 9].astype(np.int64))
            optimizer.zero_grad()
            F.cross_entropy(net(model.normalise(memory.x[read])), memory.y[read].long()).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        for ours, theirs in zip(model.net.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_nothing_is_learned_before_the_second_phase() -> None:
    benchmark = stream()
    model = module(benchmark, GDUMB)
    before, seen = {k: p.clone() for k, p in model.params().items()}, []
    start = model.start_phase

    def start_phase() -> None:
        seen.append({k: torch.equal(p, before[k]) for k, p in model.params().items()})
        start()

    object.__setattr__(model, "start_phase", start_phase)
    learn(model, benchmark, 0)
    assert [all(equal.values()) for equal in seen] == [True]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_checkpoint_of_the_last_epoch_resumes_with_the_second_phase(tmp_path: Path) -> None:
    """A run in a user's own Trainer that is killed within the phase takes the phase again."""
    benchmark = stream()
    straight, killed = module(benchmark, GDUMB), module(benchmark, GDUMB)
    learn(straight, benchmark, 0)

    def fail(step: Any) -> Any:
        if killed.phase_step == 3:
            raise KeyError("killed")
        return take(step)

    take = killed.take_phase_step
    object.__setattr__(killed, "take_phase_step", fail)
    keep = ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(KeyError, match="killed"):
        learn(killed, benchmark, 0, callbacks=[keep], enable_checkpointing=True)
    resumed = module(benchmark, GDUMB)
    options: dict[str, Any] = {"callbacks": [ModelCheckpoint(tmp_path, save_last=True)]}
    options |= {"enable_checkpointing": True, "weights_only": True}
    learn(resumed, benchmark, 0, ckpt_path=str(tmp_path / "last.ckpt"), **options)
    assert_same(everything(resumed), everything(straight))


def test_gdumb_cannot_be_attached() -> None:
    with pytest.raises(AttributeError, match="GDumb cannot be attached"):
        attach.GDumb  # noqa: B018

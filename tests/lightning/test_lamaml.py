"""La-MAML in a Trainer: its own optimizer steps, its errors, and its equations on small arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_lightning import LaMAML
from tests.lightning.parts import (
    ADAM,
    BATCH,
    LAMAML,
    MOMENTUM,
    STEPS,
    At,
    assert_close,
    data,
    learn,
    module,
    network,
    stream,
    trainer,
)

ASYNC = replace(LAMAML, sync_update=False)


@pytest.mark.parametrize("hparams", [LAMAML, ASYNC], ids=["sync", "async"])
def test_a_batch_is_one_step_of_the_trainer(hparams: LaMAMLHParams) -> None:
    model = module(stream(), replace(hparams, glances=3))
    seen: list[int] = []
    note = At(lambda t, _: seen.append(t.global_step), "on_train_batch_end")
    for task in range(2):
        fitted = learn(model, stream(), task, epochs=2, callbacks=[note])
        assert fitted.global_step == 2 * STEPS
    assert seen == 2 * list(range(1, 2 * STEPS + 1))
    assert model.running_metrics.steps_done == 4 * STEPS
    stopped = trainer(None, max_steps=3)
    stopped.fit(model, datamodule=data(stream(), 2))
    assert model.running_metrics.steps_done == 4 * STEPS + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 0.5}, "leave the Trainer's gradient_clip_val out, got 0.5; grad_clip_norm is"),
        ({"accumulate_grad_batches": 2}, "leave the Trainer's accumulate_grad_batches out, got 2"),
    ],
)
def test_a_trainer_that_would_interfere_raises(options: dict[str, Any], message: str) -> None:
    model = module(stream(), LAMAML)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"lamaml takes its steps itself: {message}"):
        learn(model, stream(), 0, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_scheduler_raises() -> None:
    def scheduled(params: Iterable[torch.nn.Parameter]) -> dict[str, Any]:
        optimizer = torch.optim.SGD(params, lr=0.2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}

    with pytest.raises(ValueError, match="lamaml takes its steps itself, without a scheduler; leave it out"):
        learn(module(stream(), LAMAML, scheduled), stream(), 0)


def test_one_inner_step_without_memory_is_sgd_at_the_weights_looked_ahead_to() -> None:
    """theta <- theta - a grad CE(theta - a grad CE(theta)), batch by batch, with a fixed rate a."""
    benchmark = stream()
    settings: dict[str, Any] = {"mem_size": 0, "glances": 1, "n_inner_updates": 1, "learn_lr": False}
    settings |= {"alpha_init": 0.3, "grad_clip_norm": None, "inner_clip": None}
    model = module(benchmark, LaMAMLHParams(**settings))
    by_hand, norm = network(benchmark), benchmark.normalisation
    learn(model, benchmark, 0)
    for x, y, _ in data(benchmark, 0).train_dataloader():
        images = (x.float() / 255 - norm.mean[0]) / norm.std[0]
        theta = [p.detach().clone() for p in by_hand.parameters()]
        for start in (theta, theta):
            loss = F.cross_entropy(by_hand(images), y)
            gradient = torch.autograd.grad(loss, list(by_hand.parameters()))
            with torch.no_grad():
                for p, old, g in zip(by_hand.parameters(), start, gradient, strict=True):
                    p.copy_(old - 0.3 * g)
    assert_close(model, by_hand)


def test_the_optimizer_has_no_part_in_asynchronous_updates() -> None:
    ends = []
    for optimizer in (MOMENTUM, ADAM):
        model = module(stream(), ASYNC, optimizer)
        learn(model, stream(), 0)
        ends.append(model)
    for a, b in zip(ends[0].net.parameters(), ends[1].net.parameters(), strict=True):
        assert torch.equal(a, b)
    fixed = module(stream(), replace(ASYNC, learn_lr=False, lr_alpha=0.3))
    learn(fixed, stream(), 0)
    assert isinstance(fixed, LaMAML)
    assert {float(a.min()) for a in fixed.state.rates.values()} == {float(np.float32(0.15))}
    assert isinstance(ends[0], LaMAML)
    assert any((a != 0.15).any() for a in ends[0].state.rates.values())
    assert len(ends[0].state.memory.y) == 9
    assert BATCH * STEPS > 9

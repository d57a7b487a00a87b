"""KCL in a Trainer: coresets, resuming within a task, tuners, and errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner.tuning import Tuner
from torch import nn

from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.hparams import TrainingHParams
from sequel_core.runs.learner import FitMonitor
from sequel_core.stream.benchmark import Benchmark
from sequel_lightning import KCL, LightningLearner
from sequel_lightning.consolidation import CONSOLIDATED, IDLE, TRAINING
from sequel_lightning.kernels import solve
from tests.lightning.parts import (
    ADAM,
    BATCH,
    MOMENTUM,
    STEPS,
    At,
    arrays,
    assert_same,
    data,
    everything,
    float_spec,
    learn,
    module,
    own_loader,
    own_stream,
    position,
    stream,
    trainer,
)
from tests.lightning.parts import KCL as RFF

RBF = replace(RFF, kernel_type="rbf", d_rn_f=1024)
EPOCHS = 2
HOOKS = ("on_train_batch_end", "on_train_epoch_end", "on_train_end")


def made(benchmark: Benchmark, hparams: KCLHParams = RFF, optimizer: Any = MOMENTUM, **options: Any) -> KCL:
    actual = module(benchmark, hparams, optimizer, **options)
    assert isinstance(actual, KCL)
    return actual


def fail(trainer: pl.Trainer, hook: str) -> None:
    raise RuntimeError(hook)


@pytest.mark.parametrize(
    ("hparams", "optimizer"),
    [
        pytest.param(replace(RFF, reset_optimizer=False), MOMENTUM, id="rff carry"),
        pytest.param(replace(RFF, lr_decay=0.8), ADAM, id="rff adam", marks=pytest.mark.slow),
        pytest.param(RBF, MOMENTUM, id="rbf", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("task", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_resume_at_any_moment_is_bit_identical(
    hparams: KCLHParams, optimizer: Any, task: int, tmp_path: Path
) -> None:
    benchmark = own_stream(hparams, validation=6)
    saved: list[str] = []

    def save(trainer: pl.Trainer, hook: str) -> None:
        saved.append(str(tmp_path / f"{len(saved):02d}-{hook}-{trainer.global_step}.ckpt"))
        trainer.save_checkpoint(saved[-1])

    straight = made(benchmark, hparams, optimizer)
    for before in range(task):
        learn(straight, benchmark, before, EPOCHS)
    learn(straight, benchmark, task, EPOCHS, callbacks=[At(save, *HOOKS)])
    expected = everything(straight)
    assert len(saved) > EPOCHS * STEPS
    plain = torch.load(saved[0], weights_only=True)["state_dict"]
    assert {"_extra_state", "coreset.x", "kcl.lmd"} <= plain.keys()
    assert "noise" not in plain
    for path in saved:
        resumed = made(benchmark, hparams, optimizer)
        learn(resumed, benchmark, task, EPOCHS, ckpt_path=path)
        assert_same(everything(resumed), expected)


@pytest.mark.parametrize("hparams", [RFF, RBF], ids=["rff", "rbf"])
def test_a_search_and_a_dry_run_leave_no_trace(hparams: KCLHParams, tmp_path: Path) -> None:
    benchmark = own_stream(hparams)
    model, twin = made(benchmark, hparams), made(benchmark, hparams)
    for task in range(2):
        before = everything(model)
        search = trainer(default_root_dir=tmp_path)
        Tuner(search).lr_find(model, datamodule=data(benchmark, task), update_attr=False, num_training=5)
        assert_same(everything(model), before)
        learn(model, benchmark, task)
        learn(twin, benchmark, task)
        assert_same(everything(model), everything(twin))
    before = everything(model)["tensors"]
    learn(model, benchmark, 2, fast_dev_run=3)
    after = everything(model)["tensors"]
    changed = {k for k, v in before.items() if not torch.equal(after[k], v)}
    assert changed
    assert all(k.startswith(("net.", "kcl.")) for k in changed)
    assert after["kcl.lmd"][2] != before["kcl.lmd"][2]
    assert position(model) == (1, CONSOLIDATED)


def test_own_coresets_train_as_those_of_the_tasks_do() -> None:
    """The user's loaders have float images; so has the memory, as the spec says."""
    benchmark = own_stream(RFF)
    model, twin = (made(benchmark, spec=float_spec(benchmark)) for _ in range(2))
    for k, task in enumerate(benchmark.tasks[:2]):
        assert task.coreset is not None
        x, y, _ = task.coreset.take(np.arange(4))
        images = model.normalise(torch.from_numpy(x).movedim(-1, 1))
        model.keep_coreset(k, images, torch.from_numpy(y))
        trainer().fit(model, own_loader(benchmark, k, with_task=True))
        twin.keep_coreset(k, torch.from_numpy(x).movedim(-1, 1), torch.from_numpy(y))  # as uint8
        trainer().fit(twin, own_loader(benchmark, k, with_task=True))
        kept = model.state.coreset
        torch.testing.assert_close(kept.x[4 * k : 4 * k + 4], images)
        assert kept.t.tolist() == [j if j <= k else -1 for j in range(3) for _ in range(4)]
    assert_same(everything(model), everything(twin))


def test_a_task_without_a_coreset_raises_and_leaves_no_trace() -> None:
    benchmark = own_stream(RFF)
    plain = stream(steps=STEPS + 3)
    model, twin = made(benchmark), made(benchmark)
    before = everything(model)
    with pytest.raises(ValueError, match=r"got task 0 without one; iterate over hparams.training_tasks"):
        learn(model, plain, 0)
    with pytest.raises(ValueError, match=r"needs a coreset of task 0; call module.keep_coreset\(0, x, y\)"):
        trainer().fit(model, own_loader(plain, 0, with_task=False))
    assert position(model) == (-1, IDLE)
    assert_same(everything(model), before)
    for each in (model, twin):
        learn(each, benchmark, 0)
    assert_same(everything(model), everything(twin))


def test_coresets_that_do_not_fit_raise() -> None:
    benchmark = own_stream(RFF)
    model = made(benchmark)
    x, y, _ = arrays(benchmark, 0)
    with pytest.raises(ValueError, match=r"must have core_size=4 samples, got 3 with 3 labels"):
        model.keep_coreset(0, x[:3], y[:3])
    with pytest.raises(ValueError, match=r"task must be >= 0 and < 3, got 3"):
        model.keep_coreset(3, x[:4], y[:4])
    with pytest.raises(ValueError, match=r"hold uint8 images, got float32; give a spec with"):
        model.keep_coreset(0, x[:4], y[:4])
    with pytest.raises(ValueError, match=r"must have core_size=4 samples, got 8 in task 0; iterate over"):
        learn(model, own_stream(replace(RFF, core_size=8), steps=15), 0)
    with pytest.raises(ValueError, match=r"needs the stream's spec, got None"):
        made(benchmark, spec=None)
    assert (model.state.coreset.t == -1).all()


def test_a_network_without_features_raises() -> None:
    benchmark = own_stream(RFF)
    with pytest.raises(ValueError, match=r"kcl needs a network with a method features\(x\)"):
        KCL(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), MOMENTUM, RFF, benchmark.spec)


def test_an_exception_within_a_task_keeps_its_coreset() -> None:
    benchmark = own_stream(RFF)
    model = made(benchmark)
    with pytest.raises(RuntimeError, match="on_train_batch_end"):
        learn(model, benchmark, 0, callbacks=[At(fail, "on_train_batch_end", step=3)])
    assert position(model) == (0, TRAINING)
    kept = model.state.coreset.x.clone()
    learn(model, stream(steps=STEPS + 3), 0)  # continues, because the coreset is there
    assert position(model) == (0, CONSOLIDATED)
    assert torch.equal(model.state.coreset.x, kept)


def test_lower_precision_solves_in_the_precision_of_the_weights() -> None:
    benchmark = own_stream(RFF)
    model = made(benchmark)
    learn(model, benchmark, 0, precision="bf16-mixed")
    assert model.kcl.lmd.dtype == torch.float32
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_own_parameters_move_with_the_module_and_are_no_memory() -> None:
    benchmark = own_stream(RBF)
    model = made(benchmark, RBF)
    assert {"kcl.lmd", "kcl.gain", "kcl.offset"} <= dict(model.named_parameters()).keys()
    assert model.memory_bytes() == 3 * 4 * (9 + 4 + 4)
    assert {p.device.type for p in model.to("meta").kcl.parameters()} == {"meta"}
    settings = TrainingHParams(batch_size=BATCH)
    fitted = LightningLearner(made(benchmark, RBF), settings, trainer={"accelerator": "cpu"})
    fitted.fit_task(benchmark.tasks[0], FitMonitor(lambda progress: None, lambda: None))
    assert len(fitted.memory_samples().y) == 4


def test_weights_of_16_bits_have_a_solution() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 4))
    kernel, targets = (torch.tensor(a, dtype=torch.bfloat16) for a in (rows @ rows.T / 4, np.eye(6)[:, :3]))
    actual = solve(kernel, torch.tensor(0.5, dtype=torch.bfloat16), targets)
    assert actual.dtype == torch.bfloat16
    matrix = kernel.double().numpy() + 0.5 * np.eye(6)
    expected = np.linalg.solve(matrix, targets.double().numpy())
    np.testing.assert_allclose(actual.double().numpy(), expected, atol=0.04)

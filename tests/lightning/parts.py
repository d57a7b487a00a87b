"""Parts of the Lightning plug-in's tests: a tiny stream, modules, Trainers, and exact comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.bic import BiCHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.er_ace import ERACEHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.gdumb import GDumbHParams
from sequel_core.algorithms.gem import GEMHParams
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.algorithms.joint import JointHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.lwf import LwFHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.mir import MIRHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.algorithms.stable_sgd import StableSGDHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.benchmark import Benchmark, Scenario, StreamSpec
from sequel_core.stream.images import Normalisation
from sequel_core.stream.task import Split, Task
from sequel_core.stream.trees import LeafSpec
from sequel_lightning import ALGORITHMS, MLP, ContinualModule, TaskDataModule, initialise
from sequel_lightning.optimizers import OptimizerFactory

BATCH, STEPS, SIDE, CLASSES = 4, 5, 3, 4
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)

SI = SIHParams(si_lambda=2.0, xi=0.01)
LFL = LFLHParams(lfl_lambda=0.5)
KCL = KCLHParams(core_size=4, d_rn_f=16, task_given=True)
AGEM = AGEMHParams(mem_size=24, mem_batch_size=6)  # two of each class of each task
ER = ERHParams(mem_size=9, mem_batch_size=6)  # full within the first task
DERPP = DERppHParams(mem_size=9, mem_batch_size=6, memory="class_balanced")
MCSGD = MCSGDHParams(per_task_memory_samples=6, lmc_batch_size=4, lmc_lr=0.1)
ONLINE = replace(MCSGD, lmc_policy="online")
LAMAML = LaMAMLHParams(mem_size=9, mem_batch_size=6, glances=2, sync_update=True, lr_alpha=0.05)
BIC = BiCHParams(mem_size=12, val_fraction=0)  # without a correction: no samples are set aside
GDUMB = GDumbHParams(mem_size=9, phase_epochs=2, phase_batch_size=4)
ICARL = ICaRLHParams(mem_size=12)
EVERY: tuple[AlgorithmHParams, ...] = (
    NaiveHParams(),
    JointHParams(),
    EWCHParams(ewc_lambda=10.0),
    SI,
    MASHParams(mas_lambda=0.1),
    LFL,
    LwFHParams(),
    KCL,
    StableSGDHParams(),
    AGEM,
    GEMHParams(mem_size=12),
    ER,
    ERACEHParams(mem_size=9, mem_batch_size=6),
    DERHParams(mem_size=9, mem_batch_size=6),
    DERPP,
    BIC,
    GDUMB,
    ICARL,
    MIRHParams(mem_size=9, mem_batch_size=4, num_candidates=6),
    MCSGD,
    ONLINE,
    LAMAML,
)
STATEFUL = (
    SI,
    LFL,
    AGEM,
    ER,
    DERPP,
    BIC,
    GDUMB,
    ICARL,
    MCSGD,
    ONLINE,
    LAMAML,
)  # they keep more than importances
every_algorithm = pytest.mark.parametrize("hparams", EVERY, ids=lambda hparams: hparams.name)


def stream(
    num_tasks: int = 3, scenario: Scenario = "domain", validation: int = 0, steps: int = STEPS
) -> Benchmark:
    """Noisy images whose brightest pixel marks the class; the tasks differ in which pixel that is.

    In the task and class scenarios every task has two of the classes, else all. Two samples fill no batch.
    """
    rng = np.random.default_rng(1)
    shared = scenario == "domain"
    per_task = CLASSES if shared else 2
    tasks = []
    for t in range(num_tasks):
        classes = np.arange(per_task) + (0 if shared else t * per_task)
        splits = []
        for n in (BATCH * steps + 2, validation, 23):
            labels = rng.choice(classes, n)
            images = rng.integers(0, 200, (n, SIDE * SIDE), dtype=np.uint8)
            images[np.arange(n), (labels + t) % (SIDE * SIDE)] += 55
            splits.append(Split(images.reshape(n, SIDE, SIDE, 1), labels, t))
        train, held_out, test = splits
        tasks.append(
            Task(t, f"task {t}", tuple(classes.tolist()), train=train, test=test, validation=held_out)
        )
    num_classes = CLASSES if shared else per_task * num_tasks
    return Benchmark("tiny", tuple(tasks), num_classes, scenario, Normalisation((0.4,), (0.25,)))


def own_stream(hparams: AlgorithmHParams, **options: Any) -> Benchmark:
    """Return the stream; for KCL longer, and with the tasks it trains on: core_size samples fewer each."""
    if not isinstance(hparams, KCLHParams):
        return stream(**options)
    longer = stream(**{"steps": STEPS + 3, **options})
    return replace(longer, tasks=tuple(hparams.training_tasks(longer)))


def network(benchmark: Benchmark) -> nn.Module:
    return initialise(MLP((8,), benchmark.num_classes, image_shape=benchmark.image_shape), seed=0)


def float_spec(benchmark: Benchmark) -> StreamSpec:
    """Return the spec for a user's own loaders, whose images are floats."""
    return benchmark.spec._replace(x=LeafSpec(benchmark.spec.image_shape, "float32"))


def arrays(benchmark: Benchmark, task: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a task's training samples as a user might hold them: normalised floats, labels, task indices."""
    split = benchmark.tasks[task].train
    x, y, t = (torch.from_numpy(a) for a in split.take(np.arange(len(split))))
    mean, std = benchmark.normalisation.mean[0], benchmark.normalisation.std[0]
    return ((x.float() / 255 - mean) / std).movedim(-1, 1), y, t


def own_loader(benchmark: Benchmark, task: int, with_task: bool, batch_size: int = BATCH) -> DataLoader[Any]:
    x, y, t = arrays(benchmark, task)
    dataset = TensorDataset(x, y, t) if with_task else TensorDataset(x, y)
    return DataLoader(dataset, batch_size=batch_size, drop_last=False)


def module(
    benchmark: Benchmark,
    hparams: AlgorithmHParams | None = None,
    optimizer: OptimizerFactory = MOMENTUM,
    **options: Any,
) -> ContinualModule:
    hparams = hparams or EWCHParams(ewc_lambda=10.0)
    options.setdefault("spec", benchmark.spec)
    return ALGORITHMS[hparams.name](network(benchmark), optimizer, hparams, **options)


def trainer(epochs: int | None = 1, **options: Any) -> pl.Trainer:
    options = {"logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
        **options,
    )


def data(benchmark: Benchmark, task: int, **options: Any) -> TaskDataModule:
    return TaskDataModule(benchmark.tasks[task], BATCH, **options)


def learn(
    model: ContinualModule,
    benchmark: Benchmark,
    task: int,
    epochs: int = 1,
    ckpt_path: str | None = None,
    **options: Any,
) -> pl.Trainer:
    """Fit one task with a new Trainer and return the Trainer."""
    weights_only = options.pop("weights_only", None)
    new = trainer(epochs, **options)
    new.fit(model, datamodule=data(benchmark, task), ckpt_path=ckpt_path, weights_only=weights_only)
    return new


def everything(model: ContinualModule) -> dict[str, Any]:
    """Return copies of all that a module carries from step to step and from task to task."""
    carried = model.lifecycle.carried_optimizer or {"state": {}, "param_groups": []}
    momenta = {f"{i}/{k}": torch.as_tensor(v) for i, s in carried["state"].items() for k, v in s.items()}
    tensors = {k: v.detach().clone() for k, v in {**model.state_dict(), **momenta}.items()}
    groups = [{k: v for k, v in g.items() if k != "params"} for g in carried["param_groups"]]
    return {"tensors": tensors, "groups": groups, "steps_done": model.running_metrics.steps_done}


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["tensors"].keys() == expected["tensors"].keys()
    differ = [k for k, v in expected["tensors"].items() if not torch.equal(actual["tensors"][k], v)]
    assert differ == []
    assert actual["groups"] == expected["groups"]
    assert actual["steps_done"] == expected["steps_done"]


def assert_close(actual: ContinualModule, expected: ContinualModule | nn.Module) -> None:
    """Compare the weights with those of another module or of a network that was trained by hand."""
    net = expected.net if isinstance(expected, ContinualModule) else expected
    for (name, p), q in zip(actual.net.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=f"{name} differs")


def position(model: ContinualModule) -> tuple[int, int]:
    """Return the task's index and the phase."""
    return int(model.task_index), int(model.phase)


def counted(model: ContinualModule) -> list[int]:
    """Make a module note the task of every end-of-task work in the list that is returned."""
    calls: list[int] = []
    original = model.end_task

    def end_task(batches: Any) -> None:
        calls.append(int(model.task_index))
        original(batches)

    object.__setattr__(model, "end_task", end_task)
    return calls


class At(Callback):
    """Calls a function in the hooks that are named, for every step or for one step (from 1) of the fit."""

    def __init__(self, act: Callable[[pl.Trainer, str], None], *hooks: str, step: int | None = None) -> None:
        for name in hooks:
            setattr(self, name, partial(self._act, act, name, step))

    @staticmethod
    def _act(
        act: Callable[[pl.Trainer, str], None],
        name: str,
        step: int | None,
        trainer: pl.Trainer,
        *_: Any,
        **__: Any,
    ) -> None:
        if step is None or trainer.global_step == step:
            act(trainer, name)

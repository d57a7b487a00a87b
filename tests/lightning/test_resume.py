"""A checkpoint of any moment of a task, loaded into a fresh module, ends as if nothing had happened."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, ReplayHParams
from sequel_core.stream.images import Augmentation
from sequel_lightning import ALGORITHMS, CNN, ContinualModule, initialise
from sequel_lightning.optimizers import OptimizerFactory
from tests.lightning.parts import (
    ADAM,
    AGEM,
    BATCH,
    DERPP,
    ER,
    ICARL,
    LAMAML,
    LFL,
    MCSGD,
    MOMENTUM,
    ONLINE,
    SI,
    STEPS,
    At,
    assert_same,
    counted,
    everything,
    learn,
    module,
    own_loader,
    stream,
    trainer,
)

EPOCHS = 2
# Not on_train_epoch_start: resuming from there, Lightning 2.6 leaves out the epoch, from the second one on.
HOOKS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end")


@pytest.mark.parametrize("task", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize(
    ("hparams", "optimizer", "validation"),
    [
        (NaiveHParams(lr_decay=0.8), MOMENTUM, 0),
        (NaiveHParams(lr_decay=0.8, reset_optimizer=False), ADAM, 6),
        (EWCHParams(ewc_lambda=10.0, lr_decay=0.8, reset_optimizer=False), MOMENTUM, 6),
        (EWCHParams(ewc_lambda=10.0, lr_decay=0.8), ADAM, 0),
        (SI, MOMENTUM, 6),
        (replace(SI, lr_decay=0.8, reset_optimizer=False), ADAM, 0),
        (replace(LFL, reset_optimizer=False), MOMENTUM, 6),
        (replace(AGEM, lr_decay=0.8), ADAM, 0),
        (replace(ER, reset_optimizer=False), MOMENTUM, 0),
        (DERPP, MOMENTUM, 6),
        (replace(ICARL, lr_decay=0.8, reset_optimizer=False), MOMENTUM, 6),
        (replace(MCSGD, lmc_start="w_bar", reset_optimizer=False), MOMENTUM, 0),
        (ONLINE, ADAM, 6),
        (replace(LAMAML, reset_optimizer=False), ADAM, 6),
    ],
    ids=[
        "naive-momentum-reset",
        "naive-adam-carry-validation",
        "ewc-momentum-carry-validation",
        "ewc-adam-reset",
        "si-momentum-reset-validation",
        "si-adam-carry",
        "lfl-momentum-carry-validation",
        "agem-ring-adam-reset",
        "er-reservoir-momentum-carry",
        "derpp-class_balanced-momentum-reset-validation",
        "icarl-momentum-carry-validation",
        "mcsgd-offline-momentum-carry",
        "mcsgd-online-adam-reset-validation",
        "lamaml-adam-carry-validation",
    ],
)
def test_resume_at_any_moment_is_bit_identical(
    hparams: AlgorithmHParams, optimizer: OptimizerFactory, validation: int, task: int, tmp_path: Path
) -> None:
    benchmark = stream(validation=validation)
    saved: list[str] = []

    def save(trainer: pl.Trainer, hook: str) -> None:
        saved.append(str(tmp_path / f"{len(saved):02d}-{hook}-{trainer.global_step}.ckpt"))
        trainer.save_checkpoint(saved[-1])

    straight = module(benchmark, hparams, optimizer)
    for before in range(task):
        learn(straight, benchmark, before, EPOCHS)
    last = learn(straight, benchmark, task, EPOCHS, callbacks=[At(save, *HOOKS)])
    save(last, "after_fit")
    expected = everything(straight)
    later = STEPS + 3 if hparams.name == "icarl" else STEPS  # 22 samples, and 12 exemplars
    assert expected["steps_done"] == EPOCHS * (STEPS + task * later)
    if isinstance(hparams, ReplayHParams):
        plain = torch.load(saved[-1], weights_only=True)["state_dict"]
        assert {"_extra_state", "memory.x", "memory.y", "memory.t"} <= plain.keys()

    for path in saved:
        resumed = module(benchmark, hparams, optimizer)
        calls = counted(resumed)
        learn(resumed, benchmark, task, EPOCHS, ckpt_path=path)
        try:
            assert_same(everything(resumed), expected)
            assert calls == ([] if "after_fit" in path else [task])
        except AssertionError as error:
            raise AssertionError(f"resumed from {Path(path).name}") from error


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_checkpoints_of_model_checkpoint_are_plain_and_carry_the_stream_on(tmp_path: Path) -> None:
    """Every step's checkpoint loads with weights_only; the next task, too, ends as if uninterrupted."""
    hparams = EWCHParams(ewc_lambda=10.0, lr_decay=0.8, reset_optimizer=False)
    benchmark = stream(validation=6)
    straight = module(benchmark, hparams, ADAM)
    learn(straight, benchmark, 0)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    learn(straight, benchmark, 1, callbacks=[keep], enable_checkpointing=True)
    learn(straight, benchmark, 2)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == STEPS
    for path in paths:
        plain = torch.load(path, weights_only=True)
        assert plain["sequel"]["steps_done"] == STEPS + plain["global_step"]
        assert {"anchor.head/weight", "importance.head/weight", "task_index", "phase"} <= plain[
            "state_dict"
        ].keys()
        resumed = module(benchmark, hparams, ADAM)
        again = ModelCheckpoint(tmp_path, filename="again-{step}", every_n_train_steps=1)
        learn(
            resumed,
            benchmark,
            1,
            ckpt_path=str(path),
            weights_only=True,
            callbacks=[again],
            enable_checkpointing=True,
        )
        learn(resumed, benchmark, 2)
        assert_same(everything(resumed), everything(straight))


def test_resume_where_validation_runs_within_the_epoch(tmp_path: Path) -> None:
    benchmark = stream(validation=6)
    straight = module(benchmark, optimizer=ADAM)
    saved: list[str] = []

    def save(trainer: pl.Trainer, hook: str) -> None:
        saved.append(str(tmp_path / f"{len(saved):02d}-{hook}.ckpt"))
        trainer.save_checkpoint(saved[-1])

    options: dict[str, Any] = {"val_check_interval": 2, "num_sanity_val_steps": 0}
    learn(
        straight,
        benchmark,
        0,
        EPOCHS,
        callbacks=[At(save, "on_validation_end", "on_train_batch_end")],
        **options,
    )
    assert len(saved) == EPOCHS * (STEPS + STEPS // 2)
    for path in saved:
        resumed = module(benchmark, optimizer=ADAM)
        learn(resumed, benchmark, 0, EPOCHS, ckpt_path=path, **options)
        assert_same(everything(resumed), everything(straight))


@pytest.mark.parametrize("hparams", [NaiveHParams(), LFL, ER], ids=lambda hparams: hparams.name)
def test_resume_with_augmentation_and_batch_statistics(hparams: AlgorithmHParams, tmp_path: Path) -> None:
    """Crops and running statistics go on where they were; a dry run moves only the network."""
    benchmark = replace(stream(validation=6), augmentation=Augmentation(1, flip=True))
    saved: list[str] = []

    def save(trainer: pl.Trainer, hook: str) -> None:
        saved.append(str(tmp_path / f"{len(saved):02d}-{hook}-{trainer.global_step}.ckpt"))
        trainer.save_checkpoint(saved[-1])

    def fresh() -> ContinualModule:
        net = CNN((3,), linear_widths=(), norm="batch", num_classes=4, image_shape=benchmark.image_shape)
        return ALGORITHMS[hparams.name](initialise(net, seed=0), MOMENTUM, hparams, benchmark.spec)

    straight = fresh()
    learn(straight, benchmark, 0)
    learn(straight, benchmark, 1, callbacks=[At(save, "on_train_batch_end")])
    expected = everything(straight)
    seen = int(expected["tensors"]["_extra_state"][0])
    assert seen == 2 * STEPS * BATCH
    assert len(saved) == STEPS
    for path in saved:
        resumed = fresh()
        learn(resumed, benchmark, 1, ckpt_path=path)
        assert_same(everything(resumed), expected)
    learn(straight, benchmark, 2, fast_dev_run=3)
    after = everything(straight)["tensors"]
    changed = {name for name, value in expected["tensors"].items() if not torch.equal(after[name], value)}
    assert "net.norm_0.running_mean" in changed
    assert all(name.startswith("net.") for name in changed)


def test_a_plain_loader_that_continues_within_an_epoch_warns(tmp_path: Path) -> None:
    """It begins the epoch anew, which Lightning says; our own data module does not, and nothing is said."""
    benchmark, path = stream(), tmp_path / "within.ckpt"
    save = At(lambda trainer, hook: trainer.save_checkpoint(path), "on_train_batch_end", step=STEPS + 2)
    loader = own_loader(benchmark, 0, with_task=False)
    trainer(EPOCHS, callbacks=[save]).fit(module(benchmark, NaiveHParams()), loader)
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        trainer(EPOCHS).fit(module(benchmark, NaiveHParams()), loader, ckpt_path=path)
    learn(module(benchmark, NaiveHParams()), benchmark, 0, EPOCHS, ckpt_path=str(path))

"""A checkpoint of any moment of a task, loaded into a fresh module, ends as if nothing had happened."""

from pathlib import Path

import pytest
import pytorch_lightning as pl

from sequel_core.hparams import AlgorithmHParams, EWCHParams, NaiveHParams
from sequel_lightning.module import OptimizerFactory
from tests.lightning.parts import (
    ADAM,
    MOMENTUM,
    STEPS,
    At,
    assert_same,
    counted,
    everything,
    learn,
    module,
    stream,
)

EPOCHS = 2
# Not on_train_epoch_start: resuming from there, Lightning 2.6 leaves out the epoch, from the second one on.
HOOKS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end")


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize(
    ("hparams", "optimizer", "validation"),
    [
        (NaiveHParams(lr_decay=0.8), MOMENTUM, 0),
        (NaiveHParams(lr_decay=0.8, reset_optimizer=False), ADAM, 6),
        (EWCHParams(ewc_lambda=10.0, lr_decay=0.8, reset_optimizer=False), MOMENTUM, 6),
        (EWCHParams(ewc_lambda=10.0, lr_decay=0.8), ADAM, 0),
    ],
    ids=[
        "naive-momentum-reset",
        "naive-adam-carry-validation",
        "ewc-momentum-carry-validation",
        "ewc-adam-reset",
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
    assert expected["steps_done"] == (task + 1) * EPOCHS * STEPS

    for path in saved:
        resumed = module(benchmark, hparams, optimizer)
        calls = counted(resumed)
        learn(resumed, benchmark, task, EPOCHS, ckpt_path=path)
        try:
            assert_same(everything(resumed), expected)
            assert calls == ([] if "after_fit" in path else [task])
        except AssertionError as error:
            raise AssertionError(f"resumed from {Path(path).name}") from error

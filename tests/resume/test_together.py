"""Runs at once that are killed with SIGKILL and resumed are bit-identical to uninterrupted ones."""

import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.hparams import OptimizerHParams, TrainingHParams
from sequel_core.testing.resume import assert_same_end, tensors
from sequel_flax import MLP, make_learner, run_together
from tests.resume.short_runs import CHECKPOINT, Moments, count, start, stream

HPARAMS = DERppHParams(mem_size=25, mem_batch_size=6, lr_decay=0.7, reset_optimizer=False)


def job(folder: Path, kill_at: int | None, results: Any) -> None:
    """Start or resume four runs at once, of which one diverges; kill the process at a moment."""
    moments = Moments(kill_at)
    count(moments)
    benchmark = stream()
    learners = [
        make_learner(
            replace(HPARAMS, alpha=alpha),
            MLP((12,), benchmark.num_classes, dropout=0.2),
            OptimizerHParams(lr=rate, momentum=0.9),
            benchmark,
            TrainingHParams(batch_size=5, seed=seed, epochs_per_task=2, log_every_n_steps=5),
        )
        for seed, (alpha, rate) in enumerate([(0.1, 0.05), (0.2, 0.03), (0.3, 1e30), (0.5, 0.04)])
    ]
    folders = [folder / str(k) for k in range(4)]
    run_together(
        learners, benchmark, folders, progress=False, resume="auto", evaluate_every=6, checkpoint=CHECKPOINT
    )
    for learner, path in zip(learners, folders, strict=True):
        arrays: dict[str, Any] = dict(tensors(learner))
        np.savez(path.with_suffix(".npz"), **arrays)
    results.put(moments.count)


@pytest.mark.slow
def test_runs_at_once_that_are_killed_and_resumed(tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    code, moments = start(straight, None, target=job)
    assert code == 0
    for moment in random.Random(0).sample(range(moments // 10, moments), 5):
        folder = tmp_path / f"killed_{moment}"
        assert start(folder, moment, target=job) == (-signal.SIGKILL, 0)
        assert start(folder, None, target=job)[0] == 0
        for k in (0, 1, 3):
            assert_same_end(folder / str(k), straight / str(k))

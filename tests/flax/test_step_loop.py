"""Algorithms in plain loops, their optimizers across tasks, and the number of compilations."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from sequel_core import run
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.joint import JointHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, PhaseHParams
from sequel_core.runs.learner import FitMonitor, Progress
from sequel_flax import ALGORITHMS, ewc
from sequel_flax.optimizers import get_learning_rate
from tests.flax.parts import (
    BATCH,
    EVERY,
    EWC,
    KCL,
    SILENT,
    STEPS,
    flat,
    learner,
    rotated,
    same,
    settings,
    sgd,
    stream_for,
    user_loop,
)
from tests.quick import some

LIKE_OTHERS = ("naive", "joint", "si", "mas", "lfl", "stable_sgd", "agem", "er", "der", "derpp", "icarl")
"""Compiled like another method."""


def programs(hparams: AlgorithmHParams) -> int:
    """Return the number of steps that are compiled: two with a second phase."""
    return 1 + (isinstance(hparams, PhaseHParams) and getattr(hparams, "val_fraction", 1) > 0)


@pytest.mark.parametrize("hparams", some(EVERY, ("naive", "joint", "ewc", "agem"), lambda h: h.name))
def test_a_plain_loop_equals_a_run(hparams: AlgorithmHParams, compiled: Counter[str], tmp_path: Path) -> None:
    """A plain loop, which may donate buffers, and the compiled loop of the learner, which compiles once."""
    donated: Any = {} if isinstance(hparams, NaiveHParams) else {"donate_argnums": (0, 1)}
    with jax.enable_x64(True):
        training = settings(dtype="float64", epochs_per_task=(2, 1, 1))
        ts, state, losses = user_loop(
            ALGORITHMS[hparams.name](hparams), stream_for(hparams), training, sgd(), **donated
        )
        whole = learner(hparams, training=training)
        run(whole, stream_for(hparams), run_dir=tmp_path, progress=False)
    assert compiled["jit(_traced_loop)"] == programs(hparams)
    joined = 43 // BATCH * 2 + 86 // BATCH + 129 // BATCH
    with_exemplars = 43 // BATCH * 2 + (43 + 37) // BATCH + (43 + 38) // BATCH  # five, then two of a class
    known = {"joint": joined, "icarl": with_exemplars, "bic": with_exemplars, "kcl": 4 * (53 // BATCH)}
    steps = known.get(hparams.name, 4 * STEPS)
    assert len(losses) == steps
    assert whole.step == steps + (3 * 6 if hparams.name == "gdumb" else 0)
    for a, b in zip(jax.tree.leaves(state.memory), jax.tree.leaves(whole.state.memory), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    weights = whole.weights()
    for name, array in flat(ts.params).items():
        assert array.dtype == np.float64
        np.testing.assert_allclose(weights[name], array, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "hparams", [EWC, EWCHParams(accumulation="online", reset_optimizer=False)], ids=["separate", "online"]
)
def test_donated_buffers_do_not_change_the_anchors(hparams: EWCHParams) -> None:
    kept = user_loop(ewc(hparams), rotated(), settings(), sgd())
    donated = user_loop(ewc(hparams), rotated(), settings(), sgd(), donate_argnums=(0, 1))
    assert donated[2] == kept[2]
    for a, b in zip(donated[:2], kept[:2], strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    ("hparams", "dtype", "steps_per_call"),
    [
        *((hparams, "float32", 1) for hparams in EVERY if hparams.name not in LIKE_OTHERS),
        (EWC, "float32", 2),
        (EWCHParams(fisher_samples=20, lr_decay=0.8, reset_optimizer=False), "float64", 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *((hparams, "float32", 1) for hparams in EVERY if hparams.name in LIKE_OTHERS),
                (NaiveHParams(lr_decay=0.8, reset_optimizer=False), "float64", 2),
                (JointHParams(lr_decay=0.8), "float32", 1),
                (replace(KCL, kernel_type="rbf", d_rn_f=1024), "float32", 2),
            )
        ),
    ],
    ids=lambda value: value.name if isinstance(value, AlgorithmHParams) else str(value),
)
def test_the_step_is_compiled_once_per_run(
    hparams: AlgorithmHParams, dtype: str, steps_per_call: int, compiled: Counter[str], tmp_path: Path
) -> None:
    with jax.enable_x64(dtype == "float64"):
        clip = None if hparams.name == "lamaml" else 1.0
        training = settings(dtype=dtype, grad_clip=clip, eval_batch_size=100)
        stream = stream_for(hparams, num_tasks=5)
        five = learner(hparams, stream, training, steps_per_call=steps_per_call)
        result = run(five, stream, run_dir=tmp_path, progress=False)
    assert result.summary["steps"] >= 5 * STEPS
    assert compiled["jit(_traced_step)"] == (steps_per_call == 1) * programs(hparams)
    assert compiled["jit(_traced_loop)"] == (steps_per_call > 1) * programs(hparams)
    assert compiled["jit(_traced_measure)"] == 1


def test_the_learning_rate_decays_to_its_floor() -> None:
    hparams = NaiveHParams(lr_decay=0.5, min_lr=0.03)
    four = learner(hparams, rotated(4))
    shown: list[Progress] = []
    kept = []
    for task in rotated(4).tasks:
        four.fit_task(task, FitMonitor(shown.append, lambda: None))
        kept.append(float(optax.tree_utils.tree_get(four.ts.opt_state, "learning_rate")))
    np.testing.assert_allclose(kept, [0.1, 0.05, 0.03, 0.03], rtol=1e-6)
    np.testing.assert_allclose([p.learning_rate for p in shown], kept, rtol=1e-6)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("lr_decay", [1.0, 0.8])
def test_momentum_at_the_start_of_a_task(reset: bool, lr_decay: float) -> None:
    two = learner(NaiveHParams(reset_optimizer=reset, lr_decay=lr_decay))
    two.fit_task(rotated().tasks[0], SILENT)
    trace = flat(optax.tree_utils.tree_get(two.ts.opt_state, "trace"))
    ts, _ = two.algorithm.start_task(two.ts, two.state, rotated().tasks[1])
    started = flat(optax.tree_utils.tree_get(ts.opt_state, "trace"))
    assert all(np.abs(v).max() > 0 for v in trace.values())
    assert same(started, {k: np.zeros_like(v) if reset else v for k, v in trace.items()})


FALLING = optax.piecewise_constant_schedule(0.1, {STEPS: 0.0})


@pytest.mark.parametrize(
    "tx",
    [optax.sgd(0.1), optax.sgd(FALLING), sgd(FALLING), optax.chain(optax.clip(1.0), optax.adam(0.1))],
    ids=["plain", "schedule", "injected schedule", "chain"],
)
def test_a_learning_rate_that_cannot_be_set_raises_with_lr_decay_only(tx: Any) -> None:
    with pytest.raises(
        ValueError, match=r"lr_decay=0\.8 needs an optimizer whose learning rate can be set; build"
    ):
        learner(NaiveHParams(lr_decay=0.8), tx=tx)
    assert get_learning_rate(learner(NaiveHParams(), tx=tx).ts.opt_state) is None


def test_the_learning_rate_decays_within_a_chain() -> None:
    chained = learner(NaiveHParams(lr_decay=0.8), tx=optax.chain(optax.clip(1.0), sgd()))
    for task in rotated().tasks:
        chained.fit_task(task, SILENT)
    kept = optax.tree_utils.tree_get(chained.ts.opt_state, "learning_rate")
    np.testing.assert_allclose(kept, 0.1 * 0.8**2, rtol=1e-6)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("injected", [True, False])
def test_a_schedule_continues_unless_the_optimizer_is_reset(reset: bool, injected: bool) -> None:
    tx = sgd(FALLING, momentum=None) if injected else optax.sgd(FALLING)
    two = learner(NaiveHParams(reset_optimizer=reset), tx=tx)
    shown: list[Progress] = []
    two.fit_task(rotated().tasks[0], FitMonitor(shown.append, lambda: None))
    assert np.isnan(shown[-1].learning_rate)
    first = two.weights()
    two.fit_task(rotated().tasks[1], SILENT)
    assert same(two.weights(), first) is not reset

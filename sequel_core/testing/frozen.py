"""Parameters that are not trained stay exactly as they are and cost no memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import Learner, Mode, plugin
from sequel_core.stream.benchmark import Benchmark
from sequel_core.testing.parity import Implementations, modes_of, train
from sequel_core.testing.resume import short_stream

FROZEN = "dense_0"
"""The layer of the network that is not trained."""


def check_frozen(
    hparams: AlgorithmHParams,
    *,
    implementations: Implementations = None,
    modes: Sequence[Mode] | None = None,
    benchmark: Benchmark | None = None,
) -> None:
    """Check that a frozen layer keeps its weights bit-identical and that the method keeps nothing of it.

    AdamW decays the weights. The next layer is trained and must change.

    Args:
        hparams: settings of the method.
        implementations: the module and the factory by mode; None if the method is built in or installed. The
            factory must pass on `trainable`.
        modes: frameworks to check; None for all that the method has an implementation for.
        benchmark: the stream; None for three rotations of a few digits.

    Raises:
        AssertionError: the layer changed, the next one did not, or the memory of the method has the layer.

    Example:
        >>> from sequel_core import EWCHParams
        >>> check_frozen(EWCHParams(ewc_lambda=20), modes=["pytorch"])
    """
    stream = short_stream() if benchmark is None else benchmark
    for mode in modes_of(hparams, implementations) if modes is None else modes:
        given = None if implementations is None else implementations[mode]
        made, whole = (_learner(mode, hparams, stream, given, frozen) for frozen in (True, False))
        before = made.weights()
        after = train(made, stream).weights()
        run = f"{hparams} with mode={mode}"
        names = [name for name in before if name.startswith(f"{FROZEN}/")]
        for name in names:
            np.testing.assert_array_equal(after[name], before[name], f"{run}: {name} is frozen")
        if not all(np.any(after[name] != before[name]) for name in before if name.startswith("dense_1/")):
            raise AssertionError(f"{run}: dense_1 is trained and did not change")
        train(whole, stream)
        saved, size = whole.memory_bytes() - made.memory_bytes(), sum(before[name].size for name in names)
        if saved < 0 or saved % size:
            raise AssertionError(
                f"{run}: the memory must be smaller by a multiple of the {size} frozen numbers, got "
                f"{made.memory_bytes()} bytes and {whole.memory_bytes()} bytes without frozen parameters"
            )


def _learner(
    mode: Mode, hparams: AlgorithmHParams, benchmark: Benchmark, implementation: Any, frozen: bool
) -> Learner:
    package: Any = plugin(mode)
    shape = {"image_shape": benchmark.spec.x.shape} if mode == "pytorch" else {}
    net: Any = package.MLP((9, 7), benchmark.num_classes, **shape)
    options: dict[str, Any] = {}
    if frozen and mode == "pytorch":
        getattr(net, FROZEN).requires_grad_(False)
    elif frozen:
        options["trainable"] = _is_trained
    optimizer = package.build_optimizer(OptimizerHParams(type="adamw", lr=0.01, weight_decay=0.1))
    made: Learner = package.make_learner(
        hparams,
        net,
        optimizer,
        benchmark,
        TrainingHParams(batch_size=5, seed=3),
        implementation=implementation,
        **options,
    )
    return made


def _is_trained(path: tuple[str, ...]) -> bool:
    return path[0] != FROZEN

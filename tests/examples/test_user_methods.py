"""User-defined methods end with the same weights in both frameworks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import sequel_flax
import sequel_lightning
from sequel_benchmarks import RotatedDigits
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import Learner, Mode
from sequel_core.stream.arrays import FloatArray
from sequel_core.testing import check_parity
from sequel_core.testing.parity import SILENT, trained
from tests.examples.user_methods import ConfidentHParams, ImitateHParams, MagnitudeHParams
from tests.examples.user_methods_flax import confident, imitate, magnitude
from tests.examples.user_methods_lightning import Confident, Imitate, Magnitude

STREAM = RotatedDigits(num_tasks=3, subset=350)
TRAINING = TrainingHParams(batch_size=7, dtype="float64")
SGD = OptimizerHParams(lr=0.05)
CONVOLUTIONAL: Any = {"channels": (4,), "linear_widths": (), "norm": "batch"}
USER_METHODS: list[tuple[Any, Any, Any]] = [
    (MagnitudeHParams(strength=5), magnitude, Magnitude),
    (ConfidentHParams(mem_size=50, mem_batch_size=7), confident, Confident),
    (ImitateHParams(strength=0.5), imitate, Imitate),
]


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def flax_learner(algorithm: Any) -> Learner:
    model: Any = sequel_flax.CNN(**CONVOLUTIONAL, num_classes=STREAM.num_classes)
    return sequel_flax.FlaxLearner(algorithm, model, sequel_flax.build_optimizer(SGD), STREAM.spec, TRAINING)


def torch_learner(module: Any, hparams: Any) -> Learner:
    sizes: Any = {"num_classes": STREAM.num_classes, "image_shape": STREAM.image_shape}
    net = sequel_lightning.CNN(**CONVOLUTIONAL, **sizes).double()
    sequel_lightning.initialise(net, TRAINING.seed)
    model = module(net, sequel_lightning.build_optimizer(SGD), hparams, STREAM.spec)
    return sequel_lightning.LightningLearner(model, TRAINING)


def train(learner: Learner) -> dict[str, FloatArray]:
    for task in STREAM.tasks:
        learner.fit_task(task, SILENT)
    return learner.weights()


@pytest.mark.parametrize(
    ("hparams", "bundle", "module"), USER_METHODS, ids=lambda value: getattr(value, "name", "")
)
def test_both_frameworks_end_with_the_same_weights(hparams: Any, bundle: Any, module: Any) -> None:
    implementations: dict[Mode, Any] = {"pytorch": module, "jax": bundle}
    check_parity(hparams, benchmark=STREAM, implementations=implementations)
    naive = trained("pytorch", NaiveHParams(), "sgd", benchmark=STREAM)
    for name, array in trained("pytorch", hparams, "sgd", "domain", implementations, STREAM).items():
        assert np.linalg.norm(array - naive[name]) > 1e-3 * np.linalg.norm(array)


def test_the_old_network_has_its_running_statistics() -> None:
    hparams = ImitateHParams(strength=0.5)
    a, b = train(flax_learner(imitate(hparams))), train(torch_learner(Imitate, hparams))
    for name, array in b.items():
        assert np.linalg.norm(a[name] - array) < 1e-8 * np.linalg.norm(array)

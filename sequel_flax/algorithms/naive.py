"""Naive finetuning: the tasks one after the other and nothing else, the usual lower bound.

    L = CE(f(x), y)

Mirror: sequel_lightning/algorithms/naive.py
"""

from __future__ import annotations

from sequel_core.hparams import AlgorithmHParams
from sequel_flax.bundle import Algorithm, make_algorithm, train_step
from sequel_flax.trainable import Selection


def naive(hparams: AlgorithmHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return naive finetuning.

    Args:
        hparams: settings.
        seed: of dropout.
        trainable: which parameters are trained; see `make_algorithm`.
    """
    return make_algorithm(hparams, seed, train_step, trainable=trainable)

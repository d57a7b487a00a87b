"""Naive finetuning: the tasks one after the other and nothing else, the usual lower bound.

    L = CE(f(x), y)

Mirror: sequel_flax/algorithms/naive.py
"""

from __future__ import annotations

from sequel_core.algorithms.naive import NaiveHParams
from sequel_lightning.module import ContinualModule


class Naive(ContinualModule):
    """Naive finetuning."""

    hparams_class = NaiveHParams

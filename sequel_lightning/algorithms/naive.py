"""Naive finetuning: trains on one task after the other without any protection. The usual lower bound.

    L = CE(f(x), y)

Mirror: sequel_flax/algorithms/naive.py
"""

from __future__ import annotations

from sequel_core.algorithms.naive import NaiveHParams
from sequel_lightning.module import ContinualModule


class Naive(ContinualModule):
    """Naive finetuning."""

    hparams_class = NaiveHParams

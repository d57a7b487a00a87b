"""Small streams of tokens with padding, and networks for them."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from sequel_benchmarks import MarkovSettings, markov_chains
from sequel_core.backbones import BACKBONES, BackboneHParams
from sequel_core.stream.benchmark import Benchmark

TokenRun = Literal["transformer next_token", "transformer chain", "gru next_token", "gru chain"]


@cache
def tokens(run: TokenRun, train: int = 210, test: int = 40) -> Benchmark:
    """Return three tasks of padded token sequences, whose targets are the next tokens or a label each.

    Args:
        run: the backbone and the target.
        train: training samples per task.
        test: test samples per task.
    """
    predict: Any = run.partition(" ")[2]
    settings = MarkovSettings(
        3, predict=predict, num_tokens=5, length=6, min_length=2, train_samples=train, test_samples=test
    )
    return markov_chains(settings)


def token_network(run: TokenRun, package: Any, **settings: Any) -> Any:
    """Return the network of a run, of `sequel_lightning` or of `sequel_flax`."""
    hparams = token_hparams(run.partition(" ")[0], **settings)
    benchmark = tokens(run)
    return package.backbones.BACKBONES[hparams.type](
        **hparams.arguments(), num_classes=benchmark.num_classes, per_token=benchmark.spec.per_token
    )


def token_hparams(backbone: str, **settings: Any) -> BackboneHParams:
    """Return the settings of a small network for the streams of `tokens`."""
    small: dict[str, Any] = {"vocab_size": 5, "hidden_size": 8, "num_layers": 1, **settings}
    if backbone == "transformer":
        small = {"max_length": 6, "num_heads": 2, "feed_forward_size": 12, **small}
    return BACKBONES[backbone](**small)

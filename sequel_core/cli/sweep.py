"""Sweeps: command lines with several values for a key, one experiment per combination."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from sequel_core.experiment.build import build_benchmark, score_of
from sequel_core.experiment.compose import compose
from sequel_core.experiment.overrides import MAX_RUNS, one_line, value_texts
from sequel_core.experiment.schema import ExperimentConfig
from sequel_core.objectives import Score
from sequel_core.stream.benchmark import StreamSpec


class Combination(NamedTuple):
    """One of the experiments."""

    overrides: list[str]
    config: ExperimentConfig
    notes: list[str]  # messages about the composition for the user

    def value(self, key: str) -> str:
        """Return the last value of a key as text; empty if the key is not given."""
        values = [text.partition("=")[2] for text in self.overrides if key_of(text) == key]
        return values[-1] if values else ""

    def __str__(self) -> str:
        return " ".join(text.lstrip("+") for text in self.overrides)


def combinations(overrides: Sequence[str]) -> list[Combination]:
    """Compose every experiment, in the order in which Hydra's basic sweeper starts them.

    Args:
        overrides: as `sequel_core.experiment.compose.request` gives them.

    Raises:
        ValueError: a setting is misspelt, malformed or out of range.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        swept = [override for override in parsed if override.is_sweep_override()]
        count = math.prod(sum(1 for _ in override.sweep_string_iterator()) for override in swept)
        if count > MAX_RUNS:
            raise ValueError(f"a sweep must have at most {MAX_RUNS} runs, got {count}; take fewer values")
        jobs = _product(parsed)
    except HydraException as error:
        raise ValueError(one_line(error)) from error
    return [Combination(list(texts), *compose(list(texts))) for texts in jobs]


def _product(overrides: Sequence[Override]) -> Iterator[tuple[str, ...]]:
    """Return the overrides of each combination; if a key is given twice, the last one counts."""
    choices = {}
    for override in overrides:
        key = override.get_key_element()
        choices[key] = [f"{key}={text}" for text in value_texts(override)]
    return itertools.product(*choices.values())


def varied(experiments: Sequence[Combination]) -> list[str]:
    """Return the keys whose values differ between experiments, in the order of the command line."""
    keys = dict.fromkeys(key_of(text) for item in experiments for text in item.overrides)
    return [key for key in keys if len({item.value(key) for item in experiments}) > 1]


def key_of(override: str) -> str:
    """Return the key of an override: `algo` of `+algo=ewc`."""
    return override.lstrip("+").partition("=")[0]


def check_streams(experiments: Mapping[str, ExperimentConfig]) -> list[Score]:
    """Build every stream once, so that errors are raised before the first run starts.

    Args:
        experiments: configurations by name; the name is used in errors.

    Returns:
        The score of each experiment.

    Raises:
        ValueError: the error of `build_benchmark`, with the name of the experiment.
    """
    specs: dict[str, StreamSpec] = {}
    scores = []
    for name, config in experiments.items():
        fingerprint = repr((config.benchmark, config.training, config.evaluate_on, config.algo))
        try:
            if fingerprint not in specs:
                specs[fingerprint] = build_benchmark(config).spec
            scores.append(score_of(config, specs[fingerprint]))
        except ValueError as error:
            raise ValueError(f"{error} (in the run {name})") from error
    return scores

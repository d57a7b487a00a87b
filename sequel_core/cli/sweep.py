"""Command lines with several values for a key: one experiment for every combination."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from sequel_core.experiment.compose import MOST_RUNS, compose, one_line
from sequel_core.experiment.config import ExperimentConfig, build_benchmark


class Combination(NamedTuple):
    """One of the experiments."""

    overrides: list[str]
    config: ExperimentConfig
    notes: list[str]  # what the user should be told of the composition

    def value(self, key: str) -> str:
        """Return the value of a key as it was written, the last one's; empty where it is not given."""
        found = [text.partition("=")[2] for text in self.overrides if key_of(text) == key]
        return found[-1] if found else ""

    def __str__(self) -> str:
        return " ".join(text.lstrip("+") for text in self.overrides)


def combinations(overrides: Sequence[str]) -> list[Combination]:
    """Compose every experiment, in the order in which Hydra's own sweeper starts them.

    Args:
        overrides: as `sequel_core.experiment.compose.request` gives them.

    Raises:
        ValueError: something that cannot be read or is out of range.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        swept = [override for override in parsed if override.is_sweep_override()]
        count = math.prod(sum(1 for _ in override.sweep_string_iterator()) for override in swept)
        if count > MOST_RUNS:
            raise ValueError(f"a sweep must have at most {MOST_RUNS} runs, got {count}; take fewer values")
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException as error:
        raise ValueError(one_line(error)) from error
    return [Combination(texts, *compose(texts)) for texts in jobs]


def varied(found: Sequence[Combination]) -> list[str]:
    """Return the keys whose value is not the same in all combinations, in the order of the command line."""
    keys = dict.fromkeys(key_of(text) for item in found for text in item.overrides)
    return [key for key in keys if len({item.value(key) for item in found}) > 1]


def key_of(override: str) -> str:
    """Return the key of an override: `algo` of `+algo=ewc`."""
    return override.lstrip("+").partition("=")[0]


def check_streams(experiments: Mapping[str, ExperimentConfig]) -> None:
    """Build each stream once, with the checks that depend on it, so that nothing fails only when it starts.

    Args:
        experiments: by what tells them apart in an error.

    Raises:
        ValueError: what `build_benchmark` says, and in which experiment.
    """
    checked: set[str] = set()
    for name, config in experiments.items():
        fingerprint = repr((config.benchmark, config.training, config.evaluate_on, config.algo))
        if fingerprint not in checked:
            try:
                build_benchmark(config)
            except ValueError as error:
                raise ValueError(f"{error} (in the run {name})") from error
            checked.add(fingerprint)

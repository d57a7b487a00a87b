"""The constructors of the built-in benchmarks list the fields of their settings."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import fields
from typing import Any, get_type_hints

import numpy as np
import pytest

from sequel_benchmarks import (
    BENCHMARKS,
    TABLES,
    PermutedSettings,
    RotatedSettings,
    SplitDigits,
    SplitSettings,
    TabularSettings,
)
from sequel_benchmarks.streams import PermutedOptions, RotatedOptions, SplitOptions
from sequel_benchmarks.tabular import TabularOptions
from sequel_benchmarks.tokens import MarkovOptions, MarkovSettings

NAMED = {("breastcancer", "feature"), ("diabetes", "feature"), ("wine", "scenario")}  # have another default
SETTINGS: dict[str, Any] = {
    "split": SplitSettings,
    "permuted": PermutedSettings,
    "rotated": RotatedSettings,
    "markov": MarkovSettings,
} | dict.fromkeys(TABLES, TabularSettings)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (SplitSettings, SplitOptions),
        (PermutedSettings, PermutedOptions),
        (RotatedSettings, RotatedOptions),
        (TabularSettings, TabularOptions),
        (MarkovSettings, MarkovOptions),
    ],
)
def test_options_are_the_fields_of_the_settings(settings: Any, options: Any) -> None:
    hints = get_type_hints(settings)
    named = ("num_tasks", "scenario", "feature") if settings is TabularSettings else ("num_tasks",)
    assert get_type_hints(options) == {
        spec.name: hints[spec.name] for spec in fields(settings) if spec.name not in named
    }


@pytest.mark.parametrize("name", BENCHMARKS)
def test_signature_and_docstring_list_every_argument(name: str) -> None:
    cls = BENCHMARKS[name]
    parameters = inspect.signature(cls).parameters
    settings = next(settings for scheme, settings in SETTINGS.items() if name.startswith(scheme))
    hints = get_type_hints(settings)
    for spec in fields(settings):
        parameter = parameters[spec.name]
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert get_type_hints(cls.__init__)[spec.name] == parameter.annotation == hints[spec.name]
        if spec.name != "num_tasks" and (name, spec.name) not in NAMED:
            assert parameter.default == spec.default
    described = [line.strip() for line in (inspect.getdoc(cls) or "").splitlines()]
    assert all(sum(line.startswith(f"{key}: ") for line in described) == 1 for key in parameters)
    assert ("data_dir" in parameters) == (name.endswith(("mnist", "cifar10", "cifar100", "tinyimagenet")))


def test_unknown_arguments_are_rejected() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'data_dir'"):
        SplitDigits(data_dir="data")  # type: ignore[call-arg]


def test_benchmarks_can_be_pickled() -> None:
    benchmark = SplitDigits(num_tasks=2, subset=20, seed=3)
    copy = pickle.loads(pickle.dumps(benchmark))
    assert (type(copy), copy.settings) == (SplitDigits, benchmark.settings)
    for task, expected in zip(copy.tasks, benchmark.tasks, strict=True):
        np.testing.assert_array_equal(task.train.targets, expected.train.targets)

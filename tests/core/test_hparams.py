import math
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any

import pytest

from sequel_core.hparams import (
    ALGORITHMS,
    EWCHParams,
    JointHParams,
    NaiveHParams,
    OptimizerHParams,
    Settings,
    TrainingHParams,
    allowed,
    setting,
)


@dataclass(frozen=True)
class Example(Settings):
    count: int = setting(1, "a whole number", ge=1)
    rate: float = setting(0.5, "a number", gt=0, lt=1)
    flag: bool = setting(False, "a truth value")
    text: str = setting("a", "some text")
    many: tuple[float, ...] = setting((), "numbers", ge=0)
    either: int | tuple[int, ...] = setting(1, "one or many", ge=1)
    maybe: int | None = setting(None, "a number or none", ge=1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "count must be >= 1, got 0"),
        ("count", 1.5, "count must be a whole number >= 1, got 1.5"),
        ("count", "ten", "count must be a number >= 1, got 'ten'"),
        ("count", True, "count must be a number >= 1, got True"),
        ("count", None, "count must be a number >= 1, got None"),
        ("rate", 0.0, "rate must be > 0 and < 1, got 0.0"),
        ("rate", 1, "rate must be > 0 and < 1, got 1.0"),
        ("rate", math.nan, "rate must be > 0 and < 1, got nan"),
        ("flag", 1, "flag must be true or false, got 1"),
        ("text", 1, "text must be text, got 1"),
        ("many", [0.5, -1], "many must be >= 0, got -1.0"),
        ("many", "12", "many must be a list, got '12'"),
        ("many", 1, "many must be a list, got 1"),
        ("either", 0, "either must be >= 1, got 0"),
        ("maybe", 0, "maybe must be >= 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        Example(**{name: value})
    assert str(error.value).startswith(message)


def test_values_become_what_the_field_is() -> None:
    example = Example(count=2.0, rate=0.25, many=[1, 2], either=[3, 4], maybe=5.0)  # type: ignore[arg-type]
    assert example == Example(2, 0.25, False, "a", (1.0, 2.0), (3, 4), 5)
    assert type(example.count) is int
    assert all(type(item) is float for item in example.many)


def test_ranges_as_text() -> None:
    texts = {spec.name: allowed(spec) for spec in fields(Example)}
    assert texts["count"] == ">= 1"
    assert texts["rate"] == "> 0 and < 1"
    assert texts["flag"] == ""


def test_every_setting_says_what_it_means() -> None:
    for cls in (*ALGORITHMS.values(), OptimizerHParams, TrainingHParams):
        assert all(spec.metadata["help"] for spec in fields(cls))


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        NaiveHParams().lr_decay = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (EWCHParams, {"ewc_lambda": -1.0}, "ewc_lambda must be >= 0, got -1.0"),
        (EWCHParams, {"gamma": 1.1}, "gamma must be >= 0 and <= 1, got 1.1"),
        (EWCHParams, {"fisher_samples": 0}, "fisher_samples must be >= 1, got 0"),
        (EWCHParams, {"accumulation": "sum"}, "accumulation must be one of separate, online, got 'sum'"),
        (NaiveHParams, {"lr_decay": 0}, "lr_decay must be > 0 and <= 1, got 0.0"),
        (JointHParams, {"policy": "all"}, "policy must be one of cumulative, once, got 'all'"),
        (OptimizerHParams, {"type": "rmsprop"}, "type must be one of sgd, adam, adamw, got 'rmsprop'"),
        (OptimizerHParams, {"momentum": 1}, "momentum must be >= 0 and < 1, got 1.0"),
        (
            OptimizerHParams,
            {"type": "adam", "momentum": 0.9},
            "momentum and nesterov belong to sgd, got type=adam",
        ),
        (OptimizerHParams, {"nesterov": True}, "nesterov needs momentum > 0"),
        (TrainingHParams, {"batch_size": 0}, "batch_size must be >= 1, got 0"),
        (TrainingHParams, {"grad_clip": 0}, "grad_clip must be > 0, got 0.0"),
        (TrainingHParams, {"epochs_per_task": [1, 0]}, "epochs_per_task must be"),
        (TrainingHParams, {"dtype": "float16"}, "dtype must be one of float32, float64, got 'float16'"),
    ],
)
def test_bad_settings(cls: type[Settings], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        cls(**settings)
    assert message in str(error.value)


def test_learning_rate_decays_to_its_floor() -> None:
    hparams = NaiveHParams(lr_decay=0.5, min_lr=0.02)
    rates = [0.1 * hparams.learning_rate_factor(task, 0.1) for task in range(5)]
    assert rates == pytest.approx([0.1, 0.05, 0.025, 0.02, 0.02])
    assert NaiveHParams(min_lr=1.0).learning_rate_factor(3, 0.1) == 1.0  # a floor never raises the rate


def test_epochs_are_one_number_or_one_per_task() -> None:
    assert [TrainingHParams(epochs_per_task=3).epochs(task) for task in (0, 9)] == [3, 3]
    listed = TrainingHParams(epochs_per_task=(2, 1))
    assert [listed.epochs(task) for task in (0, 1)] == [2, 1]
    with pytest.raises(
        ValueError, match=r"epochs_per_task must be a number or have one entry per task, got 2 entries"
    ):
        listed.epochs(2)

import math
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import Any

import numpy as np
import pytest

from sequel_core.algorithms import ALGORITHMS
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.joint import JointHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.algorithms.stable_sgd import StableSGDHParams
from sequel_core.hparams import MemoryHParams, MemoryPolicy, OptimizerHParams, ReplayHParams, TrainingHParams
from sequel_core.settings import Settings, allowed, nearest, setting
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.memory import MemoryPlanner
from sequel_core.stream.trees import LeafSpec

SPEC = StreamSpec(  # three tasks with five classes of theirs
    LeafSpec((2, 2, 1), "uint8"),
    4,
    3,
    "class",
    np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], np.bool_),
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
        ("count", "ten", "count must be a whole number >= 1, got 'ten'"),
        ("count", True, "count must be a whole number >= 1, got True"),
        ("count", None, "count must be a whole number >= 1, got None"),
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
        (
            EWCHParams,
            {"fisher": "label"},
            "fisher must be one of empirical, sampled, exact, batch, mean, weighted, got 'label'",
        ),
        (SIHParams, {"path_gradient": "all"}, "path_gradient must be one of loss, total, got 'all'"),
        (
            TrainingHParams,
            {"grad_clip_algorithm": "l2"},
            "grad_clip_algorithm must be one of norm, value, got 'l2'",
        ),
        (ERHParams, {"mem_replacement": 1}, "mem_replacement must be true or false, got 1"),
        (EWCHParams, {"fisher_samples": 0}, "fisher_samples must be >= 1, got 0"),
        (EWCHParams, {"accumulation": "sum"}, "accumulation must be one of separate, online, got 'sum'"),
        (NaiveHParams, {"lr_decay": 0}, "lr_decay must be > 0 and <= 1, got 0.0"),
        (JointHParams, {"policy": "all"}, "policy must be one of cumulative, once, got 'all'"),
        (SIHParams, {"si_lambda": -0.1}, "si_lambda must be >= 0, got -0.1"),
        (SIHParams, {"xi": 0}, "xi must be > 0, got 0.0"),
        (SIHParams, {"clamp": 1}, "clamp must be true or false, got 1"),
        (MASHParams, {"mas_lambda": -1}, "mas_lambda must be >= 0, got -1.0"),
        (MASHParams, {"gradients": "mean"}, "gradients must be one of sample, batch, got 'mean'"),
        (MASHParams, {"mas_samples": 0}, "mas_samples must be >= 1, got 0"),
        (LFLHParams, {"lfl_lambda": -1e-3}, "lfl_lambda must be >= 0, got -0.001"),
        (LFLHParams, {"freeze_head": None}, "freeze_head must be true or false, got None"),
        (StableSGDHParams, {"lr_decay": 0}, "lr_decay must be > 0 and <= 1, got 0.0"),
        (StableSGDHParams, {"lr_decay": 1.25}, "lr_decay must be > 0 and <= 1, got 1.25"),
        (StableSGDHParams, {"min_lr": -1e-5}, "min_lr must be >= 0, got -1e-05"),
        (StableSGDHParams, {"decay_first": "no"}, "decay_first must be true or false, got 'no'"),
        (ERHParams, {"mem_size": -1}, "mem_size must be >= 0, got -1"),
        (ERHParams, {"mem_size": 10.5}, "mem_size must be a whole number >= 0, got 10.5"),
        (ERHParams, {"mem_size": None}, "mem_size must be a whole number >= 0, got None"),
        (ERHParams, {"per_task_memory_samples": -2}, "per_task_memory_samples must be >= 0, got -2"),
        (ERHParams, {"mem_batch_size": 0}, "mem_batch_size must be >= 1, got 0"),
        (
            ERHParams,
            {"memory": "fifo"},
            "memory must be one of reservoir, ring, task_ring, class_balanced, task_balanced, task_quota, "
            "class_quota, greedy, got 'fifo'",
        ),
        *(
            (AGEMHParams, {"memory": memory}, f"one of ring, task_quota, class_quota, got '{memory}'")
            for memory in ("reservoir", "class_balanced", "task_balanced")
        ),
        (AGEMHParams, {"mem_batch_size": 0}, "mem_batch_size must be >= 1, got 0"),
        (DERHParams, {"alpha": -0.5}, "alpha must be >= 0, got -0.5"),
        (DERHParams, {"distance": "max"}, "distance must be one of sum, mean, got 'max'"),
        (DERHParams, {"memory": "all"}, "memory must be one of reservoir, ring, "),
        (DERppHParams, {"alpha": -0.5}, "alpha must be >= 0, got -0.5"),
        (DERppHParams, {"beta": -0.5}, "beta must be >= 0, got -0.5"),
        (OptimizerHParams, {"type": "rmsprop"}, "type must be one of sgd, adam, adamw, got 'rmsprop'"),
        (OptimizerHParams, {"momentum": 1}, "momentum must be >= 0 and < 1, got 1.0"),
        (
            OptimizerHParams,
            {"type": "adam", "momentum": 0.9},
            "momentum is only used with type=sgd, got momentum=0.9 with type=adam; set type=sgd or leave",
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


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"decay_first": True, "min_lr": 0}, [0.05, 0.025, 0.0125, 0.00625]),  # 0.1 * 0.5^(t + 1)
        ({"decay_first": False, "min_lr": 0}, [0.1, 0.05, 0.025, 0.0125]),  # 0.1 * 0.5^t
        ({"decay_first": True, "min_lr": 0.02}, [0.05, 0.025, 0.02, 0.02]),
        ({"decay_first": False, "min_lr": 0.02}, [0.1, 0.05, 0.025, 0.02]),
        ({"decay_first": True, "min_lr": 0.2}, [0.1, 0.1, 0.1, 0.1]),  # a floor never raises the rate
        ({"decay_first": False, "min_lr": 0.2}, [0.1, 0.1, 0.1, 0.1]),
        ({"lr_decay": 1, "min_lr": 0}, [0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_stable_sgd_decays_from_the_first_task_or_the_second(
    settings: dict[str, Any], rates: list[float]
) -> None:
    hparams = StableSGDHParams(**{"lr_decay": 0.5, **settings})
    assert [0.1 * hparams.learning_rate_factor(task, 0.1) for task in range(4)] == pytest.approx(rates)


def test_stable_sgd_by_default_decays_by_a_fifth_down_to_its_floor() -> None:
    hparams = StableSGDHParams()
    rates = [0.1 * hparams.learning_rate_factor(task, 0.1) for task in (0, 1, 2, 33, 34, 60)]
    # 0.1 * 0.8^34 = 5.07e-5, 0.1 * 0.8^35 = 4.06e-5
    assert rates == pytest.approx([0.08, 0.064, 0.0512, 5.0706024e-5, 5e-5, 5e-5])


def test_algorithms_without_a_rule_of_their_own_do_not_decay() -> None:
    for name, cls in ALGORITHMS.items():
        factors = [cls().learning_rate_factor(task, 0.1) for task in range(3)]
        assert factors == (pytest.approx([0.8, 0.64, 0.512]) if name == "stable_sgd" else [1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("memory", "parts"),
    [
        ("reservoir", 1),
        ("ring", 5),
        ("class_balanced", 1),
        ("task_balanced", 1),
        ("task_quota", 3),
        ("class_quota", 5),
    ],
)
def test_a_memory_has_its_slots_and_parts(memory: MemoryPolicy, parts: int) -> None:
    assert ERHParams(memory=memory).parts(SPEC) == parts
    assert ERHParams(memory=memory, mem_size=30).slots(3) == 30
    per_task = ERHParams(memory=memory, per_task_memory_samples=10)
    assert [per_task.slots(tasks) for tasks in (1, 3)] == [10, 30]
    assert ERHParams(memory=memory, per_task_memory_samples=0).slots(3) == 0
    for fits in (ERHParams(memory=memory, mem_size=30), per_task, ERHParams(memory=memory, mem_size=0)):
        fits.check(SPEC, TrainingHParams(batch_size=30))


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        (
            ERHParams(mem_size=15),
            "mem_size must be 0 or give at least batch_size=16 slots, so that the samples of a step fit, "
            "got 15; raise mem_size or lower batch_size",
        ),
        (
            ERHParams(per_task_memory_samples=5),
            "per_task_memory_samples must be 0 or give at least batch_size=16 slots, so that the samples of "
            "a step fit, got 5 (15 in all); raise per_task_memory_samples or lower batch_size",
        ),
        (
            DERppHParams(mem_size=16, mem_batch_size=17),
            "mem_batch_size must be <= the 16 samples of the memory, got 17; lower mem_batch_size or raise "
            "mem_size",
        ),
        (
            AGEMHParams(mem_size=1001),
            "mem_size must divide into the 5 equal parts of memory=ring, one for each class of each task, "
            "got 1001; use 1000 or 1005",
        ),
        (
            ERHParams(memory="task_quota", mem_size=20),
            "mem_size must divide into the 3 equal parts of memory=task_quota, one for each task, got 20; "
            "use 18 or 21",
        ),
        (
            AGEMHParams(mem_size=256),  # 255 would be less than a draw
            "mem_size must divide into the 5 equal parts of memory=ring, one for each class of each task, "
            "got 256; use 260 or 265",
        ),
        (
            ERHParams(memory="class_quota", per_task_memory_samples=6),
            "per_task_memory_samples must divide into the 5 equal parts of memory=class_quota, one for each "
            "class of each task, got 6 (18 in all); use 10 or 15",
        ),
    ],
)
def test_a_memory_that_does_not_fit_is_refused(hparams: ReplayHParams, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        hparams.check(SPEC, TrainingHParams(batch_size=16))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("hparams", "quota"), [(AGEMHParams(), 111), (MCSGDHParams(), 66)])
def test_the_default_size_is_rounded_down(hparams: MemoryHParams, quota: int) -> None:
    """1000 slots of 9 equal parts, and 200 of 3: those after the parts stay empty."""
    spec = StreamSpec(LeafSpec((3,)), 3, 3, "domain", np.ones((3, 3), bool))
    hparams.check(spec, TrainingHParams(batch_size=16))
    planner = MemoryPlanner(hparams, spec, seed=0)
    written = [
        planner.next(np.full((300, 4), y), np.full((300, 4), t)).write for t in range(3) for y in range(3)
    ]
    parts = hparams.parts(spec)
    assert {*np.concatenate(written).ravel().tolist()} - {hparams.mem_size} == {*range(parts * quota)}
    with pytest.raises(ValueError, match=rf"mem_size must divide into the {parts} equal parts"):
        replace(hparams, mem_size=parts * quota - 1).check(spec, TrainingHParams(batch_size=16))


def test_epochs_are_one_number_or_one_per_task() -> None:
    assert [TrainingHParams(epochs_per_task=3).epochs(task) for task in (0, 9)] == [3, 3]
    listed = TrainingHParams(epochs_per_task=(2, 1))
    assert [listed.epochs(task) for task in (0, 1)] == [2, 1]
    with pytest.raises(
        ValueError, match=r"epochs_per_task must be a number or have one entry per task, got 2 entries"
    ):
        listed.epochs(2)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("clas", "class"),
        ("class-incremental", "class"),
        ("task_incremental", "task"),
        ("incremental", ""),
        ("", ""),
    ],
)
def test_the_hint_of_an_unknown_name(word: str, hint: str) -> None:
    assert nearest(word, ["domain", "task", "class"]) == (f"; did you mean {hint}?" if hint else "")

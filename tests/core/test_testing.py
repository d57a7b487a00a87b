"""The checks of `sequel_core.testing` pass for user-defined methods, and fail for methods that are wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sequel_benchmarks import RotatedDigits
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.runs.learner import Mode
from sequel_core.stream.task import Batch
from sequel_core.testing import check_effect, check_frozen, check_parity, check_resume, check_strength_zero
from sequel_core.testing.parity import BOTH
from tests.examples.user_methods import ImitateHParams, MagnitudeHParams
from tests.examples.user_methods_flax import imitate, magnitude
from tests.examples.user_methods_lightning import Imitate, Magnitude
from tests.resume.short_runs import METHODS

SHORT = RotatedDigits(num_tasks=2, subset=70)
OURS: dict[Mode, Any] = {"pytorch": Imitate, "jax": imitate}
WITH_FROZEN = ("si", "er")


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name in WITH_FROZEN else [pytest.mark.slow])
        for name in METHODS
        if "on values" not in name
    ],
)
def test_a_frozen_layer_in_every_method(mode: Mode, method: str) -> None:
    check_frozen(METHODS[method], modes=[mode])


@pytest.mark.slow
def test_every_check_of_a_user_method(tmp_path: Path) -> None:
    usual, zero = ImitateHParams(strength=0.5), ImitateHParams(strength=0)
    assert check_parity(usual, benchmark=SHORT, implementations=OURS) < 1e-10
    assert check_effect(usual, benchmark=SHORT, implementations=OURS) > 1e-3
    check_strength_zero(zero, benchmark=SHORT, implementations=OURS)
    check_frozen(usual, implementations=OURS)
    check_resume(usual, tmp_path, implementations=OURS)


class Counting(Imitate):
    """Its steps depend on a number that no checkpoint has."""

    steps = 0

    def training_loss(self, batch: Batch) -> Any:
        self.steps += 1
        loss, logits = super().training_loss(batch)
        return loss * (1 + 0.001 * self.steps), logits


def stronger(hparams: MagnitudeHParams, seed: int = 0) -> Any:
    return magnitude(replace(hparams, strength=2 * hparams.strength), seed)


def all_trained(hparams: ImitateHParams, seed: int = 0, trainable: Any = None) -> Any:
    return imitate(hparams, seed)


IMITATE, MAGNITUDE = ImitateHParams(strength=0.5), MagnitudeHParams(strength=50)
Check = Callable[[Path], Any]
WRONG: dict[str, tuple[Check, str]] = {
    "parity": (
        lambda folder: check_parity(
            MAGNITUDE, benchmark=SHORT, implementations={"pytorch": Magnitude, "jax": stronger}
        ),
        r"MagnitudeHParams\(.*\) with sgd: the weights of the frameworks differ by .*, which is not below",
    ),
    "effect": (
        lambda folder: check_effect(EWCHParams(ewc_lambda=0), benchmark=SHORT, modes=["pytorch"]),
        "differ from those of naive finetuning by 0, which is not above 1e-3",
    ),
    "strength zero": (
        lambda folder: check_strength_zero(IMITATE, benchmark=SHORT, implementations={"pytorch": Imitate}),
        r"ImitateHParams\(.*\), mode=pytorch: ",
    ),
    "frozen": (
        lambda folder: check_frozen(IMITATE, implementations={"jax": all_trained}),
        r"ImitateHParams\(.*\) with mode=jax: dense_0/.* is frozen",
    ),
    "resume": (
        lambda folder: check_resume(IMITATE, folder, implementations={"pytorch": Counting}),
        "Arrays are not equal",
    ),
}


@pytest.mark.parametrize(("check", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_method_fails(check: Check, message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        check(tmp_path)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"optimizer must be one of sgd, .*, got 'adma'; did you mean"):
        check_parity(IMITATE, "adma", implementations=OURS)
    with pytest.raises(ValueError, match="implementation is needed for imitate, which is not built in"):
        check_parity(IMITATE, benchmark=SHORT)


def test_the_import_loads_neither_pytest_nor_a_framework() -> None:
    code = "import sys, sequel_core.testing; print(sorted({'pytest', 'torch', 'jax'} & sys.modules.keys()))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (child.stdout, child.stderr) == ("[]\n", "")

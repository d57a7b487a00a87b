"""A run that is killed with SIGKILL at any moment and resumed is bit-identical to an uninterrupted one."""

import multiprocessing
import random
import signal
from pathlib import Path

import pytest

from sequel_core.testing.resume import assert_same_end
from tests.resume.short_runs import METHODS, MODES, start

POINTS = 20


@pytest.fixture(scope="module", autouse=True)
def _forkserver() -> None:
    """Import the frameworks once, in the process that all runs are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.resume.short_runs", "sequel_lightning", "sequel_flax"])


def killed_and_resumed(mode: str, method: str, points: int, folder: Path) -> None:
    straight = folder / "straight"
    code, moments = start(mode, method, straight, None)
    assert code == 0
    assert moments > 100
    chosen = sorted(random.Random(f"{mode} {method}").sample(range(1, moments + 1), points))
    for moment in chosen:
        run_dir = folder / f"killed_{moment}"
        assert start(mode, method, run_dir, moment) == (-signal.SIGKILL, 0)
        assert start(mode, method, run_dir, None)[0] == 0
        try:
            assert_same_end(run_dir, straight)
        except AssertionError as error:
            raise AssertionError(f"killed at moment {moment} of {moments}") from error


@pytest.mark.parametrize("mode", [pytest.param("pytorch", marks=pytest.mark.slow), "jax"])
@pytest.mark.parametrize("method", ["derpp"])
def test_killed_at_a_random_moment(mode: str, method: str, tmp_path: Path) -> None:
    killed_and_resumed(mode, method, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_killed_at_twenty_random_moments(mode: str, method: str, tmp_path: Path) -> None:
    killed_and_resumed(mode, method, POINTS, tmp_path)

"""What every test starts from: the same seeds, the same examples, and no silent broadcasting in JAX."""

import os
import random
import sys
from collections.abc import Iterator
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import settings

os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # read by jax when, and only when, a test imports it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # by torch, alike: two workers of pytest share the cores

settings.register_profile("sequel", derandomize=True, deadline=None)
settings.load_profile("sequel")


def pytest_configure(config: pytest.Config) -> None:
    """Spend less on compiling, which is most of what JAX's tests do.

    Each worker compiles a program once for all its tests; its cache is its own, as JAX's is not made for two
    writers. Without the slow tests, which run what users run, XLA does not optimise.
    """
    compiled = TemporaryDirectory(prefix="sequel-compiled-")
    config.add_cleanup(compiled.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    if config.getoption("markexpr") == "not slow":
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _single_precision_afterwards() -> Iterator[None]:
    """Undo what a run with `training.dtype=float64` does for good to JAX's process."""
    yield
    if "jax" in sys.modules and sys.modules["jax"].config.jax_enable_x64:
        sys.modules["jax"].config.update("jax_enable_x64", False)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)

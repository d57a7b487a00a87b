"""Float64 in JAX and one thread in PyTorch, for comparisons with the float64 references."""

from collections.abc import Iterator

import jax
import pytest
import torch


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine, operators this small take twice as long with several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""Fixtures of the Flax tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from jax import monitoring


@pytest.fixture
def compiled() -> Iterator[Counter[str]]:
    """Count the compilations of each function by XLA."""
    counts: Counter[str] = Counter()

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counts[str(kwargs["fun_name"])] += 1

    monitoring.register_event_duration_secs_listener(listen)
    yield counts
    monitoring.unregister_event_duration_listener(listen)

"""Parameters of which the default run takes some, and `make slow` the rest."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], default: Collection[str], name: Callable[[Any], str] = str) -> list[Any]:
    """Return the values as parameters of a test; those whose names are not in `default` are slow."""
    named = {name(value): value for value in values}
    unknown = set(default) - set(named)
    assert not unknown, f"{unknown} are not in {list(named)}"
    return [
        pytest.param(value, id=key, marks=[] if key in default else [pytest.mark.slow])
        for key, value in named.items()
    ]

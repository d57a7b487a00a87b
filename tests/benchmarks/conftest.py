"""Makes torchvision importable with any PyTorch build, and prevents downloads."""

from dataclasses import replace

import pytest

import sequel_lightning._torchvision  # noqa: F401
from sequel_benchmarks import data


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, origin in data.ORIGINS.items():
        monkeypatch.setitem(
            data.ORIGINS, name, replace(origin, mirrors=("http://127.0.0.1:9/",))
        )  # refuses connections

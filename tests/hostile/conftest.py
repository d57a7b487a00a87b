"""A sandbox without a framework, a network or the composition of the same groups over and over."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest

import sequel_lightning._torchvision  # noqa: F401 - what the plug-in would have done
from sequel_benchmarks import data
from sequel_core import learner
from sequel_core.cli import compose
from tests.hostile.fuzzing import Sandbox


class NoPlugin:
    """What `sequel_core.learner.plugin` returns: everything is checked, nothing is trained."""

    def build_learner(self, *_: object) -> None:
        raise ValueError("nothing is trained here")


GROUPS = functools.cache(lambda config, overrides: compose_groups(config, list(overrides)))
compose_groups = compose.compose_groups


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sandbox:
    """Composing Hydra's groups takes 0.2 s and depends on the names in them alone."""
    made = Sandbox(tmp_path)
    monkeypatch.chdir(made.here)
    monkeypatch.setenv("SEQUEL_DATA_DIR", str(made.given))
    monkeypatch.setattr(learner, "plugin", lambda mode: NoPlugin())
    monkeypatch.setattr(compose, "compose_groups", lambda config, overrides=(): GROUPS(config, tuple(overrides)))
    for name, origin in data.ORIGINS.items():
        monkeypatch.setitem(data.ORIGINS, name, replace(origin, mirrors=("http://127.0.0.1:9/",)))  # refused
    return made

"""Every table that a new method has to enter; a test names the table and the methods that it lacks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from importlib import resources
from pathlib import Path

import pytest

import sequel_flax
import sequel_lightning
from sequel_core.algorithms import ALGORITHMS
from tests.flax.parts import EVERY as FLAX
from tests.lightning.parts import EVERY as LIGHTNING
from tests.parity.cases import CASES as PARITY
from tests.parity.test_convolutions import METHODS as CONVOLUTIONS
from tests.parity.test_parity import ZERO
from tests.reference.algorithms import REFERENCES
from tests.reference.cases import CASES as REFERENCE
from tests.resume.short_runs import METHODS as RESUME
from tests.speed import loops_flax, loops_lightning

NO_STRENGTH = {"naive", "joint", "er_ace", "bic", "gdumb", "lamaml", "icarl", "kcl"}
"""Methods without a setting whose value 0 gives naive finetuning."""

ROOT = Path(__file__).parents[1]


def support(page: str) -> set[str]:
    """Return the names of the methods in the support table of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return set(re.findall(r"`(\w+)`", text.partition("<!-- support")[2].partition("<!-- /support")[0]))


configs = resources.files("sequel_configs").joinpath("algo")
TABLES: dict[str, Collection[str]] = {
    "ALGORITHMS of sequel_lightning/algorithms/__init__.py": sequel_lightning.ALGORITHMS,
    "ALGORITHMS of sequel_flax/algorithms/__init__.py": sequel_flax.ALGORITHMS,
    "the files of configs/algo": [path.name.removesuffix(".yaml") for path in configs.iterdir()],
    "the pages of docs/methods": [path.stem for path in (ROOT / "docs" / "methods").glob("*.md")],
    "the support table of docs/methods/index.md": support("docs/methods/index.md"),
    "the support summary of README.md": support("README.md"),
    "CASES of tests/parity/cases.py": [hparams.name for hparams, _ in PARITY],
    "ZERO of tests/parity/test_parity.py, or NO_STRENGTH here": NO_STRENGTH.union(h.name for h in ZERO),
    "METHODS of tests/parity/test_convolutions.py": [hparams.name for hparams in CONVOLUTIONS],
    "REFERENCES of tests/reference/algorithms.py": [hparams.name for hparams in REFERENCES],
    "CASES of tests/reference/cases.py": [case.hparams.name for case in REFERENCE],
    "METHODS of tests/resume/short_runs.py": RESUME,
    "EVERY of tests/lightning/parts.py": [hparams.name for hparams in LIGHTNING],
    "EVERY of tests/flax/parts.py": [hparams.name for hparams in FLAX],
    "LOOPS of tests/speed/loops_lightning.py": loops_lightning.LOOPS,
    "LOOPS of tests/speed/loops_flax.py": loops_flax.LOOPS,
}


@pytest.mark.parametrize("table", TABLES)
def test_every_method_is_in_the_table(table: str) -> None:
    lacking = sorted(ALGORITHMS.keys() - set(TABLES[table]))
    assert not lacking, f"{table} lacks {', '.join(lacking)}"


def test_parity_has_two_settings_of_every_method() -> None:
    rows = Counter(hparams.name for hparams, _ in PARITY)
    assert [name for name in ALGORITHMS if rows[name] < 2] == []

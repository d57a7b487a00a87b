"""Private names of other packages, each with the version that it was last seen in.

`pyproject.toml` excludes the next minor version of these packages; `tests/core/test_compat.py` calls each
function.
"""

from __future__ import annotations

import os
from typing import Any

from hydra.core.override_parser.types import Override


def override_value_text(value: Any) -> str:
    """Return a value as it is written after the `=` of a Hydra override (hydra-core 1.3.8).

    Args:
        value: as `Override.value()` returns it.
    """
    return Override._get_value_element_as_str(value)


def end_process(code: int) -> None:
    """End this process at once, from any thread: `os._exit`, which is documented despite its name."""
    os._exit(code)

"""Checks that every method passes, for methods of other packages too; they need no pytest.

    from sequel_core.testing import (
        check_effect, check_frozen, check_parity, check_resume, check_strength_zero,
    )

    def test_magnitude(tmp_path):
        check_parity(MagnitudeHParams(strength=5))
        check_effect(MagnitudeHParams(strength=5))
        check_strength_zero(MagnitudeHParams(strength=0))
        check_frozen(MagnitudeHParams(strength=5))
        check_resume(MagnitudeHParams(strength=5), tmp_path)

The method is found by its entry points (see `sequel_core.entry_points`), or it is given:
`implementations={"pytorch": Magnitude, "jax": magnitude}`. Each check raises an AssertionError that names the
difference.
"""

from __future__ import annotations

from sequel_core.testing.frozen import check_frozen
from sequel_core.testing.parity import check_effect, check_parity, check_strength_zero
from sequel_core.testing.resume import check_resume

__all__ = ["check_effect", "check_frozen", "check_parity", "check_resume", "check_strength_zero"]

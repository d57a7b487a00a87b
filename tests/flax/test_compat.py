"""Undocumented behaviour of other packages that the plug-in relies on."""

from __future__ import annotations

import errno
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax import nnx
from jax._src.distributed import global_state

from sequel_flax._compat import (
    coordinator_host,
    error_number,
    set_class,
    write_errors_left_to_the_caller,
)


def test_a_module_with_another_class_keeps_its_variables() -> None:
    class Doubled(nnx.Linear):
        def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
            return 2 * super().__call__(inputs)

    module, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
    before, expected = nnx.state(module), 2 * module(x)
    set_class(module, Doubled)
    assert list(nnx.to_flat_state(nnx.state(module))) == list(nnx.to_flat_state(before))
    merged = nnx.merge(nnx.graphdef(module), nnx.state(module))
    assert isinstance(merged, Doubled)
    np.testing.assert_array_equal(merged(x), expected)


def test_errors_of_tensorstore_have_the_number_of_the_operating_system(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{file}/directory/"}}
    with pytest.raises(ValueError, match="Not a directory") as caught:
        tensorstore.open(spec, create=True, dtype="float32", shape=[2]).result()
    assert error_number(caught.value) == errno.ENOTDIR
    assert error_number(OSError(errno.ENOSPC, "full")) == errno.ENOSPC
    assert error_number(ValueError("another")) is None


def test_failed_writes_are_not_logged_in_the_context(caplog: pytest.LogCaptureFixture) -> None:
    def log_failures() -> list[str]:
        caplog.clear()
        for error in (ValueError("os_error_code='28'"), failure_of_orbax(), ValueError("another")):
            logging.getLogger("absl").error("failed", exc_info=error)
        return [str(record.exc_info[1]) for record in caplog.records if record.exc_info]

    everything = log_failures()
    assert len(everything) == 3
    with write_errors_left_to_the_caller():
        assert log_failures() == ["another"]
    assert log_failures() == everything


def failure_of_orbax() -> OSError:
    with pytest.raises(FileNotFoundError) as caught:
        ocp.StandardCheckpointer().restore("/nowhere/checkpoint")
    return caught.value


def test_closed_event_loops_are_not_reported_in_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(str(unraisable.exc_value)))
    hook = sys.unraisablehook
    with write_errors_left_to_the_caller():
        for message in ("Event loop is closed", "another"):
            sys.unraisablehook(SimpleNamespace(object=None, exc_value=RuntimeError(message)))
    assert reported == ["another"]
    assert sys.unraisablehook is hook


def test_the_machine_of_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coordinator_host() is None
    for address, host in {"machine0:1234": "machine0", "[::1]:1234": "::1"}.items():
        monkeypatch.setattr(global_state, "coordinator_address", address)
        assert coordinator_host() == host

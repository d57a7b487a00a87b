"""A run that is resumed from a checkpoint in the middle of a task ends bit-identical, with every method."""

import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest

from sequel_core import load_result
from sequel_core.algorithms.er import ERHParams
from sequel_core.runs.learner import Mode
from sequel_core.runs.orchestrator import run
from sequel_core.testing import check_resume
from sequel_core.testing.resume import EVERYTHING, assert_same_end, cut_back, go
from tests.resume.short_runs import METHODS, MODES, dropout, learner, stream

QUICK = ("ewc", "derpp", "icarl", "kcl", "mcsgd", "lamaml")
"""By default JAX has these methods, because it compiles for seconds, and PyTorch all of them."""


@pytest.mark.parametrize(
    ("mode", "method"),
    [
        pytest.param(mode, method, marks=[pytest.mark.slow] if mode == "jax" and method not in QUICK else [])
        for method in METHODS
        for mode in MODES
    ],
)
def test_every_method_goes_on_in_the_middle_of_a_task(mode: Mode, method: str, tmp_path: Path) -> None:
    check_resume(METHODS[method], tmp_path, modes=[mode], benchmark=stream(method), dropout=dropout(method))


@pytest.mark.parametrize("mode", MODES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(mode: Mode, tmp_path: Path) -> None:
    benchmark, straight, resumed = stream(), tmp_path / "straight", tmp_path / "resumed"
    go(learner(mode, "er", benchmark), benchmark, straight, EVERYTHING)
    number = cut_back(straight, resumed)
    files = [path for path in (resumed / "checkpoints" / str(number)).rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"checkpoints/{number} is damaged: .*{victim.name} differs"):
        go(learner(mode, "er", benchmark), benchmark, resumed, EVERYTHING)
    assert_same_end(resumed, straight)


@pytest.mark.parametrize("mode", MODES)
def test_a_finished_run_is_read_back_with_its_learner(mode: Mode, tmp_path: Path) -> None:
    benchmark = stream()
    made = learner(mode, "naive", benchmark)
    first = run(made, benchmark, run_dir=tmp_path / "run", progress=False)
    again = learner(mode, "naive", benchmark)
    second = run(again, benchmark, run_dir=tmp_path / "run", progress=False, resume=True)
    assert second.summary == first.summary
    np.testing.assert_array_equal(second.matrix, first.matrix)
    for name, array in made.weights().items():
        np.testing.assert_array_equal(again.weights()[name], array)
    with pytest.raises(ValueError, match="run_dir must be empty or new"):
        run(learner(mode, "naive", benchmark), benchmark, run_dir=tmp_path / "run", progress=False)


@pytest.mark.parametrize("mode", MODES)
def test_what_does_not_fit_is_refused_and_named(mode: Mode, tmp_path: Path) -> None:
    benchmark, run_dir = stream(), tmp_path / "run"
    run(learner(mode, "naive", benchmark), benchmark, run_dir=run_dir, progress=False)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for resume in (True, "auto"):
        with pytest.raises(ValueError, match=r"holds another run.*algo\.name is 'naive' there and 'er' here"):
            run(learner(mode, "er", benchmark), benchmark, run_dir=run_dir, progress=False, resume=resume)
    with pytest.raises(ValueError, match="resume needs a run_dir that holds a run"):
        run(learner(mode, "er", benchmark), benchmark, run_dir=tmp_path / "none", progress=False, resume=True)
    config = load_result(run_dir).config
    other = learner(mode, "ewc", benchmark)
    with pytest.raises(ValueError, match=r"does not fit: .* resume with the settings of the run"):
        run(other, benchmark, run_dir=run_dir, progress=False, resume=True, config=config)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "none").exists()


def test_plain_orbax_reads_the_weights(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    benchmark = stream()
    made = learner("jax", "ewc", benchmark)
    run(made, benchmark, run_dir=tmp_path / "run", progress=False)
    manager = ocp.CheckpointManager((tmp_path / "run" / "checkpoints").absolute())
    newest = manager.latest_step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # orbax's, of the devices that it restores to
        restored = manager.restore(newest, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    manager.close()
    params = restored["state"]["ts"]["params"]
    for name, array in made.weights().items():
        layer, part = name.split("/")
        np.testing.assert_array_equal(params[layer][part], array)


def test_load_from_checkpoint_reads_the_weights(tmp_path: Path) -> None:
    import torch

    import sequel_lightning
    from sequel_lightning.backbones import canonical_weights

    benchmark = stream()
    made = learner("pytorch", "ewc", benchmark)
    run(made, benchmark, run_dir=tmp_path / "run", progress=False)
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    module = sequel_lightning.EWC.load_from_checkpoint(
        newest / "lightning.ckpt",
        weights_only=True,
        net=sequel_lightning.MLP((12,), benchmark.num_classes, image_shape=benchmark.image_shape),
        optimizer=torch.optim.SGD,
        hparams=METHODS["ewc"],
        spec=benchmark.spec,
    )
    assert int(module.task_index) == len(benchmark) - 1
    for name, array in made.weights().items():
        np.testing.assert_array_equal(canonical_weights(module.net)[name], array)


def test_lightnings_file_is_written_without_a_copy_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "er", ERHParams(mem_size=200_000, mem_batch_size=6))
    made = learner("pytorch", "er", stream())
    tracemalloc.start()
    try:
        made.save(tmp_path / "1")()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = (tmp_path / "1" / "lightning.ckpt").stat().st_size
    assert size > 200_000 * 8 * 8  # bytes of the memory's images
    assert peak < size / 5

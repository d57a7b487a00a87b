"""Hooks: order and arguments of the calls, no extra compilation, unchanged weights; the built-in hooks."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sequel_core import load_result, run
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, CheckpointHParams
from sequel_core.runs.learner import FitMonitor, Progress
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.task import Batch
from sequel_flax import ALGORITHMS, naive
from sequel_flax.evaluation import Evaluator
from sequel_flax.hooks import Hook, ImageGrid, PeriodicEvaluation, ProfilerTrace, ProgressBar
from tests.flax.parts import (
    BATCH,
    EWC,
    KCL,
    LAMAML,
    SILENT,
    STEPS,
    batches,
    flat,
    learner,
    rotated,
    same,
    settings,
    sgd,
    stream_for,
    user_loop,
)

METHODS = [f"{when}_{part}" for part in ("stream", "task", "epoch", "step") for when in ("before", "after")]
METHODS += ["before_evaluation", "after_evaluation"]


class Recording(Hook):
    """Records the arguments of every call."""

    def __init__(self, every: int = 1, methods: Any = METHODS) -> None:
        super().__init__(every)
        self.calls: list[tuple[str, int, Any, dict[str, Any]]] = []  # name, ts.step, batch, metrics
        self.weights: list[dict[str, FloatArray]] = []
        for name in methods:
            setattr(self, name, lambda *args, name=name: self.record(name, *args))

    def record(self, name: str, ts: Any, state: Any, batch: Any, metrics: Any, writer: Any) -> None:
        self.calls.append((name, int(ts.step), batch, dict(metrics)))
        self.weights.append(flat(ts.params))


class Recorder:
    """A writer with two of the methods of clu's MetricWriter."""

    def __init__(self) -> None:
        self.scalars: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[int, dict[str, Any]]] = []

    def write_scalars(self, step: int, scalars: Any) -> None:
        self.scalars.append((step, dict(scalars)))

    def write_images(self, step: int, images: Any) -> None:
        self.images.append((step, dict(images)))

    def write_texts(self, step: int, texts: Any) -> None:
        """Ignore them."""

    def write_hparams(self, hparams: Any) -> None:
        """Ignore them."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


# -- order of the calls


def test_the_order_of_the_calls(tmp_path: Path) -> None:
    notes = Recording(every=4)
    model = learner(NaiveHParams(), training=settings(epochs_per_task=(2, 1)), hooks=[notes])
    off = CheckpointHParams(keep=0)
    run(model, rotated(2), run_dir=tmp_path, progress=False, evaluate_every="epoch", checkpoint=off)
    evaluated = ["before_evaluation", "after_evaluation"]
    assert [(name, step) for name, step, _, _ in notes.calls] == [
        ("before_stream", 0),
        ("before_task", 0),
        ("before_epoch", 0),
        ("before_step", 3),
        ("after_step", 4),
        ("after_epoch", 5),
        *((name, 5) for name in evaluated),
        ("before_epoch", 5),
        ("before_step", 7),
        ("after_step", 8),
        ("after_epoch", 10),
        ("after_task", 10),
        *((name, 10) for name in evaluated),
        ("before_task", 10),
        ("before_epoch", 10),
        ("before_step", 11),
        ("after_step", 12),
        ("after_epoch", 15),
        ("after_task", 15),
        *((name, 15) for name in evaluated * 2),
        ("after_stream", 15),
    ]
    positions = [
        tuple(metrics.get(k) for k in ("task", "epoch", "task_steps", "split"))
        for name, _, _, metrics in notes.calls
        if name.startswith("before")
    ]
    assert positions == [
        (None, None, None, None),
        (0, None, 10, None),
        (0, 0, None, None),
        (0, 0, None, None),
        (0, None, None, "test"),
        (0, 1, None, None),
        (0, 1, None, None),
        (0, None, None, "test"),
        (1, None, 5, None),
        (1, 0, None, None),
        (1, 0, None, None),
        (0, None, None, "test"),
        (1, None, None, "test"),
    ]
    with_batch = {name for name, _, batch, _ in notes.calls if batch is not None}
    assert with_batch == {"before_step", "after_step"}
    accuracies = [metrics["accuracy"] for name, _, _, metrics in notes.calls if name == "after_evaluation"]
    assert accuracies[-2:] == load_result(tmp_path).matrix[1].tolist()


LONGER = settings(epochs_per_task=(2, 1, 1), log_every_n_steps=4)


@cache
def stepwise(hparams: AlgorithmHParams) -> tuple[Recording, list[Batch], list[float]]:
    """Return the records of a hook at every step, the batches, and the losses of a plain loop."""
    stream, notes = stream_for(hparams), Recording(methods=["before_step", "after_step"])
    expected: list[Batch] = []
    model = learner(hparams, stream, LONGER, hooks=[notes], steps_per_call=1)
    for task in model.hparams.training_tasks(stream):
        expected += batches(task, LONGER, model.algorithm.training_split(model.state, task.train))
        model.fit_task(task, SILENT)
    return notes, expected, user_loop(ALGORITHMS[hparams.name](hparams), stream, LONGER, sgd())[2]


@pytest.mark.parametrize("steps_per_call", [1, pytest.param(3, marks=pytest.mark.slow), None])
@pytest.mark.parametrize(
    "hparams", [EWC, *(pytest.param(h, marks=pytest.mark.slow) for h in (KCL, LAMAML))], ids=lambda h: h.name
)
def test_a_step_hook_is_called_with_its_step(
    hparams: AlgorithmHParams, steps_per_call: int | None, compiled: Counter[str]
) -> None:
    """The intervals of three hooks split the compiled calls."""
    every, expected, losses = stepwise(hparams)
    compiled.clear()
    notes = [
        Recording(7, ["before_step", "after_step"]),
        Recording(3, ["before_step"]),
        Recording(10, ["after_step"]),
    ]
    stream = stream_for(hparams)
    model = learner(hparams, stream, LONGER, hooks=notes, steps_per_call=steps_per_call)
    for task in model.hparams.training_tasks(stream):
        model.fit_task(task, SILENT)
    assert compiled["jit(_traced_step)"] + compiled["jit(_traced_loop)"] == 1
    assert same(model.weights(), every.weights[-1])
    assert len(losses) == len(expected) == model.step >= 20
    for note, interval in zip(notes, (7, 3, 10), strict=True):
        numbers = {at + (name == "before_step") for name, at, _, _ in note.calls}
        assert sorted(numbers) == list(range(interval, model.step + 1, interval))
        for (name, at, batch, metrics), weights in zip(note.calls, note.weights, strict=True):
            number = at + (name == "before_step")
            twin = 2 * (number - 1) + (name == "after_step")
            assert (name, at, metrics) == (*every.calls[twin][:2], every.calls[twin][3])
            assert same(weights, every.weights[twin])
            np.testing.assert_array_equal(batch.x, expected[number - 1].x)
            np.testing.assert_array_equal(batch.y, expected[number - 1].y)
            if name == "after_step":
                np.testing.assert_allclose(metrics["loss"], losses[number - 1], rtol=1e-5)


def test_the_loss_of_a_step_uses_the_weights_before_the_step() -> None:
    notes = Recording(3, ["before_step", "after_step"])
    model = learner(NaiveHParams(), hooks=[notes])
    model.fit_task(rotated().tasks[0], SILENT)
    assert [name for name, *_ in notes.calls] == ["before_step", "after_step"]
    (_, _, batch, _), (_, _, _, metrics) = notes.calls
    w = {k: v.astype(np.float64) for k, v in notes.weights[0].items()}
    normalisation = rotated().spec.normalisation
    x = batch.x.astype(np.float64) * np.asarray(normalisation.scale) + np.asarray(normalisation.shift)
    hidden = np.tanh(x.reshape(BATCH, -1) @ w["Dense_0/kernel"] + w["Dense_0/bias"])
    logits = hidden @ w["Dense_1/kernel"] + w["Dense_1/bias"]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(metrics["loss"], -log_p[np.arange(BATCH), batch.y].mean(), rtol=1e-5)
    assert metrics["accuracy"] == (logits.argmax(1) == batch.y).mean()


def test_hooks_change_neither_progress_reports_nor_weights() -> None:
    def reports(*hooks: Hook) -> tuple[list[Progress], dict[str, FloatArray]]:
        progress: list[Progress] = []
        training = settings(log_every_n_steps=4, epochs_per_task=2)
        model = learner(NaiveHParams(), training=training, hooks=hooks)
        for task in rotated(2).tasks:
            model.fit_task(task, FitMonitor(progress.append, lambda: None))
        return progress, model.weights()

    expected, weights = reports()
    with_hook, weights_with_hook = reports(Recording(3))
    assert with_hook == expected
    assert same(weights_with_hook, weights)


def test_an_epochs_metrics_are_means_over_all_its_steps() -> None:
    every = Recording(methods=["after_step", "after_epoch"])
    model = learner(NaiveHParams(), training=settings(log_every_n_steps=2, epochs_per_task=2), hooks=[every])
    model.fit_task(rotated().tasks[0], SILENT)
    by_name = {n: [m for name, _, _, m in every.calls if name == n] for n in ("after_step", "after_epoch")}
    for epoch, metrics in enumerate(by_name["after_epoch"]):
        steps = by_name["after_step"][epoch * STEPS : (epoch + 1) * STEPS]
        for name in ("loss", "accuracy"):
            np.testing.assert_allclose(metrics[name], np.mean([m[name] for m in steps]), rtol=1e-6)


def test_only_step_hooks_split_compiled_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def lengths(*hooks: Hook) -> list[int]:
        model = learner(NaiveHParams(), hooks=hooks, steps_per_call=50)
        taken: list[int] = []
        loop = model.steps._loop

        def counting(*args: Any) -> Any:
            taken.append(args[-1])
            return loop(*args)

        monkeypatch.setattr(model.steps, "_loop", counting)
        model.fit_task(rotated().tasks[0], SILENT)
        return taken

    assert lengths(Recording(methods=["before_epoch", "after_task"]), Hook()) == [STEPS]
    assert lengths(Recording(3, ["before_step"])) == [2, 1, 2]


def test_the_next_step_deletes_references_but_not_copies() -> None:
    class Keep(Hook):
        def before_step(self, ts: Any, state: Any, batch: Batch, metrics: Any, writer: Any) -> None:
            self.reference = ts.params

        def after_step(self, ts: Any, state: Any, batch: Batch, metrics: Any, writer: Any) -> None:
            self.copy = jax.device_get(ts.params)

    hook, notes = Keep(3), Recording(3, ["after_step"])
    model = learner(NaiveHParams(), hooks=[notes, hook])
    model.fit_task(rotated().tasks[0], SILENT)
    assert same(flat(hook.copy), notes.weights[0])
    assert not same(flat(hook.copy), model.weights())
    with pytest.raises(RuntimeError, match="Array has been deleted"):
        flat(hook.reference)


class Fails(Hook):
    def after_step(self, ts: Any, state: Any, batch: Batch, metrics: Any, writer: Any) -> None:
        raise OSError("in the user's hook")

    closed = False

    def close(self) -> None:
        self.closed = True


def test_an_error_in_a_hook_ends_the_run_and_closes_all_hooks(tmp_path: Path) -> None:
    hook, profile = Fails(every=7), ProfilerTrace(tmp_path / "profile", first=6, steps=99)
    model = learner(NaiveHParams(), hooks=[profile, hook])
    with pytest.raises(OSError, match="in the user's hook"):
        run(model, rotated(), run_dir=tmp_path / "run", progress=False)
    summary = load_result(tmp_path / "run").summary
    assert (summary["status"], summary["steps"]) == ("failed", 7)
    assert hook.closed
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_an_invalid_interval_raises(every: Any) -> None:
    with pytest.raises(ValueError, match=f"every must be a number of steps >= 1, got {every}"):
        Hook(every)


def test_an_object_that_is_not_a_hook_raises() -> None:
    with pytest.raises(
        ValueError, match=r"hooks must be objects of subclasses of sequel_flax.hooks.Hook, got a str"
    ):
        learner(NaiveHParams(), hooks=["progress"])


# -- the writer


def test_a_hook_writes_to_all_writers_that_have_not_failed() -> None:
    class Writes(Hook):
        def after_epoch(self, ts: Any, state: Any, batch: Any, metrics: Any, writer: Any) -> None:
            writer.write_scalars(int(ts.step), {"value": 2.0})

    class Full(Recorder):
        def write_scalars(self, step: int, scalars: Any) -> None:
            raise OSError("no space left")

    first, last = Recorder(), Recorder()
    model = learner(NaiveHParams(), writers=[first, Full(), last], hooks=[Writes()])
    with pytest.warns(RuntimeWarning, match="Full failed .no space left.; the run continues without it"):
        model.fit_task(rotated().tasks[0], SILENT)
    model.fit_task(rotated().tasks[1], SILENT)
    assert first.scalars == last.scalars == [(5, {"value": 2.0}), (10, {"value": 2.0})]


def test_an_unknown_method_of_the_writer_raises() -> None:
    class Typo(Hook):
        def before_task(self, ts: Any, state: Any, batch: Any, metrics: Any, writer: Any) -> None:
            writer.write_scalar(1, {})

    with pytest.raises(AttributeError, match="a metric writer has no write_scalar"):
        learner(NaiveHParams(), hooks=[Typo()]).fit_task(rotated().tasks[0], SILENT)


# -- built-in hooks


def test_periodic_evaluation_equals_the_learners_evaluation_at_that_step(tmp_path: Path) -> None:
    writer = Recorder()
    stream = rotated(validation=0.2)
    hook = PeriodicEvaluation(naive(NaiveHParams()), stream, [0, 2], "validation", every=3)
    model = learner(NaiveHParams(), stream, writers=[writer], hooks=[hook])
    expected = []

    class Compare(Hook):
        def after_step(self, ts: Any, state: Any, batch: Batch, metrics: Any, writer: Any) -> None:
            expected.append([model.evaluate(stream.tasks[j], "validation") for j in (0, 2)])

    model.hooks.of_steps.append(Compare(3))
    for task in stream.tasks:
        model.fit_task(task, SILENT)
    assert [step for step, _ in writer.scalars] == list(range(3, model.step + 1, 3))
    for (_, scalars), evaluations in zip(writer.scalars, expected, strict=True):
        assert scalars == {
            f"periodic/validation/{name}/task_{j}": value
            for j, evaluation in zip((0, 2), evaluations, strict=True)
            for name, value in (("accuracy", evaluation.score), ("loss", evaluation.loss))
        }


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tasks": [3]}, r"tasks must be indices from 0 to 2, got \[3\]"),
        ({"tasks": []}, r"tasks must be indices from 0 to 2, got \[\]"),
        ({"split": "tests"}, "split must be test, validation or train, got 'tests'"),
        ({"split": "validation"}, "split must have samples, got 'validation' with none in task 0"),
        ({"every": 0}, "every must be"),
    ],
)
def test_invalid_options_of_periodic_evaluation_raise(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PeriodicEvaluation(naive(NaiveHParams()), rotated(), **options)


def test_the_image_grid_shows_the_batch() -> None:
    writer = Recorder()
    model = learner(NaiveHParams(), writers=[writer], hooks=[ImageGrid(every=4, name="inputs")])
    task = rotated().tasks[0]
    model.fit_task(task, SILENT)
    ((step, images),) = writer.images
    order = plan.epoch_batches(0, 0, 0, len(task.train), BATCH)
    picture = images["inputs"]
    assert (step, picture.shape, picture.dtype) == (4, (1, 3 * 9 - 1, 3 * 9 - 1, 3), np.uint8)
    for k, image in enumerate(task.train.take(order[3]).x):
        top, left = k // 3 * 9, k % 3 * 9
        np.testing.assert_array_equal(picture[0, top : top + 8, left : left + 8], np.repeat(image, 3, -1))


def test_the_profiler_records_its_steps(tmp_path: Path) -> None:
    hooks = [
        ProfilerTrace(tmp_path / "two", first=3, steps=2),
        ProfilerTrace(tmp_path / "all", first=8, steps=99),
    ]
    model = learner(NaiveHParams(), hooks=hooks)
    for task in rotated(2).tasks:
        model.fit_task(task, SILENT)
    model.end_stream()
    for name, steps in (("two", 2), ("all", 2)):  # two calls in "all": step 8, then steps 9 and 10
        (file,) = (tmp_path / name).glob("plugins/profile/*/*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        assert sum(event.get("name", "").endswith(" _take") for event in events) == steps
        assert list((tmp_path / name).glob("plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize("name", ["first", "steps"])
def test_zero_steps_of_the_profiler_raise(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number of steps >= 1, got 0"):
        ProfilerTrace("here", **{name: 0})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_bar_is_shown_on_terminals_only() -> None:
    shown, silent = Terminal(), io.StringIO()
    hooks = [ProgressBar(every=2, file=shown), ProgressBar(every=2, file=silent)]
    model = learner(NaiveHParams(), hooks=hooks)
    assert model.shows_progress
    assert not learner(NaiveHParams(), hooks=[Hook()]).shows_progress
    for task in rotated(2).tasks:
        model.fit_task(task, SILENT)
    model.close()
    assert silent.getvalue() == ""
    last = shown.getvalue().rstrip().rpartition("\r")[2]
    assert last.startswith("task 1: 100%")
    assert f"{STEPS}/{STEPS}" in last
    assert "loss=" in last


# -- user-defined loops


def test_hooks_in_a_user_defined_loop(tmp_path: Path) -> None:
    stream, algorithm, writer = rotated(1), naive(NaiveHParams()), Recorder()
    shown = Terminal()
    hooks: list[Hook] = [
        PeriodicEvaluation(algorithm, stream, every=2),
        ImageGrid(every=3),
        ProgressBar(every=1, file=shown),
        ProfilerTrace(tmp_path, first=2, steps=2),
    ]
    model = learner(NaiveHParams(), stream)
    ts, state, training = model.ts, model.state, model.training
    (task,) = stream.tasks
    evaluate, step = Evaluator(algorithm, stream.spec), jax.jit(algorithm.train_step)
    expected = []
    ts, state = algorithm.start_task(ts, state, task)
    for hook in hooks:
        hook.before_task(ts, state, None, {"task": 0, "task_steps": STEPS}, writer)
    for number, batch in enumerate(batches(task, training), start=1):
        due = [hook for hook in hooks if hook.due(number)]
        for hook in due:
            hook.before_step(ts, state, batch, {"task": 0}, writer)
        ts, state, outputs = step(ts, state, batch)
        for hook in due:
            hook.after_step(ts, state, batch, {"task": 0, "loss": float(outputs["loss"])}, writer)
        if number in (2, 4):
            expected.append((number, evaluate(ts, state, task.test).score))
    for hook in hooks:
        hook.close()
    written = [(at, scalars["periodic/test/accuracy/task_0"]) for at, scalars in writer.scalars]
    assert written == expected
    assert [at for at, _ in writer.images] == [3]
    assert f"{STEPS}/{STEPS}" in shown.getvalue()
    assert list(tmp_path.rglob("*.xplane.pb"))

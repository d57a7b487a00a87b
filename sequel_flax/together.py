"""Many runs at once: one compiled program takes the steps of several runs.

Each run is an ordinary run of the orchestrator, in a thread of its own, with its own directory, records and
checkpoints. Its learner asks the program to start a task, to take steps, to end a task and to evaluate. When
all runs have asked, the program does what the run that is furthest behind asked for, for all runs with the
same request. Only one thread runs at a time.

The states of the runs are stacked. Each run has a place in the stack, and keeps it: a rounding error may
depend on the place and on the width of the stack. The places of runs that have ended are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sequel_core.runs.directory import TOGETHER, new_path
from sequel_core.runs.files import read_json, write_json
from sequel_core.runs.formatting import score_text
from sequel_core.runs.learner import Evaluation
from sequel_core.runs.memory import available_memory_bytes
from sequel_core.runs.orchestrator import Resume, Shown, check_run, run
from sequel_core.runs.process import event_errors_left_to_the_caller
from sequel_core.runs.results import Result
from sequel_core.runs.signals import Signals
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import AnySplit, Batch, Task
from sequel_flax.boundaries import stack_plans
from sequel_flax.coroutines import Coroutine, Finished
from sequel_flax.evaluation import Totals
from sequel_flax.grouping import Group, Numbers, grouped, numbers_of, with_numbers
from sequel_flax.learner import FlaxLearner
from sequel_flax.sharding import RUNS, copies, of_runs, sharded
from sequel_flax.steps import RunningMetrics, one_step, steps_in_loop, strong_types

COPIES = 4
"""Copies of its state that a run needs: before and after a step, in a checkpoint, and outside the program."""

Outcome = Result | Exception


class Request(NamedTuple):
    """What a run asks its program to do.

    Args:
        action: The name of a method of `Program`.
        same: Requests with equal values can be done together.
        place: Where the run is in the stream; the smallest is furthest behind.
        argument: The argument for the run.

    Example:
        >>> Request("end", (), (0, 2), None) < Request("start", (), (1, 0), None)
        True
    """

    action: str
    same: tuple[Any, ...]
    place: tuple[int, ...]
    argument: Any


class Program:
    """Takes the steps of several runs, whose states are stacked.

    Args:
        learners: The learners of the runs by their places.
        names: The names of the numbers that are arguments; see `grouping`.
        width: The number of places, at least that of the runs.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import EWCHParams, OptimizerHParams
        >>> from sequel_flax import MLP, make_learner
        >>> digits, sgd = RotatedDigits(num_tasks=2, subset=20), OptimizerHParams(lr=0.1)
        >>> learners = [make_learner(EWCHParams(ewc_lambda=s), MLP((8,)), sgd, digits) for s in (1.0, 10.0)]
        >>> Program(dict(enumerate(learners)), ("algo.ewc_lambda",), 3).numbers["algo.ewc_lambda"].tolist()
        [1.0, 10.0, 1.0]
    """

    def __init__(self, learners: Mapping[int, FlaxLearner], names: Sequence[str], width: int) -> None:
        self.width = width
        self._leader = leader = next(iter(learners.values()))
        self.steps, self.evaluator = leader.steps, leader.evaluator
        seated = [learners.get(k, leader) for k in range(width)]
        self.numbers: Numbers = {
            name: jnp.broadcast_to(values, width) for name, values in numbers_of(seated, names).items()
        }
        self._structures = [jax.tree.structure((learner.ts, learner.state)) for learner in seated]
        self._tx = leader.ts.tx
        leaves = jax.tree.leaves((leader.ts, leader.state))
        self._mesh = leader.mesh
        stacked = of_runs(self._mesh, width)

        def stack(leaves: Sequence[Any]) -> list[jax.Array]:
            return [jnp.broadcast_to(a, (width, *a.shape)) for a in leaves]

        self._stack = jax.jit(stack, out_shardings=stacked)(leaves)
        self._new: dict[int, list[Any]] = {}  # leaves that are not in the stack yet, by place
        self._read: dict[int, Any] = {}  # states that were read from the stack, by place
        for k, learner in learners.items():
            self.write(k, (learner.ts, learner.state))
        self._slice = jax.jit(lambda leaves, k: [a[k] for a in leaves], out_shardings=copies(self._mesh))
        self._set = jax.jit(
            lambda leaves, new, k: [a.at[k].set(b) for a, b in zip(leaves, new, strict=True)],
            donate_argnums=0,
            out_shardings=stacked,
        )
        self._start = self._compiled(self._traced_start, 0)
        self._end = self._compiled(self._traced_end, 0)
        self._loop = self._compiled(self._traced_loop, 0, 0, None)
        self._single = self._compiled(self._traced_step, 0, 0)
        self._measure = jax.jit(self._traced_measure, out_shardings=copies(self._mesh))

    def _compiled(self, function: Callable[..., Any], *axes: int | None) -> Callable[..., Any]:
        sharding = of_runs(self._mesh, self.width)
        mapped = jax.vmap(function, in_axes=(0, 0, 0, *axes))
        return jax.jit(mapped, donate_argnums=(1, 2), out_shardings=sharding)

    # -- states

    def read(self, k: int) -> Any:
        """Return the train state and the state of the run in a place."""
        if k not in self._read:
            leaves = self._new[k] if k in self._new else self._slice(self._stack, k)
            self._read[k] = jax.tree.unflatten(self._structures[k], leaves)
        return self._read[k]

    def write(self, k: int, states: Any) -> None:
        """Set the train state and the state of the run in a place."""
        self._new[k] = jax.tree.leaves(strong_types(states))
        self._read.pop(k, None)

    def _stacked(self) -> Any:
        """Return the stacked train states and states."""
        for k, leaves in self._new.items():
            self._stack = self._set(self._stack, leaves, k)
        self._new.clear()
        return jax.tree.unflatten(self._structures[0], self._stack)

    def _apply(self, places: Sequence[int], others: Sequence[int], function: Any, *args: Any) -> Any:
        """Call a compiled function of the stacked states; return what it returns besides them.

        Args:
            places: The places of the runs whose states change.
            others: The places of the runs whose states must not change.
            function: The function.
            args: Its further arguments.
        """
        kept = {k: jax.tree.leaves(self.read(k)) for k in others}
        ts, state, *rest = function(self.numbers, *self._stacked(), *args)
        self._stack = jax.tree.leaves((ts, state))
        self._new.update(kept)
        for k in places:
            self._read.pop(k, None)
        return rest

    # -- requests

    def run(self, coroutines: Mapping[int, Coroutine]) -> Iterator[tuple[int, Any]]:
        """Run coroutines, which ask with a `Request`, to their ends; yield their places and results."""
        waiting: dict[int, Request] = {}
        answers: dict[int, Any] = dict.fromkeys(coroutines)
        try:
            while answers or waiting:
                for k, answer in answers.items():
                    question = coroutines[k].resume(answer)
                    if isinstance(question, Finished):
                        yield k, question.result
                    else:
                        waiting[k] = question
                answers = self._answers(waiting) if waiting else {}
                for k in answers:
                    del waiting[k]
        except BaseException as error:
            for k in {*waiting, *answers}:
                while not isinstance(coroutines[k].resume(error), Finished):
                    pass
            raise

    def _answers(self, waiting: Mapping[int, Request]) -> dict[int, Any]:
        """Do what the run that is furthest behind asked for, for all runs that asked for the same."""
        first = min(waiting.values(), key=lambda request: request.place)
        arguments = {
            k: request.argument
            for k, request in sorted(waiting.items())
            if (request.action, request.same) == (first.action, first.same)
        }
        others = [k for k in waiting if k not in arguments]
        try:
            answers: dict[int, Any] = getattr(self, first.action)(arguments, others)
        except Exception as error:  # the runs raise it
            return dict.fromkeys(arguments, error)
        return answers

    def start(self, plans: Mapping[int, Any], others: Sequence[int]) -> dict[int, Any]:
        """Start a task of runs, from the results of `plan_start`."""
        self._apply([*plans], others, self._start, stack_plans(self._padded(plans)))
        return dict.fromkeys(plans)

    def end(self, plans: Mapping[int, Any], others: Sequence[int]) -> dict[int, Any]:
        """End a task of runs, from the results of `plan_end`."""
        self._apply([*plans], others, self._end, stack_plans(self._padded(plans)))
        return dict.fromkeys(plans)

    def train(self, calls: Mapping[int, Any], others: Sequence[int]) -> dict[int, Any]:
        """Take steps of runs, from running metrics, batches and the number of steps; return the metrics."""
        metrics, batches, (steps, *_) = zip(*self._padded(calls), strict=True)
        of_leader = jax.tree.structure(self.steps.no_metrics)
        running = [jax.tree.unflatten(of_leader, jax.tree.leaves(values)) for values in metrics]
        single = self.steps.steps_per_call == 1
        stacked = sharded(_stack_arrays(batches), self._mesh, axis=1 if single else 2, runs=True)
        arguments = (_stack_arrays(running), stacked)
        if single:
            (after,) = self._apply([*calls], others, self._single, *arguments)
        else:
            (after,) = self._apply([*calls], others, self._loop, *arguments, steps)
        after = jax.device_get(after)
        return {k: jax.tree.map(lambda a, k=k: a[k], after) for k in calls}

    def evaluate(self, splits: Mapping[int, AnySplit], others: Sequence[int]) -> dict[int, Evaluation]:
        """Evaluate runs on their samples, one after the other: batches are so large that a map is slower."""
        totals = {k: Totals(self.evaluator.objective) for k in splits}
        numbers = {k: {name: values[k] for name, values in self.numbers.items()} for k in splits}
        of_split = {id(samples): [k for k in splits if splits[k] is samples] for samples in splits.values()}
        for places in of_split.values():
            for batch, valid in self.evaluator.batches(splits[places[0]]):
                for k in places:
                    placed = sharded(batch, self._mesh)
                    sums, outputs = self._measure(numbers[k], *self._as_leader(k), placed, valid)
                    totals[k].add(sums, outputs, batch.y, valid)
        return {k: total.evaluation(len(splits[k])) for k, total in totals.items()}

    def _as_leader(self, k: int) -> Any:
        """Return the states of the run in a place, in the structure of those of the first run."""
        return jax.tree.unflatten(self._structures[0], jax.tree.leaves(self.read(k)))

    def _padded(self, values: Mapping[int, Any]) -> list[Any]:
        """Return a value for each place, that of the first run where there is none."""
        first = next(iter(values.values()))
        return [values.get(k, first) for k in range(self.width)]

    # -- traced functions of one run

    def _traced_start(self, numbers: Numbers, ts: Any, state: Any, plan: Any) -> Any:
        algorithm, ts = with_numbers(self._leader, numbers, ts)
        return self._states(*algorithm.apply_start(ts, state, plan))

    def _traced_end(self, numbers: Numbers, ts: Any, state: Any, plan: Any) -> Any:
        algorithm, ts = with_numbers(self._leader, numbers, ts)
        return self._states(*algorithm.apply_end(ts, state, plan))

    def _traced_step(self, numbers: Numbers, ts: Any, state: Any, running: Any, batch: Batch) -> Any:
        algorithm, ts = with_numbers(self._leader, numbers, ts)
        ts, state, running = one_step(algorithm.train_step, self.steps.metrics, ts, state, running, batch)
        return *self._states(ts, state), running

    def _traced_loop(
        self, numbers: Numbers, ts: Any, state: Any, running: Any, batches: Batch, steps: Any
    ) -> Any:
        algorithm, ts = with_numbers(self._leader, numbers, ts)
        ts, state, running = steps_in_loop(
            algorithm.train_step, self.steps.metrics, ts, state, running, batches, steps
        )
        return *self._states(ts, state), running

    def _traced_measure(self, numbers: Numbers, ts: Any, state: Any, batch: Batch, valid: Any) -> Any:
        algorithm, ts = with_numbers(self._leader, numbers, ts)
        return self.evaluator.measure(algorithm, ts, state, batch, valid)

    def _states(self, ts: Any, state: Any) -> tuple[Any, Any]:
        """Return the states with the optimizer of the stack."""
        strong: tuple[Any, Any] = strong_types((ts.replace(tx=self._tx), state))
        return strong


def _stack_arrays(trees: Sequence[Any]) -> Any:
    """Return trees of NumPy arrays of the same shapes, stacked."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *trees)


class Member(FlaxLearner):
    """The learner of a run in a program; it is a copy of the run's learner, without its states.

    Args:
        learner: The learner of the run.
        program: The program.
        k: The place of the run in the program.
        on_start: Called when the run directory exists.

    Example:
        >>> Member.mode
        'jax'
    """

    def __init__(
        self, learner: FlaxLearner, program: Program, k: int, on_start: Callable[[], None] = lambda: None
    ) -> None:
        copied = {name: value for name, value in vars(learner).items() if name not in ("ts", "state")}
        vars(self).update(copied)
        self._program, self._place, self._on_start = program, k, on_start
        self._task: int | None = None  # the current task, or the last one; None if it is not known
        self.steps = program.steps
        self.ask: Callable[[Request], Any] = lambda request: None
        self.evaluator: Any = self._evaluate

    @property
    def ts(self) -> Any:
        """The train state, a copy of what the program has."""
        return self._program.read(self._place)[0]

    @ts.setter
    def ts(self, ts: Any) -> None:
        self._program.write(self._place, (ts, self.state))

    @property
    def state(self) -> Any:
        """The state of the algorithm, a copy of what the program has."""
        return self._program.read(self._place)[1]

    @state.setter
    def state(self, state: Any) -> None:
        self._task = None
        self._program.write(self._place, (self.ts, state))

    def start_stream(self, config: Mapping[str, Any], resumed: bool = False) -> None:
        """Record the program, and start the stream."""
        self._on_start()
        super().start_stream(config, resumed)

    def _start_task(self, task: Task, num_steps: int) -> None:
        plan = self.algorithm.plan_start(self.state, task, num_steps)
        self._task = task.index
        self._request("start", (), (0,), plan)

    def _end_task(self, batches: Iterator[Batch]) -> None:
        self._request("end", (), (2,), self.algorithm.plan_end(self.state, batches))

    def _train(self, running: RunningMetrics, batches: Batch, steps: int) -> RunningMetrics:
        shapes = tuple((a.shape, a.dtype) for a in jax.tree.leaves(batches))
        done = 0 if self._position is None else self._position.done
        after: RunningMetrics = self._request(
            "train", (steps, shapes), (1, done, 1), (running, batches, steps)
        )
        return after

    def _evaluate(self, ts: Any, state: Any, samples: AnySplit) -> Evaluation:
        place = (3,) if self._position is None else (1, self._position.done, 0)
        size = self._program.evaluator.batch_size(samples)
        evaluation: Evaluation = self._request("evaluate", (size,), place, samples)
        return evaluation

    def _request(self, action: str, same: tuple[Any, ...], place: tuple[int, ...], argument: Any) -> Any:
        if self._task is None:
            self._task = int(self.state.stream.task)
        return self.ask(Request(action, same, (self._task, *place), argument))


class Seats(NamedTuple):
    """The runs of a program.

    Args:
        places: The place of each run, by its index.
        width: The width of the program.
        names: The names of the numbers that are arguments.

    Example:
        >>> Seats({0: 0, 3: 1}, 2, ()).width
        2
    """

    places: dict[int, int]
    width: int
    names: tuple[str, ...]


def run_together(
    learners: Sequence[FlaxLearner],
    benchmark: Benchmark | Sequence[Benchmark],
    run_dirs: Sequence[str | Path] | None = None,
    *,
    width: int | None = None,
    progress: bool = True,
    resume: Resume = False,
    each: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> list[Outcome]:
    """Do what `sequel_core.run` does for many runs at once, in as few compiled programs as possible.

    Runs share a program if they differ only in numbers: the seed, the learning rate, momentum, weight decay,
    clipping, and settings of the algorithm that are real numbers, such as `ewc_lambda`. For settings of the
    algorithm and the optimizer, the learners must come from `make_learner`, with `OptimizerHParams` or the
    same optax object as the optimizer. Other runs have programs of their own.

    Each run ends with the same numbers as alone, up to rounding, and has its own directory, records and
    checkpoints. If the loss of a run is not finite, that run ends, and the others continue.

    Args:
        learners: One learner for each run, at least one.
        benchmark: The stream, or one for each run.
        run_dirs: One empty or new directory for each run; None for new ones under `runs/`.
        width: The maximum number of runs in a program, >= 1; None for as many as fit into half of the
            memory that is available. A resumed run keeps its own.
        progress: Whether to print which runs share a program, and a line at the end of each run.
        resume: Resume the runs in `run_dirs`; see `sequel_core.run`. Give the same learners.
        each: Further arguments of `sequel_core.run` for each run, such as `config` and `callbacks`.
        options: Arguments of `sequel_core.run` for all runs, such as `evaluate_every` and `checkpoint`.

    Returns:
        For each run its result, or the exception that ended it, such as a `DivergenceError`.

    Raises:
        ValueError: An argument does not fit the learners or the benchmark; nothing was trained.
        InterruptedRunError: A signal was received; every run has written a checkpoint.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import EWCHParams, OptimizerHParams, TrainingHParams
        >>> from sequel_flax import MLP, make_learner
        >>> digits, sgd = RotatedDigits(num_tasks=2, subset=50), OptimizerHParams(lr=0.1)
        >>> def learner(strength, seed):
        ...     training = TrainingHParams(seed=seed)
        ...     return make_learner(EWCHParams(ewc_lambda=strength), MLP((8,)), sgd, digits, training)
        >>> learners = [learner(strength, seed) for strength in (1, 10) for seed in (0, 1)]
        >>> results = run_together(learners, digits, progress=False)
        >>> [result.matrix.shape for result in results]
        [(2, 2), (2, 2), (2, 2), (2, 2)]
    """
    benchmarks = [benchmark] * len(learners) if isinstance(benchmark, Benchmark) else [*benchmark]
    first = new_path("_together")
    paths = [first / str(k) for k in range(len(learners))] if run_dirs is None else [*map(Path, run_dirs)]
    arguments = [{**options, **more} for more in each or [{}] * len(learners)]
    _check(learners, benchmarks, paths, arguments, width)
    runs = [
        partial(run, benchmark=stream, run_dir=path, resume=resume, **more)
        for stream, path, more in zip(benchmarks, paths, arguments, strict=True)
    ]
    groups = grouped(learners, benchmarks)
    programs = [
        seats for group in groups for seats in _seated(group, learners, paths, width, resume is not False)
    ]
    say: Callable[[str], None] = print if progress else lambda text: None
    say(_described(groups, programs))
    outcomes: list[Any] = [None] * len(learners)
    with Signals().recorded() as signals, event_errors_left_to_the_caller():
        for seats in programs:
            for k, outcome in _run_program(seats, learners, runs, paths, "bars" if progress else False):
                outcomes[k] = outcome
                say(_ended(paths[k], outcome))
            signals.check()
    return outcomes


def _check(
    learners: Sequence[FlaxLearner],
    benchmarks: Sequence[Benchmark],
    paths: Sequence[Path],
    arguments: Sequence[Mapping[str, Any]],
    width: int | None,
) -> None:
    """Raise ValueError if an argument of `run_together` is invalid."""
    count = len(learners)
    if jax.process_count() > 1:
        raise ValueError(
            f"run_together needs one process, got {jax.process_count()} of jax.distributed; use run for each "
            "learner"
        )
    if not count:
        raise ValueError("learners must have at least one learner, got none")
    for name, values in {"benchmark": benchmarks, "run_dirs": paths, "each": arguments}.items():
        if len(values) != count:
            raise ValueError(
                f"{name} must have one entry for each of the {count} learners, got {len(values)}"
            )
    if len(set(paths)) < count or len(set(map(id, learners))) < count:
        raise ValueError("learners and run_dirs must be different for each run, got one of them twice")
    if width is not None and width < 1:
        raise ValueError(f"width must be >= 1, got {width}; leave it out to use half of the memory")
    defaults = {"evaluate_every": "task", "evaluate_on": "test", "evaluate_future": False}
    for learner, stream, given in zip(learners, benchmarks, arguments, strict=True):
        check_run(learner, stream, *(given.get(name, default) for name, default in defaults.items()))


def _seated(
    group: Group, learners: Sequence[FlaxLearner], paths: Sequence[Path], width: int | None, resume: bool
) -> list[Seats]:
    """Return the programs of a group: those that its runs have recorded, and new ones for the others."""
    recorded: dict[Any, Seats] = {}
    new = []
    for k in group.members:
        path = paths[k] / TOGETHER
        if resume and path.is_file():
            record = read_json(path.read_bytes())
            key = tuple(record["members"]), record["width"]
            seats = recorded.setdefault(key, Seats({}, record["width"], group.names))
            seats.places[k] = record["members"].index(paths[k].name)
        else:
            new.append(k)
    most = width or max_width(learners[group.members[0]])
    parts = [new[k : k + most] for k in range(0, len(new), most)]
    mesh = learners[group.members[0]].mesh
    groups_of_devices = 1 if mesh is None else mesh.shape.get(RUNS, 1)

    def seats_of(part: Sequence[int]) -> Seats:
        rounded = len(part) if len(part) == 1 else -(-len(part) // groups_of_devices) * groups_of_devices
        return Seats({k: place for place, k in enumerate(part)}, rounded, group.names)

    return [*recorded.values(), *map(seats_of, parts)]


def max_width(learner: FlaxLearner) -> int:
    """Return how many runs like that of a learner fit into half of the available memory, at least 1.

    Args:
        learner: The learner of a run.
    """
    state = sum(leaf.nbytes for leaf in jax.tree.leaves((learner.ts, learner.state)))
    sample = sum(leaf.nbytes for leaf in jax.tree.leaves(learner.state.stream.blank))
    samples = learner.training.batch_size * (learner.steps.steps_per_call or 50)
    needed = COPIES * state + 2 * sample * (samples + learner.training.eval_batch_size)
    stats = jax.local_devices()[0].memory_stats()
    available = stats["bytes_limit"] - stats["bytes_in_use"] if stats else available_memory_bytes()
    return max(1, int(available // 2 // needed))


def _run_program(
    seats: Seats,
    learners: Sequence[FlaxLearner],
    runs: Sequence[Callable[..., Result]],
    paths: Sequence[Path],
    shown: Shown,
) -> Iterator[tuple[int, Outcome]]:
    """Run the runs of a program; yield the index and the outcome of each at its end."""
    if seats.width == 1:
        for k in seats.places:
            yield k, _outcome(partial(runs[k], learners[k], progress=shown))
        return
    at = {place: k for k, place in seats.places.items()}
    program = Program({place: learners[k] for place, k in at.items()}, seats.names, seats.width)
    names = [paths[at[place]].name if place in at else "" for place in range(seats.width)]
    coroutines = {}
    for place, k in at.items():

        def record(path: Path = paths[k] / TOGETHER) -> None:
            if not path.is_file():
                write_json(path, {"members": names, "width": seats.width})

        member = Member(learners[k], program, place, record)
        of_member = shown if place == min(at) else False
        coroutines[place] = Coroutine(partial(_run_member, member, learners[k], runs[k], of_member))
        member.ask = coroutines[place].ask
    for place, outcome in program.run(coroutines):
        if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
            raise outcome
        yield at[place], outcome


def _outcome(function: Callable[[], Result]) -> Outcome:
    try:
        return function()
    except Exception as error:
        return error


def _run_member(member: Member, learner: FlaxLearner, run: Callable[..., Result], shown: Shown) -> Result:
    """Run a member of a program, and give its learner the state at the end."""
    try:
        return run(member, progress=shown)
    finally:
        learner.ts, learner.state = member.ts, member.state
        learner.planner = member.planner


def _described(groups: Sequence[Group], programs: Sequence[Seats]) -> str:
    """Return a line about the programs of the runs."""
    runs = sum(len(seats.places) for seats in programs)
    if len(programs) == 1:
        return f"{runs} runs at once, in one program"
    widths = " + ".join(str(len(seats.places)) for seats in programs)
    line = f"{runs} runs in {len(programs)} programs ({widths} runs)"
    reasons = ", ".join(dict.fromkeys(group.reason for group in groups if group.reason))
    return f"{line}: they differ in {reasons}" if reasons else f"{line}: more would need too much memory"


def _ended(path: Path, outcome: Outcome) -> str:
    """Return a line about the end of a run."""
    if isinstance(outcome, Exception):
        return f"run {path.name}: {outcome}"
    average = score_text(outcome.metric("average_score"), outcome.score)
    return f"run {path.name}: average {outcome.score.name} {average}"

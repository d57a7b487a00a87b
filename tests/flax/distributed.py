"""Does runs in a process, perhaps one of two: `python -m tests.flax.distributed FOLDER NAME...`.

What each run ends with is written to FOLDER, beside its run directory. A run that is there is resumed.
"""

from __future__ import annotations

import argparse
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import jax

from sequel_core import run
from sequel_core.hparams import CheckpointHParams
from sequel_core.runs.learner import FitMonitor
from sequel_core.testing.streams import table
from tests.flax.sharded import BATCH, COMPILED, METHODS, copies_differ, count_compilations, ended, learner


def main() -> None:
    """Run the methods on three tasks each, with all devices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=[*METHODS])
    parser.add_argument("--steps", type=int, default=12, help="of a task")
    parser.add_argument("--port", type=int, help="where two processes find each other")
    parser.add_argument("--process", type=int, choices=(0, 1), default=0)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--kill", type=int, help="the call at whose end the process is killed")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    count_compilations()
    if options.port:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"localhost:{options.port}",
            num_processes=2,
            process_id=options.process,
            initialization_timeout=60,
        )
    if options.kill:
        kill_after(options.kill)
    stream = table("classes", train=options.steps * BATCH)
    for name in options.names:
        COMPILED.clear()
        made = learner(METHODS[name], stream, jax.device_count(), options.seed)
        checkpoint = CheckpointHParams(every_n_steps=options.steps // 3)
        run_dir = options.folder / f"{name}_{options.process}"
        result = run(made, stream, run_dir=run_dir, progress=False, resume="auto", checkpoint=checkpoint)
        end = ended(made.ts, made.state)
        end["trees"] = {key: jax.tree.leaves(tree) for key, tree in end["trees"].items()}
        end |= {"matrix": result.matrix, "devices": made.num_devices, "copies_differ": copies_differ(made)}
        run_dir.with_suffix(".end").write_bytes(pickle.dumps(end))


def kill_after(calls: int) -> None:
    """Kill this process when it has taken a number of compiled calls."""
    after_step, left = FitMonitor.after_step, iter(range(calls))

    def counted(*args: Any, **kwargs: Any) -> None:
        after_step(*args, **kwargs)
        if next(left) == calls - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    FitMonitor.after_step = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    main()

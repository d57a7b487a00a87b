"""`sequel demo`: compare naive finetuning with EWC in both frameworks, on bundled digits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sequel_core.cli.arguments import Parser
from sequel_core.experiment.compose import compose
from sequel_core.runs.compare import compare
from sequel_core.runs.learner import PLUGINS

ALGORITHMS = ("naive", "ewc")


def main(args: Sequence[str]) -> int:
    """Run the command line of `sequel demo`.

    Returns:
        0, or 1 if a run failed.

    Raises:
        ValueError: a framework is not installed, or the directory cannot be used.
    """
    parser = Parser(prog="sequel demo", description="Compare naive finetuning with EWC in both frameworks.")
    parser.add_argument("--run-dir", help="where to keep the four runs (default: a new one under runs/)")
    options = parser.parse_args(args)
    runs = {
        name: [compose([f"+experiment={name}_rotateddigits", f"mode={mode}"]).config for mode in PLUGINS]
        for name in ALGORITHMS
    }
    print("RotatedDigits: five rotations of real handwritten digits, one after another")
    comparison = compare(runs, run_dir=options.run_dir)
    program = sys.argv[0] if Path(sys.argv[0]).name == "sequel" else "sequel"
    print(f"the settings of the runs: {program} list experiment")
    print("next, the runs of EWC in float64, where the weights differ by about 1e-15:")
    print(f"  {program} compare +experiment=ewc_rotateddigits training.dtype=float64")
    return 1 if any(run.result is None for run in comparison.runs) else 0

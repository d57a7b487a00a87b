"""`sequel compare`: compare experiments, by default in both frameworks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal, cast

from sequel_core.cli.arguments import Parser
from sequel_core.runs.compare import compare

EXAMPLES = """examples:
  sequel compare +experiment=ewc_rotateddigits             PyTorch beside JAX
  sequel compare experiment.yaml seed=0,1,2                the same, with intervals over seeds
  sequel compare algo=naive,ewc,er mode=jax seed=range(5)  algorithms in one framework
  sequel compare algo=ewc algo.ewc_lambda=1,10,100         values of a setting
  sequel compare algo=er,derpp --budget memory=1MB         memories of equal size; or steps=N, seconds=S
  sequel compare algo=ewc,er mode=jax seed=range(10) --together  all at once in JAX
  sequel compare algo=ewc training.dtype=float64           the same in float64: differences of rounding only
  sequel compare algo=ewc,er run_dir=DIR resume=auto       start it, or run what is missing in DIR

Every combination of comma-separated values is run. Other arguments are those of sequel run; run_dir=DIR is
the folder of all runs. With resume=auto, finished runs there are reused and only what is missing is run.
"""


def main(args: Sequence[str]) -> int:
    """Run the command line of `sequel compare`.

    Returns:
        0, or 1 if a run failed.

    Raises:
        ValueError: invalid input; raised before any work is done.
    """
    parser = Parser(
        prog="sequel compare",
        description="Run experiments one after another, compare them in tables and write a report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="+", metavar="FILE|KEY=VALUE", help="a file and overrides")
    budget = "what every run may use: steps=N, seconds=S (of training) or memory=SIZE, such as memory=4MB"
    parser.add_argument("--budget", metavar="WHAT=AMOUNT", help=budget)
    together = "run all experiments in JAX at once; those that differ only in numbers share a program"
    parser.add_argument("--together", action="store_true", help=together)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    options = parser.parse_intermixed_args(args)
    values = [text.partition("=")[2] for text in options.arguments if text.startswith("resume=")]
    comparison = compare(
        [text for text in options.arguments if not text.startswith("resume=")],
        progress=not options.quiet,
        budget=options.budget,
        together=options.together,
        resume=cast(Literal["auto"], values[-1]) if values and values[-1] != "null" else False,
    )
    return 1 if any(run.result is None for run in comparison.runs) else 0

"""`sequel compare`: experiments side by side, in both frameworks unless told otherwise."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sequel_core.cli.arguments import Parser
from sequel_core.runs.compare import compare

EXAMPLES = """examples:
  sequel compare +experiment=ewc_rotateddigits             PyTorch beside JAX
  sequel compare experiment.yaml seed=0,1,2                the same, with intervals over seeds
  sequel compare algo=naive,ewc,er mode=jax seed=range(5)  algorithms in one framework
  sequel compare algo=ewc algo.ewc_lambda=1,10,100         values of a setting
  sequel compare algo=ewc training.dtype=float64           how far the frameworks are apart but for rounding

Values with commas mean every combination. Everything else is as in sequel run; run_dir=DIR takes all runs.
"""


def main(args: Sequence[str]) -> int:
    """Run the command line of `sequel compare`.

    Returns:
        0, or 1 where a run failed.

    Raises:
        ValueError: input that cannot be used, before any work is done.
    """
    parser = Parser(
        prog="sequel compare",
        description="Run experiments one after another and put them side by side, with a report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="+", metavar="FILE|KEY=VALUE", help="a file and overrides")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    options = parser.parse_intermixed_args(args)
    found = compare(options.arguments, progress=not options.quiet)
    return 1 if any(run.result is None for run in found.runs) else 0

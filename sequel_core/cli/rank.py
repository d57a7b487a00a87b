"""A further process of an experiment that is trained on several devices: `rank FILE RUN_DIR`.

The first process of the run starts it, see `sequel_lightning.launch`, and records the run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sequel_core.cli.run import execute
from sequel_core.experiment.compose import compose
from sequel_core.experiment.overrides import one_line
from sequel_core.runs.learner import DivergenceError, LostProcessError


def main(arguments: Sequence[str]) -> int:
    """Take part in a run.

    Args:
        arguments: the file with the settings of the experiment, and the directory of the run.

    Returns:
        The exit code: 0 for success, 1 if the run failed. The first process prints the reason, which it finds
        in the folder of the file if it does not have the same error itself. If it has ended, it is printed
        here.
    """
    file, run_dir = map(Path, arguments)
    first = os.getppid()
    try:
        execute(compose([str(file)]).config, run_dir, progress=False)
    except DivergenceError:
        return 1
    except LostProcessError as error:
        if os.getppid() != first:
            print(f"sequel: {one_line(error)}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        file.with_name(f"error_{os.environ['LOCAL_RANK']}").write_text(one_line(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

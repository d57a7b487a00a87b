"""Scalars in the event files of TensorBoard, in the order in which they were written.

TensorBoard reads files in the order of their names. By default it drops events that seem to be repeated. The
names of files from one second end with a counter without leading zeros, so file 10 is read before file 9.
"""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of every scalar by tag."""
    events = EventAccumulator(str(folder), {"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in sorted(events.Scalars(tag), key=lambda event: event.wall_time)]
        for tag in events.Tags()["scalars"]
    }

"""What TensorBoard's reader finds in a folder, in the order in which it was written.

The reader takes files in the order of their names, and drops what seems to come again. Files of one second
differ by a counter without leading zeros, so file 10 comes before file 9.
"""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return step and value of every scalar, by tag."""
    events = EventAccumulator(str(folder), {"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in sorted(events.Scalars(tag), key=lambda event: event.wall_time)]
        for tag in events.Tags()["scalars"]
    }

"""Memory of the process and of the machine."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process, in bytes.

    psutil has the peak on Windows only. Linux has it in `VmHWM`; its `ru_maxrss` includes the peak of the
    process that started this one.
    """
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.is_file() and (peak := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(peak[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory_bytes() -> int:
    """Return the memory that a process can still use, in bytes.

    It is `MemAvailable` on Linux, or what is left of the limit of the control group. On macOS it is half of
    the memory of the machine.
    """
    if sys.platform == "win32":
        import psutil

        return int(psutil.virtual_memory().available)
    info, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if info.is_file() and (line := re.search(r"MemAvailable:\s*(\d+)", info.read_text())):
        available = int(line[1]) * 1024
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available

"""Which processes run on this machine, so that what dead ones left can be told from what is in use.

Guarantee: a process that runs is never taken for a dead one. Where the system does not say when a
process started, a number that was given to another process counts as running.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["machine_start", "runs", "started"]


def machine_start() -> str:
    """What tells this start of the machine, and the container's processes, from others."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def runs(pid: int, since: str = "") -> bool:
    """Whether a process runs here.

    Args:
        since: what `started` said of it; empty: not known.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now = started(pid)
    return now != "dead" and ("" in (now, since) or now == since)


def started(pid: int) -> str:
    """When a process started, in the kernel's ticks: a number may be given to another process.

    Empty where that is not known, "dead" where the process only waits for its parent's notice.
    """
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "dead" if fields[0] in "ZX" else fields[19]
    return ""

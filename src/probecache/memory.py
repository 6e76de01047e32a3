"""How much memory there is: in words, on this machine, and for this process."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

from probecache.errors import UsageError

__all__ = ["available_bytes", "parse_bytes", "peak_bytes", "resident_bytes"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SELF, _CGROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")


def parse_bytes(text: str | int) -> int:
    """A size such as "8GB", "800 MB", "1.5GiB" or a number of bytes.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    scale = (_UNITS | _BINARY).get(match[2]) if match else None
    size = float(match[1]) * scale if match and scale else 0.0
    if not 1 <= size < 2**63:
        raise UsageError(f"expected a size such as 8GB, 800MB or 1.5GiB for --memory, got {text!r}")
    return int(size)


def available_bytes() -> int | None:
    """Bytes that this process can still take, or None where nobody says.

    The least that the machine, the control groups of a batch system and the process's own limits
    leave. Memory that only caches files counts as free.
    """
    limits = [*_machine(), *_control_groups(), *_own_limits()]
    return max(min(limits), 0) if limits else None


def resident_bytes() -> int:
    """Bytes of memory that the process holds now."""
    held = _fields(_SELF / "status").get("VmRSS")
    return held if held is not None else peak_bytes()


def peak_bytes() -> int:
    """Most bytes of memory that the process has held."""
    held = _fields(_SELF / "status").get("VmHWM")
    if held is not None:
        return held
    # Elsewhere; on Linux this one counts what the parent held before it started the process.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _machine() -> list[int]:
    found = _fields(Path("/proc/meminfo")).get("MemAvailable")
    return [] if found is None else [found]


def _control_groups() -> list[int]:
    """What the limits of cgroups leave, from the process's own up to the root."""
    left = []
    for line in _read(_SELF / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        kinds, _, own = rest.partition(":")
        if number == "0":  # version 2
            left += _limits_along(_CGROUPS, own, "memory.max", ("anon", "shmem"))
        elif "memory" in kinds.split(","):  # version 1
            names = ("total_rss", "total_shmem")
            left += _limits_along(_CGROUPS / "memory", own, "memory.limit_in_bytes", names)
    return left


def _limits_along(root: Path, own: str, name: str, held: tuple[str, ...]) -> list[int]:
    """What every limit leaves between a control group's folder and the root."""
    left, folder = [], root / own.lstrip("/")
    for one in [folder, *folder.parents]:
        if not one.is_relative_to(root):
            break
        limit, fields = _read(one / name), _fields(one / "memory.stat", unit=1)
        if limit.isdigit():
            left.append(int(limit) - sum(fields.get(field, 0) for field in held))
    return left


def _own_limits() -> list[int]:
    held = _fields(_SELF / "status")
    left = []
    for name, field in (("RLIMIT_DATA", "VmData"), ("RLIMIT_AS", "VmSize")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY and field in held:
            left.append(limit - held[field])
    return left


def _fields(path: Path, unit: int = 1024) -> dict[str, int]:
    """Numbers in a file of lines such as `VmRSS:  1234 kB`."""
    words = (line.replace(":", " ").split() for line in _read(path).splitlines())
    return {w[0]: int(w[1]) * unit for w in words if len(w) > 1 and w[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""

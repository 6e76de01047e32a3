"""Where a model runs: which device, and how much memory it has left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probecache.errors import ModelError, one_line

if TYPE_CHECKING:
    import torch

__all__ = ["device_kind", "find_device", "free_device_bytes"]


def device_kind(name: str | None) -> str:
    """Kind of the device of a name, such as "cpu" or "cuda"; without one of the best there is.

    Does not ask whether the device is there: a run may be planned on another machine.
    """
    import torch

    if name is not None:
        return name.split(":")[0]
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_device(name: str | None) -> torch.device:
    """The device of a name; without one the best there is.

    Raises:
        ModelError: it is not there.
    """
    import torch

    name = name or device_kind(None)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"expected the device {name} to be there, got: {one_line(error)}; pass --device"
        ) from error
    return device


def free_device_bytes(name: str | None) -> int | None:
    """Free memory of a CUDA device; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info(torch.device(name or "cuda"))[0])

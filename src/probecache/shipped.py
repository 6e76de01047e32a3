"""Where the model and the data lie that ship with the project: in the wheel, or in the checkout."""

from __future__ import annotations

from pathlib import Path

from probecache.errors import StoreError

__all__ = ["shipped"]


def shipped(name: str) -> Path:
    """Path of something shipped, such as `models/tiny-llama`.

    Raises:
        StoreError: the installation lacks it.
    """
    here = Path(__file__).resolve()
    for root in (here.parent / "shipped", here.parents[2]):
        if (root / name).exists():
            return root / name
    raise StoreError(f"expected {name} to ship with probecache, found none; install it again")

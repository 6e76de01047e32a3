"""What an identity says of what nobody recorded.

Such a field holds a note with the content hash of the import that it comes from. Guarantee: a note
equals nothing but the same note: neither a known value nor that of another import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probecache.types import Identity

__all__ = ["is_imported", "is_recorded", "unrecorded"]

_NOTE = "not recorded: import "


def unrecorded(content: str) -> str:
    """The note for a field.

    Args:
        content: hex hash of all that was imported.
    """
    return _NOTE + content[:16]


def is_recorded(value: str | None) -> bool:
    """Whether a field's value is known."""
    return value is None or not value.startswith(_NOTE)


def is_imported(identity: Identity) -> bool:
    """Whether nothing is known of the weights, so that no run can be of the same identity."""
    return not all(map(is_recorded, identity.weights.values()))

"""Flat keyword arguments of the Python API to what the workflow takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probecache.errors import LayerError, UsageError
from probecache.layers import parse_layers
from probecache.types import Dtype, Positions

if TYPE_CHECKING:
    from probecache.store.reader import Cache
    from probecache.workflow.prepare import ExtractRequest

__all__ = [
    "Data",
    "Layers",
    "as_names",
    "cached_layers",
    "choice",
    "layer_numbers",
    "make_request",
]

Data = str | Path | Sequence[Mapping[str, Any]]
Layers = str | int | Sequence[int]


def make_request(
    *,
    model: str,
    data: Data,
    layers: Layers = "all",
    dtype: str | None = None,
    positions: str | None = None,
    system_prompt: str | None = None,
    chat_template: bool = True,
    keep_special_tokens: bool = False,
    truncate: bool = False,
    revision: str | None = None,
    adapter: str | None = None,
    device: str | None = None,
    device_map: str | None = None,
    batch_tokens: int | None = None,
    engine: str | None = None,
    memory: int | str | None = None,
    template_date: str | None = None,
    allow_mismatch: Collection[str] = (),
    **run: Any,
) -> ExtractRequest:
    """What `extract` is asked for; see `api.extract`.

    Raises:
        UsageError: a value that makes no sense.
    """
    from probecache.dates import parse_date
    from probecache.memory import parse_bytes
    from probecache.models import ModelOptions
    from probecache.prompts import PromptOptions
    from probecache.workflow.execution import EngineName
    from probecache.workflow.prepare import ExtractRequest

    if batch_tokens is not None and batch_tokens < 1:
        raise UsageError(f"expected batch_tokens of at least 1, got {batch_tokens}")
    return ExtractRequest(
        model=ModelOptions(
            model=str(model),
            revision=revision,
            dtype=choice(Dtype, dtype, "dtype"),
            adapter=adapter,
            device=device,
            device_map=device_map,
        ),
        data=data,
        layers=layers,
        prompts=PromptOptions(
            positions=None if positions is None else Positions.parse(positions, "positions"),
            system_prompt=system_prompt,
            chat_template=chat_template,
            keep_special_tokens=keep_special_tokens,
            truncate=truncate,
            template_date=None if template_date is None else parse_date(template_date),
        ),
        allow_mismatch=as_names(allow_mismatch),
        batch_tokens=batch_tokens,
        engine=choice(EngineName, engine, "engine") or EngineName.AUTO,
        memory=None if memory is None else parse_bytes(memory),
        **run,
    )


def as_names(names: Collection[str]) -> tuple[str, ...]:
    """Several names, or a single one."""
    return (names,) if isinstance(names, str) else tuple(names)


def choice(kind: Any, value: str | None, name: str) -> Any:
    """A member of an enumeration by its value; None stays None."""
    if value is None:
        return None
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"expected {name} to be {', '.join(kind)}, got {value!r}") from None


def layer_numbers(layers: Layers | None, num_hidden_layers: int) -> tuple[int, ...] | None:
    """The layers as numbers; None for all that there are."""
    if layers is None or (isinstance(layers, str) and layers.strip() == "all"):
        return None
    return parse_layers(layers, num_hidden_layers)


def cached_layers(layers: Layers | None, cache: Cache) -> tuple[int, ...] | None:
    """The same of a cache; a layer that it cannot have is told with those that it has."""
    try:
        return layer_numbers(layers, cache.identity.num_hidden_layers)
    except LayerError as error:
        cache.require_layer(error.layer)
        raise

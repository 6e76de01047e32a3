"""The command line's application, without its commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from probecache.errors import Interrupted

__all__ = ["Stopped", "app", "stops_told"]

app = typer.Typer(
    name="probecache",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Stopped(Exception):
    """An extraction was stopped; says how to go on. Typer would swallow the original."""


@contextmanager
def stops_told() -> Iterator[None]:
    try:
        yield
    except Interrupted as stop:
        raise Stopped(str(stop)) from stop


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"probecache {version('probecache')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Run a language model once, cache its activations, fit and validate probes in seconds."""

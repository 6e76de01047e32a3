"""How far a run is: a bar on a terminal or in a notebook, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from probecache.stopping import raise_if_asked

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 5.0


@dataclass
class Progress:
    """Context manager; `update(n)` adds n units of work. Writes to stderr."""

    total: int
    what: str
    unit: str
    quiet: bool = False
    _done: int = 0
    _bar: Any = None
    _started: float = field(default_factory=time.monotonic)
    _last_line: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Progress:
        if not self.quiet and (sys.stderr.isatty() or _in_notebook()):
            from tqdm.auto import tqdm

            self._bar = tqdm(total=self.total, desc=self.what, unit=self.unit, unit_scale=True)
        return self

    def update(self, units: int) -> None:
        """Add finished work; raises KeyboardInterrupt where the process was asked to stop."""
        self._done += units
        if self._bar is not None:
            self._bar.update(units)
        elif not self.quiet and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)
        raise_if_asked()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self) -> str:
        elapsed = time.monotonic() - self._started
        left = elapsed * (self.total - self._done) / max(self._done, 1)
        return (
            f"{self.what}: {self._done:,} of {self.total:,} {self.unit} "
            f"({self._done / max(self.total, 1):.0%}), {elapsed:.0f} s, about {left:.0f} s left"
        )


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"

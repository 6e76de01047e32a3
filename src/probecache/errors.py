"""Every error that a user can meet, in one tree.

    ProbecacheError
    ├── UsageError               an option's value, or a combination of options, makes no sense
    │   └── LayerError           a layer that the model does not have
    ├── DataError                a data file cannot be read as records; names the row
    ├── PromptError              a record cannot be rendered to token ids; names the row
    ├── ModelError               a model cannot be found, read or run
    │   ├── PreflightError       the run's forward and a plain one disagree
    │   ├── ForwardError         a model's own code does not run as it is asked to
    │   └── OutOfMemoryError     a single prompt does not fit on the device
    ├── NonFiniteError           NaN or Inf in activations
    ├── OutputError              the output place is taken, full or not writable
    ├── StoreError               a cache or run is missing, unfinished or damaged
    │   └── LayerNotCachedError  a layer that the cache does not hold
    ├── MismatchError            two things that must belong together do not
    └── FitError                 activations cannot be fitted or scored
        ├── ShapeError           widths differ
        ├── EmptyClassError      a class has no rows
        └── NoDirectionError     the classes' means are equal

    KeyboardInterrupt
    └── Interrupted              a run was stopped; the message says what is kept and how to go on

A message says what was expected, what came and what to do, in one line. Errors are raised where
they are found and caught only in `cli.py`, which prints the line and exits with code 2. Messages
quote files and models of strangers, so they are made harmless to a terminal as they are raised.
"""

import unicodedata

__all__ = [
    "DataError",
    "EmptyClassError",
    "FitError",
    "ForwardError",
    "Interrupted",
    "LayerError",
    "LayerNotCachedError",
    "MismatchError",
    "ModelError",
    "NoDirectionError",
    "NonFiniteError",
    "OutOfMemoryError",
    "OutputError",
    "PreflightError",
    "ProbecacheError",
    "PromptError",
    "ShapeError",
    "StoreError",
    "UsageError",
    "one_line",
    "printable",
]

# A message longer than this quotes a text that nobody reads on a terminal.
_HEAD, _TAIL = 1600, 400
# Emoji and Persian are joined, or kept apart, by marks of a category that else turns or hides text.
_JOINERS = "\u200c\u200d"


class ProbecacheError(Exception):
    """Root of the tree; catch it to catch whatever probecache refuses."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UsageError(ProbecacheError):
    """An option's value, or a combination of options, makes no sense."""


class LayerError(UsageError):
    """A layer that the model does not have; the message names the range."""

    def __init__(self, message: str, layer: int) -> None:
        super().__init__(message)
        self.layer = layer


class DataError(ProbecacheError):
    """A data file cannot be read as records; the message names the file and the row."""


class PromptError(ProbecacheError):
    """A record cannot be rendered to token ids; the message names the row."""


class ModelError(ProbecacheError):
    """A model cannot be found, read or run."""


class PreflightError(ModelError):
    """The batched forward disagrees with a plain one-prompt-at-a-time forward."""


class ForwardError(ModelError):
    """A model's own code does not run on what it is given."""


class OutOfMemoryError(ModelError):
    """A single prompt does not fit on the device."""


class NonFiniteError(ProbecacheError):
    """Activations hold NaN or Inf; the message names layer and rows."""


class OutputError(ProbecacheError):
    """The place to write to is taken, full or not writable."""


class StoreError(ProbecacheError):
    """A cache or run is missing, unfinished or damaged."""


class LayerNotCachedError(StoreError):
    """A layer that the cache does not hold; the message lists those it holds."""


class MismatchError(ProbecacheError):
    """Vectors, cache and data do not belong together; the message shows the difference."""


class FitError(ProbecacheError):
    """Activations cannot be fitted or scored."""


class ShapeError(FitError):
    """Widths differ."""


class EmptyClassError(FitError):
    """A class has no rows."""


class NoDirectionError(FitError):
    """The classes' means are equal, so no direction leads from one to the other."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped; the message says what is kept and how to go on."""


def printable(text: str) -> str:
    """Text as a terminal may be given it: what would command it or turn it round is spelt out.

    Control characters, marks of reading direction, line separators and lone surrogates become
    escapes such as `\\x1b`; of a very long text the middle is left out. Letters of all scripts
    and emoji stay as they are.
    """
    if len(text) > _HEAD + _TAIL:
        text = f"{text[:_HEAD]} ... {text[-_TAIL:]}"
    return "".join(character if _is_shown(character) else _escape(character) for character in text)


def _is_shown(character: str) -> bool:
    # Unassigned ones are not shown either: a newer terminal may know them for commands.
    spaced = character in _JOINERS or unicodedata.category(character) == "Zs"
    return character.isprintable() or spaced


def _escape(character: str) -> str:
    return ascii(character)[1:-1]


def one_line(error: BaseException) -> str:
    """What a foreign error says, on one line that fits into one of ours."""
    words = " ".join(str(error).split())
    return words[:300] if words else type(error).__name__

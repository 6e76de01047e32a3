"""The frozen records that pass between rooms, and the words that are written into files.

Nothing here computes; nothing here imports beyond the standard library, NumPy and `Positions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from probecache.positions import Positions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "DEFAULT_POSITIVE_CLASS",
    "LAYER_CONVENTION",
    "Dtype",
    "Example",
    "Identity",
    "Message",
    "Positions",
    "Setting",
    "TokenizedPrompt",
]

LAYER_CONVENTION = (
    "layer L = residual stream after L blocks, before the final norm; "
    "0 = embeddings, num_hidden_layers = after the last block"
)

DEFAULT_POSITIVE_CLASS = "deployment"
Setting = bool | int | float | str | None  # of a model's config


class Dtype(StrEnum):
    """The floating-point format that the model runs in and the rows are stored in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return 4 if self is Dtype.FLOAT32 else 2


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # where a file holds it

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with a class. A pair is two examples of one `group`.

    `row` is where its record stands in the data file, from 1, for messages to the user.
    `messages` are what the prompt is made of; `question` is the text shown to a reader.
    """

    row: int
    id: str
    group: str
    label: str
    question: str
    messages: tuple[Message, ...]
    answer: str | None = None
    category: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedPrompt:
    """An example as the model sees it.

    Attributes:
        ids: int32 [tokens], the whole input.
        kept: int32 [kept], indices into `ids` of the tokens whose residuals are wanted, rising.
        places: int32 [kept, 3], the message and the characters of it that each of these stands for,
            as in `selection.py`; None where one row is kept or the tokenizer cannot tell.
    """

    ids: NDArray[np.int32]
    kept: NDArray[np.int32]
    places: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Identity:
    """All that decides the numbers in a cache. Two caches of one identity hold one set of numbers.

    `weights[L]` names what the numbers at layer L depend on by its whole content: the embeddings
    and the first L blocks, for every layer up to the deepest. Caches of different depth therefore
    still compare, layer by layer. `weight_samples[L]` is the same of samples, known before the
    weights are read. `model` and `revision` say where the weights came from; they are told to the
    reader, never compared: one content may lie in many places, and a branch moves.

    `config` holds every setting by which the model computes, those of nested configs under dotted
    names; of long ones the SHA-256.
    `template_date` is the day that the chat template was told where it asks for one, ISO format.
    """

    model: str
    revision: str | None
    weights: Mapping[int, str]
    weight_samples: Mapping[int, str]
    config: Mapping[str, Setting]
    architecture: str
    num_hidden_layers: int
    hidden_size: int
    dtype: str
    quantization: str | None
    adapter: str | None
    attention: str
    tokenizer: str
    chat_template: str | None
    template_date: str | None
    system_prompt: str | None
    data: str
    token_ids: str
    positions: str
    special_tokens_kept: bool
    layer_convention: str = LAYER_CONVENTION
    versions: Mapping[str, str] = field(default_factory=dict)

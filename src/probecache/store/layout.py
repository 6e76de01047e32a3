"""What a cache's files are called and what its manifests say.

    CACHE/metadata.json                     one entry per example
    CACHE/layer_info.json                   the manifest; its presence makes the folder a cache
    CACHE/tokens.pt                         kept token ids, where an example keeps several tokens
    CACHE/spans.pt                          what these stand for, int32 [rows, 4]: place of the
                                            token in the input; its message, the appended answer
                                            counting as one more behind them, -1 for template and
                                            special tokens, -2 for the system prompt put first;
                                            first character and end in that message's content
                                            (0, 0 for template and special tokens)
    CACHE/layer_<L>/<prefix>_activations.pt one file per layer and class, rows in data order
    CACHE/layer_<L>/rows.crc32              CRC-32 of every example's rows, uint32 little-endian,
                                            class after class, examples in data order

Nothing in a cache depends on when or how fast it was made: the same run gives the same bytes.

Paths are always built here from numbers and checked prefixes, never taken from a file's content.
Sizes are exact: `Blueprint` knows every byte of a cache before the first forward pass.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    model_validator,
)

from probecache.errors import UsageError
from probecache.selection import Conversation
from probecache.store.seal import NO_SEAL, encode_json
from probecache.store.tensorfile import FileRecord, file_bytes
from probecache.types import LAYER_CONVENTION, Dtype, Example, Identity, Message, Positions

__all__ = [
    "LAYER_INFO",
    "METADATA",
    "ONLY_CONVENTION",
    "OWN_TENSORS",
    "SPANS",
    "TOKENS",
    "UNFINISHED",
    "Blueprint",
    "ClassRecord",
    "ExampleRecord",
    "LayerInfo",
    "Origin",
    "PlainRecord",
    "PositionsField",
    "activations_path",
    "checksums_path",
    "class_prefixes",
    "lay_out",
    "manifest_size",
]

METADATA, LAYER_INFO = "metadata.json", "layer_info.json"
TOKENS, SPANS = "tokens.pt", "spans.pt"
OWN_TENSORS = (TOKENS, SPANS)  # those that belong to no layer
UNFINISHED = "unfinished"  # folder of an extraction that is not finished, in the cache's own
_GUIDE_PREFIXES = {"testing": "test", "deployment": "deploy"}
_PREFIX = r"^[A-Za-z0-9_-]{1,64}$"
_BLOCK = 4096
_MOST_ROWS = 1 << 60
ONLY_CONVENTION = f"^{re.escape(LAYER_CONVENTION)}$"
_DEEPEST = 100_000  # no model has more blocks; a forged manifest may claim to
# Room in the manifest for what is known at the end: counts of tokens, how prompts went through.
_MANIFEST_SLACK = 2048


def _as_positions(value: Any) -> Positions:
    if not isinstance(value, str):
        raise ValueError(f"positions are text, not {type(value).__name__}")
    try:
        return Positions(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


# A field of a manifest, written as its text.
PositionsField = Annotated[Positions, PlainValidator(_as_positions), PlainSerializer(str)]


class ClassRecord(BaseModel):
    """One class of a cache."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix: str = Field(pattern=_PREFIX)
    examples: int = Field(ge=0)
    rows: int = Field(ge=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleRecord:
    """One entry of metadata.json.

    `rows` is [start, stop) in the class's activation files; `n_tokens` counts the tokens that
    these rows stand for (1 for `last`), `input_tokens` what the model was fed, 0 where that is not
    recorded. `messages` are left out where they are one user turn, the question.

    A dataclass and no model: a cache may hold a million, and a model takes five times the memory.
    Its schema is checked where entries are read from a file.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    idx: Annotated[int, Field(ge=0)]
    id: str
    group: str
    label: Annotated[
        str,
        Field(validation_alias=AliasChoices("class", "label"), serialization_alias="class"),
    ]
    question: str
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    answer: str | None = None
    category: str | None = None
    rows: tuple[int, int]
    n_tokens: Annotated[int, Field(ge=1)]
    input_tokens: Annotated[int, Field(ge=0)]

    @property
    def conversation(self) -> Conversation:
        """What the example's tokens stand for."""
        return Conversation(self.messages or (Message("user", self.question),), self.answer)


class PlainRecord(BaseModel):
    """What a manifest says of a file that holds no tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Origin(BaseModel):
    """What the user asked for where the identity has only its outcome; told, never compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    adapter: str | None = None
    truncate: bool = False
    allowed_mismatch: list[str] = Field(default_factory=list)


class LayerInfo(BaseModel):
    """layer_info.json.

    `timing` counts tokens: those fed, the distinct prefixes, those computed; seconds would differ
    from run to run.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal["probecache"] = "probecache"
    format_version: Literal[1] = 1
    layers: list[int]
    num_examples: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    dtype: Dtype
    positions: PositionsField
    layer_convention: str = Field(default=LAYER_CONVENTION, pattern=ONLY_CONVENTION)
    classes: dict[str, ClassRecord]
    identity: Identity
    origin: Origin
    timing: dict[str, int]
    execution: dict[str, str] = Field(default_factory=dict)
    non_finite: dict[int, Annotated[int, Field(ge=0, le=_MOST_ROWS)]] = Field(default_factory=dict)
    files: dict[str, FileRecord | PlainRecord]
    manifest_sha256: str = NO_SEAL

    @property
    def tensors(self) -> dict[str, FileRecord]:
        """The files that hold tensors."""
        return {name: r for name, r in self.files.items() if isinstance(r, FileRecord)}

    @model_validator(mode="after")
    def _fields_agree(self) -> LayerInfo:
        deepest = self.identity.num_hidden_layers
        if self.layers != sorted(set(self.layers)) or not set(self.layers) <= set(
            range(min(deepest, _DEEPEST) + 1)
        ):
            raise ValueError(f"layers {self.layers} are not rising from 0 to at most {deepest}")
        prefixes = [record.prefix.casefold() for record in self.classes.values()]
        if len(set(prefixes)) < len(prefixes):
            raise ValueError(f"two classes share the file prefix among {', '.join(prefixes)}")
        rows = sum(record.rows for record in self.classes.values())
        tokens = self.tensors.get(TOKENS)
        if (tokens is None) != self.positions.one_row:
            raise ValueError(f"positions {self.positions} do not go with the files recorded")
        spans = self.tensors.get(SPANS)
        if spans is not None and tokens is None:
            raise ValueError(f"{SPANS} is recorded without {TOKENS}")
        for name, found, shape in ((TOKENS, tokens, (rows,)), (SPANS, spans, (rows, 4))):
            if found is not None and (found.shape != shape or found.dtype != "int32"):
                raise ValueError(f"{name} is recorded as {found.shape} {found.dtype}")
        return self

    @model_validator(mode="after")
    def _files_are_as_declared(self) -> LayerInfo:
        tensors = self.tensors
        for layer in self.layers:
            for record in self.classes.values():
                name = activations_path(layer, record.prefix)
                found = tensors.get(name)
                if found is None:
                    raise ValueError(f"the file {name} is declared by its layer but not recorded")
                if found.shape != (record.rows, self.hidden_size) or found.dtype != self.dtype:
                    raise ValueError(f"{name} is recorded as {found.shape} {found.dtype}")
        plain = {METADATA, *map(checksums_path, self.layers)}
        if self.files.keys() - tensors.keys() != plain:
            raise ValueError(f"expected records of {METADATA} and of every layer's checksums alone")
        return self


def activations_path(layer: int, prefix: str) -> str:
    """Relative path of one layer's and one class's rows."""
    return f"layer_{layer}/{prefix}_activations.pt"


def checksums_path(layer: int) -> str:
    """Relative path of the checksums of one layer's rows."""
    return f"layer_{layer}/rows.crc32"


def class_prefixes(labels: tuple[str, ...]) -> dict[str, str]:
    """A file prefix for every class: the guide's words, else the label made safe and unique."""
    prefixes: dict[str, str] = {}
    taken: set[str] = set()
    for label in labels:
        safe = re.sub(r"[^A-Za-z0-9_-]+", "_", label)[:48].strip("_") or "class"
        prefix = wanted = _GUIDE_PREFIXES.get(label, safe)
        number = 2
        while prefix.casefold() in taken:  # some file systems do not tell A from a
            prefix, number = f"{wanted}_{number}", number + 1
        taken.add(prefix.casefold())
        prefixes[label] = prefix
    return prefixes


def lay_out(
    examples: Sequence[Example], kept: Sequence[int], fed: Sequence[int], positions: Positions
) -> tuple[dict[str, ClassRecord], tuple[ExampleRecord, ...]]:
    """Share out rows to examples in data order, each class from 0.

    Args:
        kept: tokens of each example that are kept.
        fed: tokens of each example that the model is fed.
    """
    counts = Counter(example.label for example in examples)
    rows = dict.fromkeys(counts, 0)
    one_row = positions.one_row
    records = []
    for index, (example, n_kept, n_fed) in enumerate(zip(examples, kept, fed, strict=True)):
        start = rows[example.label]
        rows[example.label] = stop = start + (1 if one_row else n_kept)
        records.append(
            ExampleRecord(
                idx=index,
                id=example.id,
                group=example.group,
                label=example.label,
                question=example.question,
                messages=_messages_to_tell(example),
                answer=example.answer,
                category=example.category,
                rows=(start, stop),
                n_tokens=n_kept,
                input_tokens=n_fed,
            )
        )
    classes = {
        label: ClassRecord(prefix=prefix, examples=counts[label], rows=rows[label])
        for label, prefix in class_prefixes(tuple(counts)).items()
    }
    return classes, tuple(records)


def _messages_to_tell(example: Example) -> tuple[Message, ...] | None:
    """The messages, where the question does not tell them."""
    told = (), (Message("user", example.question),)
    return None if example.messages in told else example.messages


def manifest_size(info: LayerInfo) -> int:
    """Bytes of a layer_info.json: whole disk blocks, with room for what only the run tells."""
    files = {
        name: record.model_copy(update={"offset": 0}) if isinstance(record, FileRecord) else record
        for name, record in info.files.items()
    }
    told = {"timing": {}, "execution": {}, "non_finite": {}, "files": files}
    draft = info.model_copy(update={**told, "identity": replace(info.identity, attention="")})
    size = len(encode_json(draft.model_dump(mode="json"))) + _MANIFEST_SLACK
    return -(-size // _BLOCK) * _BLOCK


@dataclass(frozen=True)
class Blueprint:
    """A cache before it is filled: everything but the numbers and how long they took.

    `examples` are in data order; `layers` are those to be written now; `tells_spans` says whether
    it is known what the kept tokens stand for.
    """

    layers: tuple[int, ...]
    hidden_size: int
    dtype: Dtype
    positions: Positions
    num_examples: int
    origin: Origin
    classes: dict[str, ClassRecord]
    examples: tuple[ExampleRecord, ...]
    tells_spans: bool = False

    @cached_property
    def own_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of the int32 tensors that belong to no layer: tokens.pt and spans.pt."""
        if self.positions.one_row:
            return {}
        return {TOKENS: (self.rows,)} | ({SPANS: (self.rows, 4)} if self.tells_spans else {})

    @property
    def rows(self) -> int:
        """Rows of one layer, over all classes."""
        return sum(record.rows for record in self.classes.values())

    @property
    def bytes_per_layer(self) -> int:
        """Exact bytes of one layer's files."""
        return 4 * len(self.examples) + sum(
            file_bytes((record.rows, self.hidden_size), str(self.dtype))
            for record in self.classes.values()
        )

    @cached_property
    def metadata(self) -> bytes:
        """Content of metadata.json."""
        # The bytes that encode_json gives, without a million small strings on the way.
        entries = TypeAdapter(tuple[ExampleRecord, ...])
        return entries.dump_json(self.examples, indent=1, by_alias=True, exclude_none=True) + b"\n"

    def own_tensors_bytes(self) -> int:
        """Exact bytes of tokens.pt and spans.pt; 0 where there are none."""
        return sum(file_bytes(shape, "int32") for shape in self.own_tensors.values())

    def manifest_bytes(self, identity: Identity) -> int:
        """Exact bytes of layer_info.json; the same before the weights are known and after."""
        samples = dict.fromkeys(self.layers, "0" * 64)
        weights = dict.fromkeys(range(max(self.layers) + 1), "0" * 64)
        draft = self.manifest(
            replace(identity, weights=weights, weight_samples=samples),
            timing={},
            non_finite={},
            hashes=dict.fromkeys(self.files(), "0" * 64),
        )
        return manifest_size(draft)

    def extended_manifest_bytes(self, cached: Iterable[int], identity: Identity) -> int:
        """Exact bytes of layer_info.json once these layers have joined the cached ones."""
        layers = tuple(sorted({*cached, *self.layers}))
        return replace(self, layers=layers).manifest_bytes(identity)

    def total_bytes(self, identity: Identity) -> int:
        """Exact bytes of the whole cache."""
        return (
            self.bytes_per_layer * len(self.layers)
            + self.own_tensors_bytes()
            + len(self.metadata)
            + self.manifest_bytes(identity)
        )

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Relative path to shape and dtype, of every tensor file."""
        found: dict[str, tuple[tuple[int, ...], str]] = {
            activations_path(layer, record.prefix): (
                (record.rows, self.hidden_size),
                str(self.dtype),
            )
            for layer in self.layers
            for record in self.classes.values()
        }
        return found | {name: (shape, "int32") for name, shape in self.own_tensors.items()}

    def files(self) -> dict[str, int]:
        """Relative path to exact bytes, of every file but the manifest."""
        tensors = {name: file_bytes(*what) for name, what in self.tensors().items()}
        checksums = {checksums_path(layer): 4 * len(self.examples) for layer in self.layers}
        return {METADATA: len(self.metadata), **tensors, **checksums}

    def manifest(
        self,
        identity: Identity,
        *,
        timing: dict[str, int],
        non_finite: dict[int, int],
        hashes: dict[str, str],
        execution: dict[str, str] | None = None,
        offsets: dict[str, int] | None = None,
    ) -> LayerInfo:
        """layer_info.json as a checked object.

        Args:
            hashes: SHA-256 of every one of `files`.
            offsets: where in each tensor file the numbers begin.
        """
        tensors = self.tensors()
        return LayerInfo(
            layers=list(self.layers),
            num_examples=self.num_examples,
            hidden_size=self.hidden_size,
            dtype=self.dtype,
            positions=self.positions,
            classes=self.classes,
            identity=identity,
            origin=self.origin,
            timing=timing,
            execution=execution or {},
            non_finite=non_finite,
            files={
                name: FileRecord(
                    bytes=size,
                    offset=(offsets or {}).get(name, 0),
                    shape=tensors[name][0],
                    dtype=tensors[name][1],
                    sha256=hashes[name],
                )
                if name in tensors
                else PlainRecord(bytes=size, sha256=hashes[name])
                for name, size in self.files().items()
            },
        )

"""What names a model's weights, config and tokenizer: their content, of weights layer by layer.

    weights[0] = H(tensors outside the blocks)
    weights[L] = H(weights[L - 1], tensors of block L - 1)

each tensor by the end of its name, its dtype, its shape and the SHA-256 of its bytes as they are
stored. Folders, shards and names of files play no part, nor do the head and the final norm, which
decide nothing in the residual stream. Guarantee: layers with one name were made by the same bytes.

Digests are taken while weights are read to be run, so nothing is read for them alone, but: where
nothing is to be run, and where transformers reads the files by itself for a quantiser. Then they
are read once, and remembered on this machine (`memo.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from probecache.checkpoint import is_final_norm
from probecache.memo import Memo, state_of
from probecache.progress import Progress

if TYPE_CHECKING:
    from probecache.checkpoint import StoredTensor
    from probecache.memo import FileState
    from probecache.models import ModelSource
    from probecache.prompts import Tokenizer
    from probecache.types import Setting

__all__ = ["config_content", "tokenizer_content", "weights_content"]

# What a config says beside what the model computes; and what `Identity` has a field of its own for.
_NOT_COMPUTED = (
    *("architectures", "transformers_version", "use_cache", "return_dict", "problem_type"),
    *("output_hidden_states", "output_attentions", "id2label", "label2id"),
    *("bos_token_id", "eos_token_id"),
)
_TOLD_APART = (
    *("model_type", "num_hidden_layers", "hidden_size", "dtype", "torch_dtype"),
    "quantization_config",
)

_LONG = 60  # characters

_THREADS = 4


def weights_content(
    source: ModelSource, depth: int, known: Mapping[int, str], *, quiet: bool = False
) -> dict[int, str]:
    """Names of the weights that the layers 0 to `depth` depend on.

    To be called when the weights have been loaded, or all blocks been streamed; or without, which
    reads what has not been read on this machine before. Fetches what the hub has.

    Args:
        known: names of the layers of a cache whose rows the run goes on from. A block that was
            not read now, nor before on this machine, need not be: the known name of the layer
            behind it stands, because the rows of that layer are what the next block was given.
            Empty: whatever was not read is read now.
        quiet: no progress on stderr.

    Raises:
        ModelError: a file that is not what it should be, or one that changed while it was read.
    """
    source.fetch_weights(depth)
    digests = _Digests(source)
    found: dict[int, str] = {}
    for layer in range(depth + 1):
        absent = layer and source.weights.absent_files(range(layer - 1, layer), outside=False)
        tensors = [] if absent and layer in known else _tensors_before(source, layer)
        if layer in known and (absent or digests.untouched(tensors)):
            found[layer] = known[layer]
            continue
        digests.read_missing(tensors if known else _all(source, layer, depth), quiet)
        found[layer] = digests.link(found.get(layer - 1, ""), tensors)
    digests.memo.save()
    return found


def config_content(config: Any) -> dict[str, Setting]:
    """What a config tells the model to compute: rotary base, norms, windows, caps ...

    Left out is what changes nothing in the residual stream or has a field of its own.

    Returns:
        Settings by name, those of configs within the config as `outer.inner`; of what is long, the
        SHA-256.
    """
    return dict(sorted(_settings(config.to_dict(), "")))


def _settings(settings: Mapping[Any, Any], outer: str) -> Iterator[tuple[str, Setting]]:
    for name, value in settings.items():
        if name in (*_NOT_COMPUTED, *_TOLD_APART) or str(name).startswith("_"):
            continue
        if isinstance(value, dict) and value:
            yield from _settings(value, f"{outer}{name}.")
        else:
            yield f"{outer}{name}", _setting(value)


def _setting(value: Any) -> Setting:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= _LONG else hashlib.sha256(text.encode()).hexdigest()


def tokenizer_content(tokenizer: Tokenizer) -> str:
    """SHA-256 of the vocabulary, its rules and the special tokens, chat template apart."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary: Any = getattr(tokenizer, "get_vocab", dict)
    rules = json.dumps(vocabulary(), sort_keys=True) if backend is None else backend.to_str()
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps([rules, special]).encode()).hexdigest()


def _tensors_before(source: ModelSource, layer: int) -> list[StoredTensor]:
    """What the step to a layer takes: the block before it, or all outside the blocks for 0."""
    if layer:
        return source.weights.of_block(layer - 1)
    outside = source.weights.needed(range(0))
    return [tensor for tensor in outside if not is_final_norm(tensor.name)]


def _all(source: ModelSource, start: int, depth: int) -> list[StoredTensor]:
    """What all steps from a layer on take, to be read with one progress."""
    return [one for layer in range(start, depth + 1) for one in _tensors_before(source, layer)]


class _Digests:
    """SHA-256 of tensors: taken by the source's reader, remembered, or read for it now."""

    def __init__(self, source: ModelSource) -> None:
        self.memo = Memo.load()
        self._reader = source.reader
        self._states: dict[str, FileState] = {}
        self._remember(list(self._reader.digests))  # a thread may be adding to it

    def missing(self, tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
        """Those of which no digest is known."""
        return [tensor for tensor in tensors if self._known(tensor) is None]

    def untouched(self, tensors: Sequence[StoredTensor]) -> bool:
        """Whether nothing of a block was read now, and not all of it before."""
        read = any(tensor.name in self._reader.digests for tensor in tensors)
        return not read and bool(self.missing(tensors))

    def read_missing(self, tensors: Sequence[StoredTensor], quiet: bool) -> None:
        """Read what is missing, and nothing else."""
        missing = self.missing(tensors)
        if not missing:
            return
        total = sum(tensor.size for tensor in missing)
        with (
            Progress(total, "identifying weights", "bytes", quiet=quiet) as progress,
            ThreadPoolExecutor(_THREADS) as pool,
        ):
            for tensor, _ in zip(missing, pool.map(self._reader.hash, missing), strict=True):
                self._remember([tensor.name])
                progress.update(tensor.size)

    def _remember(self, names: Sequence[str]) -> None:
        for name in names:
            state, digest = self._reader.digests[name]
            if state is not None:
                self.memo.put(state, name, digest)

    def link(self, before: str, tensors: Sequence[StoredTensor]) -> str:
        """One step of the chain."""
        # A head around the model, or none, puts more or less before a name; its end stays.
        content = [
            [tensor.name.split(".")[-4:], tensor.dtype, tensor.shape, self._known(tensor)]
            for tensor in sorted(tensors, key=lambda tensor: tensor.name)
        ]
        return hashlib.sha256(json.dumps([before, content]).encode()).hexdigest()

    def _known(self, tensor: StoredTensor) -> str | None:
        if tensor.name in self._reader.digests:
            return self._reader.digests[tensor.name][1]
        if tensor.file is None:
            return None
        # Asked of the system once per file: a checkpoint has hundreds of tensors to a shard.
        if tensor.shard not in self._states:
            self._states[tensor.shard] = state_of(tensor.file)
        return self.memo.get(self._states[tensor.shard], tensor.name)

"""Models: what they are, which of their weights are needed, where their blocks are.

Imports transformers, as `loading.py` and `attention.py` do. Two steps:

    open_model(options) -> ModelSource            config and tokenizer; reads no weights
    ModelSource.load(depth, start) -> LoadedModel the embeddings, and blocks as many as are wanted
    ModelSource.skeleton, read_block, build_block the same, one block at a time

Guarantees: a model is loaded from safetensors only, runs no code from its folder, and every weight
that the wanted layers depend on came from the checkpoint. The LM head and deeper blocks are neither
read nor run. Not covered: encoder-decoders, and models whose blocks are not one list of modules.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probecache.adapter import Adapter, find_adapter
from probecache.checkpoint import Naming, Weights, folder_of, require_safetensors
from probecache.devices import find_device
from probecache.errors import ModelError, UsageError, one_line
from probecache.loaded import NOT_TEXT, LoadedModel, find_blocks
from probecache.loading import Loader
from probecache.model_config import (
    context_length,
    depends_on_length,
    is_causal,
    place_limit,
    quiet_transformers,
    read_config,
)
from probecache.prompts import TokenizerFacts
from probecache.reading import BlockWeights, LazyTensor, WeightReader
from probecache.types import Dtype

if TYPE_CHECKING:
    import torch

    from probecache.prompts import Tokenizer

__all__ = ["ModelOptions", "ModelSource", "open_model"]

_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# Transformers hands these quantisers nothing but the names of the checkpoint's files.
_WANT_FILES = ("torchao",)
_SETTINGS_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, in which precision, where.

    Attributes:
        model: folder or hub id.
        revision: branch, tag or commit on the hub.
        dtype: None stands for the checkpoint's own.
        adapter: folder or hub id of a PEFT adapter.
        device: "cpu", "cuda", "cuda:1", "mps"; None takes the best there is.
        device_map: "auto" spreads the blocks over all devices.
    """

    model: str
    revision: str | None = None
    dtype: Dtype | None = None
    adapter: str | None = None
    device: str | None = None
    device_map: str | None = None


def open_model(options: ModelOptions) -> ModelSource:
    """Read a model's config and tokenizer.

    Raises:
        ModelError: no such model, only pickled weights, or an architecture that does not fit.
        UsageError: options that exclude one another.
    """
    if options.device and options.device_map:
        raise UsageError("expected either --device or --device-map, got both; leave one out")
    folder = folder_of(options.model, options.revision, _SETTINGS_FILES)
    quiet_transformers()
    source = ModelSource(options, folder, read_config(folder, options.model))
    source.check_architecture()
    source.check_weights()
    return source


# ---------------------------------------------------------------- source


@dataclass(frozen=True)
class ModelSource:
    """A model before its weights are read."""

    options: ModelOptions
    folder: Path
    config: Any

    @cached_property
    def text_config(self) -> Any:
        """The part of the config that describes the language model."""
        return self.config.get_text_config()

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return int(self.text_config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.text_config.hidden_size)

    @property
    def architecture(self) -> str:
        """Model type, as the config names it."""
        return str(self.config.model_type)

    @cached_property
    def dtype(self) -> Dtype:
        """As asked, or the checkpoint's own."""
        if self.options.dtype is not None:
            return self.options.dtype
        declared = getattr(self.config, "dtype", None) or getattr(self.text_config, "dtype", None)
        name = str(declared or self._stored_dtype()).removeprefix("torch.")
        try:
            return Dtype(name)
        except ValueError:
            raise ModelError(
                f"expected {self.options.model} to be stored as {', '.join(Dtype)}, got {name}; "
                "pass --dtype"
            ) from None

    @property
    def quantization(self) -> str | None:
        """The checkpoint's quantisation settings as text, or None."""
        settings = getattr(self.config, "quantization_config", None)
        if settings is None:
            return None
        content = settings if isinstance(settings, dict) else settings.to_dict()
        return json.dumps(content, sort_keys=True, default=str)

    @cached_property
    def facts(self) -> TokenizerFacts:
        """What the model says of its input."""
        return TokenizerFacts(context_length=context_length(self.config), causal=self.causal)

    @cached_property
    def causal(self) -> bool:
        """Whether a token sees only those before it."""
        return is_causal(self.config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ModelError: the folder holds none.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers raises many kinds for a missing tokenizer
            raise ModelError(
                f"expected a tokenizer in {self.options.model}, got: {one_line(error)}"
            ) from error
        return tokenizer

    @property
    def revision(self) -> str | None:
        """The commit of a hub model; None of a folder."""
        return None if self._is_local else self.folder.name

    @property
    def attention(self) -> str:
        """The attention implementation that transformers will choose."""
        return str(getattr(self._shell.config, "_attn_implementation", None))

    @cached_property
    def adapter(self) -> Adapter | None:
        """The adapter that goes on top of the model."""
        name = self.options.adapter
        return None if name is None else find_adapter(name, _SETTINGS_FILES)

    @property
    def independent_blocks(self) -> int:
        """How many blocks need nothing of those before them but the residual stream."""
        if self.why_not_streamed:
            return 0
        # Gemma 4's last blocks take keys and values from earlier ones.
        shared = getattr(self.text_config, "num_kv_shared_layers", None) or 0
        return self.num_hidden_layers - shared

    # -- prefixes

    def depends_on_length(self, longest: int) -> bool:
        """Whether a token's numbers depend on how many follow it in its prompt."""
        return depends_on_length(self.config, longest)

    def why_not_shared(self, longest: int) -> str:
        """Why prompts up to a length cannot share prefixes; empty where they may."""
        if not self.causal:
            return f"in {self.architecture} tokens see those behind them"
        if self.depends_on_length(longest):
            return f"the rotary embedding of {self.architecture} changes with a prompt's length"
        if longest > (place_limit(self.config) or longest):
            return f"{self.architecture} scales attention by a token's place in its row"
        if self._shell._is_stateful:
            return f"{self.architecture} keeps a state from token to token"
        return ""

    # -- checks

    def check_architecture(self) -> None:
        """Refuse what has no single stack of blocks."""
        if getattr(self.config, "is_encoder_decoder", False):
            raise ModelError(
                f"expected a causal language model or an encoder, got the encoder-decoder "
                f"{self.architecture}; these are not supported"
            )
        for name in ("num_hidden_layers", "hidden_size"):
            size = getattr(self.text_config, name, None)
            if not isinstance(size, int) or size < 1:
                raise ModelError(
                    f"expected the config of {self.options.model} to state {name}, got {size!r}; "
                    f"the config is damaged, or the architecture {self.architecture} not supported"
                )

    def check_ids(self, largest: int) -> None:
        """Refuse token ids that the model has no embedding for."""
        size = getattr(self.text_config, "vocab_size", None)
        if isinstance(size, int) and largest >= size:
            raise ModelError(
                f"expected token ids below {size}, the vocabulary of {self.options.model}, got "
                f"{largest}; its tokenizer is another model's: use the one it was trained with"
            )

    def check_weights(self) -> None:
        """Refuse a folder without safetensors; what the hub has is seen when headers are read.

        And refuse what would make transformers load other weights than those that are named.
        """
        if getattr(self.config, "transformers_weights", None) is not None:
            raise ModelError(
                f"expected the weights of {self.options.model} under their usual names, got the "
                "entry transformers_weights in its config, which names another file; remove it"
            )
        if (self.folder / "adapter_config.json").is_file():
            raise ModelError(
                f"expected a model without an adapter in {self.options.model}, got an "
                "adapter_config.json beside it; name the base with --model and the adapter's own "
                "folder with --adapter"
            )
        if self._is_local:
            require_safetensors(self.folder)

    def check_blocks(self, depth: int) -> None:
        """Refuse weights that do not fill the first `depth` blocks; see `Weights.require`."""
        shapes = {name: weight.shape for name, weight in self._shell.named_parameters()}
        self.weights.require(_blocks(depth, 0), shapes, sized=self.quantization is None)

    # -- weights on disk

    @cached_property
    def weights(self) -> Weights:
        """What the checkpoint holds, from the headers of its files, here or on the hub."""
        # A moved branch must not mix two versions: the commit is that of the config.
        hub = None if self._is_local else (self.options.model, self.folder.name)
        return Weights(self.folder, self._naming(), hub)

    def weight_bytes(self, depth: int, start: int = 0) -> int:
        """Bytes of weights that `load(depth, start)` reads."""
        return sum(tensor.size for tensor in self.weights.needed(_blocks(depth, start)))

    def loaded_bytes(self, depth: int, start: int = 0) -> int:
        """Bytes that the model of `load(depth, start)` takes in memory."""
        if self.quantization is not None:
            return self.weight_bytes(depth, start)
        needed = self.weights.needed(_blocks(depth, start))
        return self.dtype.itemsize * sum(tensor.count for tensor in needed)

    def block_bytes(self, index: int) -> int:
        """Bytes of weights that `read_block` reads."""
        return sum(tensor.size for tensor in self.weights.of_block(index))

    def weight_samples(self, layers: tuple[int, ...]) -> dict[int, str]:
        """For each layer, a hash of samples of what it depends on; fetches the weights.

        See `Weights.samples`, and `content.py` for the whole of it.
        """
        self.fetch_weights(max(layers))
        return self.weights.samples(layers)

    def fetch_weights(self, depth: int, start: int = 0) -> None:
        """Download what `load(depth, start)` reads of a hub model, and no other file of weights.

        Raises:
            ModelError: the hub cannot be reached, or does not have a file.
        """
        self._fetch(_blocks(depth, start))

    def _fetch(self, blocks: range, outside: bool = True) -> None:
        if self._is_local:
            return  # a missing file is named when it is opened
        if self._wants_files:
            blocks = range(self.num_hidden_layers)
        absent = self.weights.absent_files(blocks, outside)
        if absent:
            folder_of(self.options.model, self.folder.name, [*_SETTINGS_FILES, *absent])
            absent = self.weights.absent_files(blocks, outside)
        if absent:
            raise ModelError(
                f"expected {absent[0]} of {self.options.model} on this machine or on the hub, got "
                "neither; check the connection, or whether HF_HUB_OFFLINE is set"
            )

    @property
    def _is_local(self) -> bool:
        return Path(self.options.model).is_dir()

    def _stored_dtype(self) -> str:
        words = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        largest = max(self.weights.needed(range(1)), key=lambda tensor: tensor.size)
        return words.get(largest.dtype, largest.dtype)

    @cached_property
    def _shell(self) -> Any:
        """The model without head, built without weights."""
        import torch
        from transformers import AutoModel

        try:
            with torch.device("meta"):
                return AutoModel.from_config(self.config, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for a config of no use
            raise ModelError(
                f"expected the config of {self.options.model} to describe a model, got: "
                f"{one_line(error)}; the architecture {self.architecture} is not supported"
            ) from error

    def _naming(self) -> Naming:
        """Names in the model without head."""
        model = self._shell
        path, _ = find_blocks(model, self.num_hidden_layers)
        children = {name for name, _ in model.named_children()}
        children |= {name.split(".")[0] for name, _ in model.named_parameters()}
        return Naming(
            wrappers=frozenset({model.base_model_prefix, "model", "transformer"}),
            children=frozenset(children - {"pooler"}),
            block_list=path.rsplit(".", 1)[-1],
            not_text=NOT_TEXT,
        )

    # -- loading

    @cached_property
    def reader(self) -> WeightReader:
        """What reads the weights; it counts their bytes."""
        import torch

        device = find_device(self.options.device)
        direct = device.type == "cuda" and self.options.device_map is None and _has_accelerate()
        return WeightReader(device if direct else torch.device("cpu"))

    def load(self, depth: int, start: int = 0) -> LoadedModel:
        """Load the embeddings and the blocks from `start` to before `depth` onto the device.

        Blocks below `start` are neither read nor run: they hand on what they are given.

        Args:
            depth: at least one block is loaded.
            start: at most `depth`.

        Raises:
            ModelError: weights are missing, of other shapes, or the device is not there.
        """
        if start > 0 and depth > self.independent_blocks:
            raise _no_parts(
                self.why_not_streamed
                or f"{self.architecture}, whose blocks from {self.independent_blocks} on take keys "
                "and values from earlier ones"
            )
        return self._load(_blocks(depth, start), self._loader)

    def skeleton(self, depth: int) -> LoadedModel:
        """Load the embeddings and whatever else stands outside the blocks onto the device.

        The `depth` blocks hand on what they are given until `build_block` has made one that is
        assigned to its place in `blocks`; with the former one assigned again, its weights go.

        Raises:
            ModelError: as `load`, or an architecture whose blocks cannot stand alone.
        """
        if self.why_not_streamed:
            raise _no_parts(self.why_not_streamed)
        try:
            return self._load(range(depth, depth), self._single_loader)
        except ModelError as error:
            raise ModelError(
                f"{error}; or keep it in memory whole, with --engine resident"
            ) from error

    def read_block(self, index: int) -> BlockWeights:
        """Read a block's weights; may run in a thread while another block computes.

        Raises:
            ModelError: the files are not what they should be.
        """
        self._fetch(range(index, index + 1), outside=False)
        return self.reader.read_block(self.weights.of_block(index))

    def build_block(self, index: int, weights: BlockWeights) -> torch.nn.Module:
        """Make a block of its weights: the very block that `load` gives.

        Raises:
            ModelError: as `load`.
        """
        return self._single_loader.block(index, weights)

    def _load(self, blocks: range, loader: Loader) -> LoadedModel:
        self._fetch(blocks)
        needed = self.weights.needed(blocks)
        return loader.model({one.name: LazyTensor(one, self.reader) for one in needed}, blocks)

    @cached_property
    def why_not_streamed(self) -> str:
        """Why blocks cannot be loaded one by one; empty where they can."""
        if self._wants_files:
            return "a quantisation that has to read the whole checkpoint itself"
        return ""

    @property
    def _wants_files(self) -> bool:
        """Whether the quantiser reads the files' own metadata, which a state dict has not."""
        return json.loads(self.quantization or "{}").get("quant_method") in _WANT_FILES

    @cached_property
    def _loader(self) -> Loader:
        spread = self.options.device_map
        return replace(self._single_loader, device_map=spread) if spread else self._single_loader

    @cached_property
    def _single_loader(self) -> Loader:
        """What loads onto a single device.

        Transformers asks for accelerate even for that, unless it is the CPU; without it modules are
        made in memory and moved from there.
        """
        import torch

        device = find_device(self.options.device)
        return Loader(
            name=self.options.model,
            kind=type(self._shell),
            config=self.config,
            num_blocks=self.num_hidden_layers,
            naming=self.weights.naming,
            dtype=getattr(torch, self.dtype),
            device=device,
            device_map=str(device) if device.type != "cpu" and _has_accelerate() else None,
            adapter=self.adapter,
            folder=self.folder if self._wants_files else None,
        )

    def check_device(self) -> None:
        """Raise ModelError unless the device is there, UsageError for a map there is not."""
        wanted = self.options.device_map
        if wanted is not None and wanted not in _DEVICE_MAPS:
            raise UsageError(
                f"expected --device-map to be {', '.join(_DEVICE_MAPS)}, got {wanted!r}; auto "
                "suits most"
            )
        find_device(self.options.device)


# ---------------------------------------------------------------- files and config


def _blocks(depth: int, start: int) -> range:
    """The blocks from `start` to before `depth`; at least one without a start, as for layer 0."""
    return range(start, max(depth, 1) if start == 0 else depth)


def _no_parts(whole: str) -> ModelError:
    return ModelError(
        f"expected blocks that stand alone, got {whole}; this model cannot be streamed or "
        "continued from a cached layer: keep it in memory as a whole"
    )


def _has_accelerate() -> bool:
    return find_spec("accelerate") is not None

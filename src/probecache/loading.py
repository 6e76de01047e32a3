"""Weights to modules: a whole model, one without its blocks, or a single block.

All three go through the public `from_pretrained` of transformers with a state dict, so its weight
conversions and quantisers run, and a block that is built alone equals bit for bit the one that
comes with the model. Imports transformers, as `models.py` and `attention.py` do.

Guarantee: every weight came from the checkpoint in its own shape; transformers would draw missing
ones at random.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probecache.adapter import Adapter
from probecache.checkpoint import Naming
from probecache.errors import ModelError, one_line
from probecache.loaded import LoadedModel, find_blocks, insert_pass_throughs

if TYPE_CHECKING:
    import torch

    from probecache.reading import BlockWeights

__all__ = ["Loader"]


@dataclass(frozen=True)
class Loader:
    """Makes modules of a model's weights.

    Attributes:
        name: what the user calls the model.
        kind: its class, without head.
        config: its whole config.
        num_blocks: blocks of the whole model.
        naming: how its tensors are named.
        dtype: of the weights in memory, where they are not quantised.
        device: where modules go.
        device_map: what transformers is told of that; None moves them when they are loaded.
        adapter: what goes on top.
        folder: where transformers reads the weights itself, for quantisers that want the files.
    """

    name: str
    kind: type
    config: Any
    num_blocks: int
    naming: Naming
    dtype: torch.dtype
    device: torch.device
    device_map: str | None
    adapter: Adapter | None
    folder: Path | None = None
    _frame: list[Any] = field(default_factory=list, repr=False)

    def model(self, tensors: Mapping[str, Any], blocks: range) -> LoadedModel:
        """The model cut behind a range of blocks, pass-throughs in the place of those before it.

        Args:
            tensors: by their names in the checkpoint, those outside the blocks and of these blocks.

        Raises:
            ModelError: weights are missing or of other shapes, or the device is full.
        """
        spared: list[Any] = []

        def cut(config: Any) -> Any:
            model = self.kind(config)
            everything = find_blocks(model, self.num_blocks)[1]
            del everything[blocks.stop :]
            spared.extend(_taken(everything, range(blocks.start)))
            return model

        model, report = self._filled(cut, tensors)
        self._require_none(name for name in report["missing_keys"] if "pooler" not in name)
        self._adapt_model(model, blocks)
        loaded = LoadedModel(model.eval(), blocks.stop)
        insert_pass_throughs(loaded, spared)
        return loaded

    def block(self, index: int, weights: BlockWeights) -> torch.nn.Module:
        """A single block.

        Raises:
            ModelError: as `model`.
        """
        weights.wait()
        frame, report = self._filled(lambda config: self._framed(config, index), weights.tensors)
        path, blocks = find_blocks(frame, self.num_blocks)
        missing = report["missing_keys"]
        self._require_none(name for name in missing if name.startswith(f"{path}.{index}."))
        if getattr(self.config, "quantization_config", None) is not None:
            # A scale that finds no place means numbers that are wrong by it.
            self._require_none(report["unexpected_keys"])
        block: torch.nn.Module = blocks[index]
        self._adapt_block(block, index)
        return block.eval()

    def _filled(
        self, make: Callable[[Any], Any], tensors: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        """What `make` builds of the config, with weights; and what transformers says of them."""
        import torch

        files = {} if self.folder is None else {"use_safetensors": True}
        source = {"state_dict": dict(tensors)} if self.folder is None else {}
        try:
            model, report = _ready(self.kind, make).from_pretrained(  # type: ignore[attr-defined]
                self.folder,
                config=self.config,
                dtype=self.dtype,
                device_map=self.device_map,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named and refused
                **files,
                **source,
            )
            if self.device_map is None:
                model.to(self.device)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"expected room for the weights on {self.device}, got: {one_line(error)}; ask for "
                "fewer layers or pass --device-map auto"
            ) from error
        except ModelError:
            raise
        except Exception as error:  # transformers raises many kinds; none should end in a traceback
            raise ModelError(f"expected to load {self.name}, got: {one_line(error)}") from error
        self._require_none(map(str, report["mismatched_keys"]))
        return model, report

    def _require_none(self, wrong: Iterable[str]) -> None:
        # Transformers fills missing weights with noise and goes on; a probe of noise looks real.
        names = sorted(wrong)
        if names:
            raise ModelError(
                f"expected {self.name} to hold every weight of its config, but {len(names)} are "
                f"missing or of another shape, first {names[0]}; download it again"
            )

    def _framed(self, config: Any, index: int) -> Any:
        """The model with nothing but one block; building all of it each time takes too long."""
        if not self._frame:
            model = self.kind(config)
            path, blocks = find_blocks(model, self.num_blocks)
            spared = _taken(blocks, range(len(blocks)))
            _empty(model, path)
            self._frame.extend([model, blocks, spared])
        model, blocks, spared = self._frame
        placeholder, blocks[index] = blocks[index], spared[index]
        try:
            return copy.deepcopy(model)
        finally:
            blocks[index] = placeholder

    # -- adapters

    def _adapt_model(self, model: Any, blocks: range) -> None:
        """Put the adapter into a model with weights in these blocks and outside of all."""
        if self.adapter is None or not {None, *blocks} & self._adapted:
            return
        shell = copy.deepcopy(self._headed[0])
        setattr(shell, shell.base_model_prefix, model)
        inside = [block for block in self._adapted if block is not None]
        with self._lent(find_blocks(model, blocks.stop)[1], inside, blocks):
            self.adapter.apply(shell, self.naming.block_of, self.num_blocks)

    def _adapt_block(self, block: Any, index: int) -> None:
        """Put the adapter into a single block."""
        if self.adapter is None or index not in self._adapted:
            return
        shell = copy.deepcopy(self._headed[0])
        base = getattr(shell, shell.base_model_prefix)
        find_blocks(base, self.num_blocks)[1][index] = block
        self.adapter.apply(shell, self.naming.block_of, self.num_blocks)

    @contextmanager
    def _lent(self, blocks: Any, adapted: Iterable[int], there: range) -> Iterator[None]:
        """Lend a block without weights to a model that has none of those that are adapted.

        Peft refuses a model without the modules that its settings name, even where it has others
        to save: an embedding, say.
        """
        import torch

        depth, index = len(blocks), min(adapted, default=None)
        if index is None or set(there) & set(adapted):
            yield
            return
        blocks.extend(torch.nn.Module() for _ in range(depth, index + 1))
        placeholder, blocks[index] = blocks[index], copy.deepcopy(self._headed[1][index])
        try:
            yield
        finally:
            blocks[index] = placeholder
            del blocks[depth:]

    @cached_property
    def _adapted(self) -> frozenset[int | None]:
        """Blocks that the adapter changes, and None where it changes something outside.

        Asked of the whole model, without weights: a part of it may have none of what is adapted.
        """
        if self.adapter is None:
            return frozenset()
        shell, blocks = self._headed
        shell = copy.deepcopy(shell)
        base = getattr(shell, shell.base_model_prefix)
        places = find_blocks(base, self.num_blocks)[1]
        for index, block in enumerate(blocks):
            places[index] = copy.deepcopy(block)
        return self.adapter.reach(shell, self.naming.block_of, self.num_blocks)

    @cached_property
    def _headed(self) -> tuple[Any, list[Any]]:
        """The model with its head, and its blocks apart, all without weights.

        Adapters are trained on the model with its head, so their weights bear its names. The head
        itself is never run.
        """
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        blocks = find_blocks(getattr(shell, shell.base_model_prefix), self.num_blocks)[1]
        return shell, _taken(blocks, range(self.num_blocks))


def _taken(blocks: Any, places: range) -> list[Any]:
    """Take blocks out of a list and leave modules without parameters in their places."""
    import torch

    taken = [blocks[place] for place in places]
    placeholder = torch.nn.Module()
    for place in places:
        blocks[place] = placeholder
    return taken


def _empty(model: Any, path: str) -> None:
    """Leave of a model's modules only those that lead to its blocks.

    One parameter behind the blocks stays by name: quantisers spare whatever comes last in a model.
    """
    import torch

    last = [name for name, _ in model.named_parameters() if not name.startswith(f"{path}.")][-1:]
    kept = ["", *(path.rsplit(".", depth)[0] for depth in range(1, path.count(".") + 1))]
    for name, _ in list(model.named_modules()):
        if name not in (*kept, path) and name.rpartition(".")[0] in kept:
            model.set_submodule(name, torch.nn.Module())
    for name in last:
        *parents, leaf = name.split(".")
        module = model
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        if not hasattr(module, leaf):
            module.register_parameter(leaf, torch.nn.Parameter(torch.empty(1)))


def _ready(kind: type, make: Callable[[Any], Any]) -> type:
    """The class `kind` whose instances are what `make` returns for a config.

    So `from_pretrained` fills what somebody else has built, cut or emptied. The config stays whole:
    a smaller `num_hidden_layers` would change what some architectures make of the blocks that are
    left (which attention the last one has, whose keys and values are shared, how wide an embedding
    per block is).
    """

    class Ready(kind):  # type: ignore[misc]
        def __new__(cls, config: Any, *_arguments: Any, **_options: Any) -> Any:
            return make(config)

    # Transformers looks classes up by their names.
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Ready, name, getattr(kind, name))
    return Ready

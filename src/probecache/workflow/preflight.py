"""Before a run: do the engine's steps equal a plain Hugging Face forward?

A few prompts are run both ways and compared at every wanted layer on every token. Catches masks,
padding, positions, layer conventions and sharing of prefixes that an architecture handles in a way
not foreseen. Not covered: prompts other than those compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from probecache.engine import is_out_of_memory, no_room
from probecache.errors import ForwardError, PreflightError, ProbecacheError, one_line
from probecache.loaded import Leftovers
from probecache.types import Dtype, TokenizedPrompt

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from probecache.engine import Engine, Rows, Start
    from probecache.feeds import Work
    from probecache.loaded import LoadedModel
    from probecache.prefixes import PrefixTree

__all__ = ["Comparison", "PlainRun", "Sample", "check_engine", "choose_sample", "tolerance"]

_PLACES = (0.1, 0.75)  # among the prompts by length
_SHARE = 0.03  # of the run's distinct tokens that the longer of them may have
# Multiples of the dtype's rounding step. Measured on a CPU, worst row of 22 tiny random families:
# 14, 3 and 3.1 steps; of a trained Llama of 24 blocks: 4, 1.6 and 1.7; of random models of 80
# blocks with weights far larger than trained ones: 41, 12 and 9. Accelerators, which choose other
# kernels for other shapes, are not measured. A mask ignored or positions moved gave rows wrong by
# 0.4 to 1.9 of their length, so the limits stay well above the one and below the other.
_STEPS = {Dtype.FLOAT32: 800, Dtype.FLOAT16: 40, Dtype.BFLOAT16: 20}
_STEP = {Dtype.FLOAT32: 2.0**-23, Dtype.FLOAT16: 2.0**-10, Dtype.BFLOAT16: 2.0**-7}
# A token that rounding sends to another expert differs wholly, and tokens that see it a little. No
# more than this share may, and without experts none may differ by more than so many tolerances.
_SHARE_OF_STRAY_TOKENS = 0.25
_STRAY = 4


def tolerance(dtype: Dtype) -> float:
    """Largest relative difference of a row that rounding explains."""
    return _STEPS[dtype] * _STEP[dtype]


# ---------------------------------------------------------------- which prompts


@dataclass(frozen=True)
class Sample:
    """The prompts that are compared, every token kept.

    Attributes:
        prompts: copies of some of the run's.
        indices: int64, which.
        start: where the run begins.
    """

    prompts: list[TokenizedPrompt]
    indices: NDArray[np.int64]
    start: Start | None = None

    @property
    def layer(self) -> int:
        """The layer that the run begins at."""
        return self.start.layer if self.start else 0

    def rows(self, prompts: NDArray[np.int64], depths: NDArray[np.int64]) -> torch.Tensor:
        """As `Start.rows`, of the sample's prompts."""
        assert self.start is not None
        return self.start.rows(np.where(prompts < 0, -1, self.indices[prompts]), depths)

    def as_start(self) -> Start | None:
        """Where the sample's run begins; None at its tokens."""
        return self if self.start is not None else None

    def known(self, index: int) -> torch.Tensor | None:
        """Where one of the prompts begins: [1, tokens, hidden], or None at its tokens."""
        if self.start is None:
            return None
        count = len(self.prompts[index])
        return self.rows(np.full(count, index), np.arange(count))[None]


def choose_sample(tree: PrefixTree, start: Start | None = None) -> Sample:
    """A short and a long prompt, and the one that shares most with the short one."""
    prompts = tree.prompts
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    short, long = (int(place * (len(by_length) - 1)) for place in _PLACES)
    while long > short and len(prompts[by_length[long]]) > _SHARE * len(tree):
        long -= 1
    chosen = {by_length[short], by_length[long]}
    place = tree.order.index(by_length[short])
    around = [
        (int(tree.shared[p]), q)
        for p, q in ((place, place - 1), (place + 1, place + 1))
        if 0 <= q < len(prompts)
    ]
    if around:
        chosen.add(tree.order[max(around)[1]])
    indices = sorted(chosen)
    whole = [prompts[index].ids for index in indices]
    return Sample(
        [TokenizedPrompt(ids, np.arange(len(ids), dtype=np.int32)) for ids in whole],
        np.array(indices, dtype=np.int64),
        start,
    )


# ---------------------------------------------------------------- the two ways


@dataclass
class Comparison:
    """Holds rows of the sample against plain ones.

    Attributes:
        model: the model, for its name and kind.
        dtype: what it computes in.
        plain: [tokens, hidden] by (layer, prompt).
        worst: largest relative difference of an ordinary row so far.
    """

    model: LoadedModel
    dtype: Dtype
    plain: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    worst: float = 0.0

    def check(self, rows: Rows, sample: Sample) -> None:
        """Compare rows of the sample.

        Raises:
            PreflightError: they disagree beyond the dtype's rounding.
        """
        import torch

        pieces = torch.split(rows.values, [len(sample.prompts[index]) for index in rows.prompts])
        for index, found in zip(rows.prompts, pieces, strict=True):
            error, stray = _differences(found, self.plain[rows.layer, index])
            self.worst = max(self.worst, error)
            if not self.model.has_experts:
                error = max(error, stray / _STRAY)
            # NaN fails no comparison, so ask for what is right and not for what is wrong.
            if not error <= tolerance(self.dtype):
                raise PreflightError(
                    f"expected the batched forward to equal a plain one within "
                    f"{tolerance(self.dtype):.1g} relative in {self.dtype}, got "
                    f"{max(error, stray):.2g} at layer {rows.layer} on a prompt of {len(found)} "
                    "tokens; this architecture or checkpoint does not batch as expected: nothing "
                    "was extracted"
                )


def check_engine(
    engine: Engine,
    comparison: Comparison,
    sample: Sample,
    work: Work,
    layers: Sequence[int],
) -> float:
    """Compare an engine whose whole model is in memory with plain forwards.

    Args:
        work: the sample's prompts, cut as the run's are.

    Returns:
        The largest relative difference of an ordinary row, |engine - plain| / |plain|.

    Raises:
        PreflightError: they disagree beyond the dtype's rounding.
        OutOfMemoryError: one of these prompts does not fit.
        ModelError: the model does not run on token ids alone.
    """
    model = comparison.model
    if not comparison.plain:
        for index, prompt in enumerate(sample.prompts):
            with _alone(model, prompt) as ids:
                states = model.plain_hidden_states(ids, sample.layer, sample.known(index))
            for layer in layers:
                comparison.plain[layer, index] = states[layer].cpu()
    with foreign_errors_named(model):
        for rows in engine.run(work, layers, sample.as_start()):
            comparison.check(rows, sample)
    return comparison.worst


@dataclass
class PlainRun:
    """The sample through one block after the other, each prompt alone, while a model is streamed.

    Attributes:
        comparison: is given the plain rows of the wanted layers.
    """

    comparison: Comparison
    sample: Sample
    layers: Sequence[int]
    _hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    _left: dict[int, Leftovers] = field(default_factory=dict)

    def through(self, block: int) -> None:
        """Run the sample through a block that is in its place in the model."""
        first = block == self.sample.layer
        for index, prompt in enumerate(self.sample.prompts):
            known = self.sample.known(index) if first else self._hidden[index]
            with _alone(self.comparison.model, prompt) as ids:
                left = self._left.setdefault(index, Leftovers())
                streams = self.comparison.model.run_block(block, {"input_ids": ids}, known, left)
            self._hidden[index] = streams[1]
            for layer, stream in zip((block, block + 1), streams, strict=True):
                if layer in self.layers:
                    self.comparison.plain[layer, index] = stream[0].cpu()


@contextmanager
def _alone(model: LoadedModel, prompt: TokenizedPrompt) -> Iterator[torch.Tensor]:
    """The ids of a prompt [1, tokens] for a plain forward, whose errors are named."""
    import torch

    try:
        with torch.inference_mode(), foreign_errors_named(model):
            yield torch.from_numpy(prompt.ids.astype(np.int64))[None].to(model.input_device)
    except Exception as error:
        if is_out_of_memory(error):
            raise no_room(len(prompt)) from error
        raise


@contextmanager
def foreign_errors_named(model: LoadedModel) -> Iterator[None]:
    """Turn whatever an architecture that was not foreseen raises into one line."""
    try:
        yield
    except (ProbecacheError, OSError):  # what a disk refuses says nothing about a model
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ForwardError(
            f"expected {type(model.model).__name__} to run on token ids alone and to hand out its "
            f"hidden states, got: {one_line(error)}; this architecture is not supported"
        ) from error


def _differences(found: torch.Tensor, plain: torch.Tensor) -> tuple[float, float]:
    """Relative difference of the worst row, with the strays left out and without."""
    import torch

    a, b = found.double(), plain.double()
    finite, wanted = torch.isfinite(a).all(-1), torch.isfinite(b).all(-1)
    errors = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)
    # Rows that overflow both ways are the run's business: it counts them and says where they are.
    errors = errors.where(finite == wanted, torch.inf)[finite | wanted].sort().values
    if not len(errors):
        return 0.0, 0.0
    strays = int(len(errors) * _SHARE_OF_STRAY_TOKENS)
    return float(errors[-1 - strays]), float(errors[-1])

"""Before a run: does the engine's batched forward equal a plain Hugging Face forward?

Runs a few prompts of different lengths both ways and compares every wanted layer on every token.
Catches masks, padding, positions and layer conventions that an architecture handles in a way not
foreseen. Not covered: prompts other than those compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from probecache.engine import is_out_of_memory, no_room
from probecache.errors import ModelError, PreflightError, ProbecacheError, one_line
from probecache.plan import plan_batches
from probecache.types import Dtype, TokenizedPrompt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from probecache.engine import Engine, Rows
    from probecache.loaded import LoadedModel
    from probecache.plan import Batch

__all__ = ["check_engine", "tolerance"]

_PROMPTS = 4
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


def check_engine(
    engine: Engine,
    model: LoadedModel,
    prompts: Sequence[TokenizedPrompt],
    layers: Sequence[int],
    dtype: Dtype,
    token_budget: int,
) -> float:
    """Compare the engine with plain forwards on a few prompts.

    Returns:
        The largest relative difference of an ordinary row, |batched - plain| / |plain|.

    Raises:
        PreflightError: they disagree beyond the dtype's rounding.
        OutOfMemoryError: one of these prompts does not fit.
        ModelError: the model does not run on token ids alone.
    """
    import torch

    sample = _sample(prompts)
    batches = plan_batches([len(prompt) for prompt in sample], token_budget)
    plain = [_plain(model, prompt, layers) for prompt in sample]
    worst = 0.0
    for rows in _batched(engine, model, sample, batches, layers):
        pieces = torch.split(rows.values, [len(sample[index]) for index in rows.prompts])
        for index, batched in zip(rows.prompts, pieces, strict=True):
            error, stray = _differences(batched, plain[index][rows.layer])
            worst = max(worst, error)
            if not model.has_experts:
                error = max(error, stray / _STRAY)
            # NaN fails no comparison, so ask for what is right and not for what is wrong.
            if not error <= tolerance(dtype):
                raise PreflightError(
                    f"expected the batched forward to equal a plain one within "
                    f"{tolerance(dtype):.1g} relative in {dtype}, got {max(error, stray):.2g} at "
                    f"layer {rows.layer} on a prompt of {len(sample[index])} tokens; this "
                    "architecture or checkpoint does not batch as expected: nothing was extracted"
                )
    return worst


def _sample(prompts: Sequence[TokenizedPrompt]) -> list[TokenizedPrompt]:
    """A few prompts of different lengths, up to the third quartile, every token kept."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    places = np.linspace(0, 0.75 * (len(order) - 1), _PROMPTS).astype(int)
    chosen = [prompts[order[place]] for place in sorted(set(places.tolist()))]
    return [TokenizedPrompt(p.ids, np.arange(len(p.ids), dtype=np.int32)) for p in chosen]


def _plain(
    model: LoadedModel, prompt: TokenizedPrompt, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    import torch

    ids = torch.from_numpy(prompt.ids.astype(np.int64))[None].to(model.input_device)
    try:
        with torch.inference_mode():
            states = model.plain_hidden_states(ids)
            return {layer: states[layer].cpu() for layer in layers}
    except ProbecacheError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise no_room(len(prompt)) from error
        raise _unsupported(model, error) from error


def _batched(
    engine: Engine,
    model: LoadedModel,
    prompts: Sequence[TokenizedPrompt],
    batches: Sequence[Batch],
    layers: Sequence[int],
) -> Iterator[Rows]:
    try:
        yield from engine.run(prompts, batches, layers)
    except ProbecacheError:
        raise
    except Exception as error:
        raise _unsupported(model, error) from error


def _unsupported(model: LoadedModel, error: Exception) -> ModelError:
    """Whatever an architecture that was not foreseen raises, as one line."""
    return ModelError(
        f"expected {type(model.model).__name__} to run on token ids alone and to hand out its "
        f"hidden states, got: {one_line(error)}; this architecture is not supported"
    )


def _differences(batched: torch.Tensor, plain: torch.Tensor) -> tuple[float, float]:
    """Relative difference of the worst row, with the strays left out and without."""
    import torch

    a, b = batched.double(), plain.double()
    found, wanted = torch.isfinite(a).all(-1), torch.isfinite(b).all(-1)
    errors = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)
    # Rows that overflow both ways are the run's business: it counts them and says where they are.
    errors = errors.where(found == wanted, torch.inf)[found | wanted].sort().values
    if not len(errors):
        return 0.0, 0.0
    strays = int(len(errors) * _SHARE_OF_STRAY_TOKENS)
    return float(errors[-1 - strays]), float(errors[-1])

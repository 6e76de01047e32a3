"""The matmul limit: the seconds that the matrix products of some blocks alone take.

Nothing else of a forward is in it: no attention, norm, rotation, activation or embedding, no
padding, no Python around a token. Every product is F.linear with the model's own weights, one
weight after the other over all tokens, so that a weight stays in the processor's cache. Whatever
computes every token in these blocks cannot be faster on this machine, but for the choice of kernel.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHUNKS = {"cpu": (256, 512, 1024, 2048), "cuda": (2048, 4096, 8192, 16384)}
_TRIAL_TOKENS = 4096


def matrices_of(blocks: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
    """Weights [out, in] of the matrix products of Llama blocks."""
    return [
        module.weight
        for block in blocks
        for name, module in block.named_modules()
        if name.rsplit(".", 1)[-1] in _MATRICES
    ]


def matmul_seconds(weights: Sequence[torch.Tensor], tokens: int, chunk: int) -> float:
    """Seconds to multiply so many tokens with every weight, `chunk` of them at a time."""
    chunk = min(chunk, tokens)
    inputs = {weight.shape[1]: torch.randn(chunk, weight.shape[1]).to(weight) for weight in weights}
    whole, rest = divmod(tokens, chunk)
    synchronize(weights[0].device)
    started = time.perf_counter()
    with torch.inference_mode():
        for weight in weights:
            given = inputs[weight.shape[1]]
            for _ in range(whole):
                F.linear(given, weight)
            if rest:
                F.linear(given[:rest], weight)
    synchronize(weights[0].device)
    return time.perf_counter() - started


def best_chunk(weights: Sequence[torch.Tensor], tokens: int) -> int:
    """The fastest chunk size on the first weights, each tried twice after a warm-up."""
    weights = weights[: len(_MATRICES)]
    trial = min(tokens, _TRIAL_TOKENS) if weights[0].device.type == "cpu" else tokens
    sizes = CHUNKS.get(weights[0].device.type, CHUNKS["cuda"])
    matmul_seconds(weights, trial, sizes[0])
    seconds = {size: min(matmul_seconds(weights, trial, size) for _ in range(2)) for size in sizes}
    return min(sizes, key=lambda size: seconds[size])


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

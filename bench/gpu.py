"""python -m bench gpu: extraction on one GPU, and how near to its matmul rate it comes.

engine   The shape of Llama-3.3-70B with random bfloat16 weights, made on the device and never on
         disk, so the engine alone is timed: the shipped pairs, nine layers, against the matrix
         products of the model's own weights over the distinct prefixes (`limit.py`), in turn.
         Layers whose blocks do not fit beside a reserve are left out and named: 70 of 80 blocks
         take 122 GB.
stream   The shape of Llama-3.1-8B on disk, streamed and resident: see `python -m bench stream`.

The ids are those of models/tiny-llama's tokenizer, which cuts text into more tokens than Llama's.
With --device cpu and a small shape all of it runs without a GPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench import stream
from bench.cases import Case, count_prefixes, shipped_pairs
from bench.limit import best_chunk, matmul_seconds, matrices_of, synchronize
from bench.report import gigabytes, machine, progress, table
from bench.shapes import (
    LLAMA_8B,
    LLAMA_70B,
    TOKENIZER,
    Shape,
    add_shape_options,
    layer_numbers,
    shape_of,
)
from probecache.engine import ResidentEngine
from probecache.feeds import TreeWork
from probecache.loaded import LoadedModel
from probecache.plan import plan_stretches
from probecache.prefixes import PrefixTree
from probecache.types import TokenizedPrompt

_LAYERS = (10, 17, 25, 32, 40, 47, 55, 62, 70)
_RESERVE = 6e9  # bytes for activations and the library's workspace
_TOKEN_BUDGET = 16384
_TILE = {"cpu": 128, "cuda": 512}  # as `workflow/running.py` has it
_SHAPE_OPTIONS = ("hidden", "blocks", "heads", "kv_heads", "intermediate", "vocab", "dtype")


def build(shape: Shape, depth: int, device: torch.device) -> LoadedModel:
    """The first `depth` blocks of a Llama without head, random weights made on the device."""
    from transformers import AutoModel

    torch.manual_seed(0)
    config = replace(shape, blocks=depth).config()
    with device:
        model = AutoModel.from_config(
            config, dtype=getattr(torch, shape.dtype), attn_implementation="sdpa"
        )
    return LoadedModel(model.eval(), depth)


def layers_that_fit(
    shape: Shape, layers: Sequence[int], device: torch.device
) -> tuple[list[int], list[int]]:
    """The layers whose blocks fit on the device, and the others."""
    if device.type != "cuda":
        return list(layers), []
    itemsize = getattr(torch, shape.dtype).itemsize
    room = torch.cuda.mem_get_info(device)[0] - _RESERVE - shape.vocab * shape.hidden * itemsize
    deepest = math.floor(room / (shape.block_parameters * itemsize))
    return [x for x in layers if x <= deepest], [x for x in layers if x > deepest]


def run_engine(
    model: LoadedModel, prompts: Sequence[TokenizedPrompt], layers: Sequence[int], budget: int
) -> int:
    """All rows through the resident engine, as `extract` runs it; returns how many came out.

    The one place here that knows how prompts are planned and handed to the engine.
    """
    tree = PrefixTree(prompts)
    tile = _TILE.get(model.input_device.type, _TILE["cuda"])
    work = TreeWork(tree, plan_stretches(tree.bounds, tree.shared, budget), tile)
    return sum(len(rows.values) for rows in ResidentEngine(model).run(work, layers))


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of extraction and of the matmul limit, in turn after a warm-up of each."""
    layers, left_out = layers_that_fit(options.shape, options.layers, device)
    if not layers:
        raise SystemExit(f"expected room for the blocks of layer {options.layers[0]}, found less")
    prompts = Case("pairs", shipped_pairs(options.count), "last").prompts(TOKENIZER)
    distinct = count_prefixes(prompt.ids for prompt in prompts)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    model = build(options.shape, layers[-1], device)
    synchronize(device)
    progress(f"  {layers[-1]} blocks made in {time.perf_counter() - started:.1f} s")
    weights = matrices_of(model.blocks)
    chunk = best_chunk(weights, distinct)
    seconds: dict[str, list[float]] = {"extract": [], "limit": []}
    for number in range(options.repeats + 1):  # the first round warms up
        started = time.perf_counter()
        rows = run_engine(model, prompts, layers, options.batch_tokens)
        synchronize(device)
        taken = time.perf_counter() - started
        if rows != len(prompts) * len(layers):
            raise SystemExit(f"expected {len(prompts) * len(layers)} rows, got {rows}")
        limit = matmul_seconds(weights, distinct, chunk)
        progress(f"  extraction {taken:.3f} s, matmul limit {limit:.3f} s")
        if number:
            seconds["extract"].append(taken)
            seconds["limit"].append(limit)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else stream_peak()
    return {
        **seconds,
        "layers": layers,
        "left_out": left_out,
        "prompts": len(prompts),
        "tokens": sum(map(len, prompts)),
        "distinct": distinct,
        "chunk": chunk,
        "flops": 2 * sum(weight.numel() for weight in weights) * distinct,
        "peak": peak,
    }


def stream_peak() -> int:
    """Most memory of this process, where there is no GPU to ask."""
    from bench.child import peak_rss

    return peak_rss()


def show(found: dict[str, Any], options: argparse.Namespace) -> str:
    """Ratio and rate first, then seconds and counts."""
    extract, limit = found["extract"], found["limit"]
    rates = [f"{found['flops'] / min(values) / 1e12:,.2f}" for values in (extract, limit)]
    middle = statistics.median(limit) / statistics.median(extract)
    rows = [
        ["**share of the matmul rate, distinct prefixes**",
         f"{min(limit) / min(extract):.1%} ({middle:.1%})"],
        ["tokens / distinct prefixes", f"{found['tokens'] / found['distinct']:.2f}"],
        ["TFLOP/s: extraction, matmuls alone", ", ".join(rates)],
        ["seconds of extraction", f"{min(extract):.3f} ({statistics.median(extract):.3f})"],
        ["seconds of the matmuls", f"{min(limit):.3f} ({statistics.median(limit):.3f})"],
        ["prompts, tokens, distinct prefixes",
         f"{found['prompts']}, {found['tokens']:,}, {found['distinct']:,}"],
        ["layers", ", ".join(map(str, found["layers"]))],
        ["layers left out for want of memory", ", ".join(map(str, found["left_out"])) or "none"],
        ["batch tokens; chunk of the matmuls", f"{options.batch_tokens}; {found['chunk']}"],
        ["peak memory", gigabytes(found["peak"])],
    ]  # fmt: skip
    head = ("minimum (median)", f"first {found['layers'][-1]} of {options.shape.blocks} blocks")
    return table(head, rows) + f"\n\n{options.shape}."


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--part", choices=("engine", "stream", "both"), default="both")
    add("--device", default="cuda")
    add("--layers", type=layer_numbers, default=_LAYERS, help="of the engine's part")
    add("--count", type=int, help="so many pairs, the first [all]")
    add("--batch-tokens", type=int, default=_TOKEN_BUDGET)
    add("--repeats", type=int, default=3)
    add("--memory", help="passed to probecache.extract when it streams")
    add_shape_options(parser, f"{LLAMA_70B}; of what is streamed: {LLAMA_8B}")
    options = parser.parse_args(words)
    options.shape = shape_of(options, LLAMA_70B)
    if not 0 < options.layers[0] <= options.layers[-1] <= options.shape.blocks:
        parser.error(f"expected --layers from 1 to {options.shape.blocks}, got {options.layers}")
    return options


def stream_words(options: argparse.Namespace) -> list[str]:
    """The command line of `bench.stream` that these options ask for."""
    names = ("device", "count", "repeats", "memory", *_SHAPE_OPTIONS)
    words = []
    for name in names:
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return words


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print the tables."""
    options = parse(words)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else options.device
    if options.part != "stream":
        print(show(measure(options, device), options), machine(device=name), sep="\n\n", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next part's processes need the room
    if options.part != "engine":
        stream.main(stream_words(options), LLAMA_8B)

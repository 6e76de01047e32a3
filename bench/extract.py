"""python -m bench extract: probecache against hand-written loops and the matmul limit.

All in one run, on the same token ids, in turn, each after a warm-up:

    ours         probecache.extract into a cache on disk. Its seconds are the extract_s it tells:
                 first batch to last row handed over, without loading; the whole call is told too
    plain        the best loop that one writes by hand (`loops.PlainLoop`), model already loaded
    documented   output_hidden_states in batches (`loops.DocumentedLoop`), model already loaded
    limit        the matrix products alone (`limit.py`), for all tokens and for distinct prefixes

The rows of the three are compared with one another: if they differ, nothing is printed. Ratios are
of minima, those of medians behind them in parentheses. Tables go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import probecache
from bench.cases import NAMES, Case, count_prefixes, make_case
from bench.limit import best_chunk, matmul_seconds, matrices_of
from bench.loops import DocumentedLoop, PlainLoop, Rows
from bench.report import machine, progress, table
from bench.shapes import SMALL, Shape, add_shape_options, layer_numbers, shape_of, write_llama
from probecache.prompts import fingerprint
from probecache.store.reader import Cache
from probecache.types import TokenizedPrompt
from probecache.workflow.extract import Took

OURS, WHOLE, PLAIN, DOCUMENTED, LIMIT, LIMIT_DISTINCT = (
    "probecache",
    "probecache, whole call",
    "plain loop",
    "documented loop",
    "matmul limit, all tokens",
    "matmul limit, distinct prefixes",
)
# What rounding explains; a mask or position that is wrong gives 0.1 and more.
_TOLERANCE = {"float32": 1e-4, "float16": 0.04, "bfloat16": 0.16}
_WARM_UP = 16  # records


@dataclass
class Measured:
    """What one case gave."""

    case: Case
    prompts: int
    tokens: int
    distinct: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    ours: dict[str, float] = field(default_factory=dict)  # of probecache's last run
    budget: int = 0
    chunk: int = 0
    padded: int = 0
    difference: float = 0.0

    def ratio(self, slow: str, fast: str, by: Callable[[list[float]], float]) -> float:
        """How many times longer one took than the other."""
        return by(self.seconds[slow]) / by(self.seconds[fast])


# ---------------------------------------------------------------- probecache


@dataclass
class Ours:
    """probecache's public API, as a user calls it."""

    case: Case
    model: Path
    layers: tuple[int, ...]
    dtype: str
    folder: Path
    options: dict[str, Any]

    def run(self, records: list[dict[str, Any]], number: int) -> tuple[Cache, Took, float]:
        """A cache of these records in a folder of its own, what it took, seconds of the call."""
        took: list[Took] = []
        started = time.perf_counter()
        cache = probecache.extract(
            model=str(self.model),
            data=records,
            layers=self.layers,
            output=self.folder / f"{self.case.name}_{number}",
            dtype=self.dtype,
            positions=self.case.positions,
            system_prompt=self.case.system_prompt,
            device="cpu",
            quiet=True,
            finished=took.append,
            **self.options,
        )
        return cache, took[0], time.perf_counter() - started


def rows_of(cache: Cache) -> Rows:
    """The cache's rows as the loops return theirs: per layer, in the order of the prompts."""
    found = {}
    for layer in cache.layers:
        by_class = {label: cache[label, layer] for label in cache.classes}
        spans = [(record.label, slice(*record.rows)) for record in cache.examples]
        found[layer] = torch.cat([by_class[label][span] for label, span in spans])
    return found


def engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """--engine and --memory as arguments of `probecache.extract`, where it takes them."""
    given = {name: getattr(options, name) for name in ("engine", "memory")}
    given = {name: value for name, value in given.items() if value is not None}
    unknown = given.keys() - inspect.signature(probecache.extract).parameters.keys()
    if unknown:
        sys.exit(f"expected a probecache that takes {', '.join(sorted(unknown))}, got one without")
    return given


# ---------------------------------------------------------------- one case


def measure(case: Case, model: Path, options: argparse.Namespace, folder: Path) -> Measured:
    """Time everything in turn, and compare the rows in the first round."""
    prompts = case.prompts(model)
    result = Measured(
        case=case,
        prompts=len(prompts),
        tokens=sum(map(len, prompts)),
        distinct=count_prefixes(prompt.ids for prompt in prompts),
    )
    progress(f"{case.name}: {result.tokens:,} tokens, {result.distinct:,} distinct prefixes")
    ours = Ours(case, model, options.layers, options.dtype, folder, engine_options(options))
    plain = PlainLoop.load(model, options.layers, options.dtype)
    documented = DocumentedLoop.load(model, options.layers, options.dtype, options.batch)
    weights = matrices_of(plain.model.layers)

    ours.run(case.records[:_WARM_UP], -1)
    documented.run(prompts[: options.batch])
    promised = plain.choose_budget(prompts, options.budgets)
    progress("  plain loop: " + ", ".join(f"{b}: {s:.1f} s" for b, s in promised.items()))
    result.budget, result.chunk = plain.budget, best_chunk(weights, result.tokens)
    for number in range(options.repeats):
        seconds, rows = _ours_once(ours, prompts, number, result)
        _note(result, OURS, seconds)
        found = {OURS: rows, PLAIN: _timed(result, PLAIN, lambda: plain.run(prompts))}
        if number < options.documented:
            run = _timed(result, DOCUMENTED, lambda: documented.run(prompts))
            found[DOCUMENTED] = run
        if number == 0:
            result.difference = largest_difference(found, prompts, options.dtype)
        del found
        for name, count in ((LIMIT, result.tokens), (LIMIT_DISTINCT, result.distinct)):
            _note(result, name, matmul_seconds(weights, count, result.chunk))
    result.padded = plain.padded_tokens
    return result


def _ours_once(
    ours: Ours, prompts: Sequence[TokenizedPrompt], number: int, result: Measured
) -> tuple[float, Rows]:
    cache, took, total = ours.run(ours.case.records, number)
    timing = {**cache.info.timing, **asdict(took)}
    if cache.identity.token_ids != fingerprint(prompts):
        sys.exit("expected probecache to have run the ids that the loops run, got others")
    if int(timing["distinct_tokens"]) != result.distinct:
        sys.exit(
            f"expected probecache to count {result.distinct} distinct prefixes, got "
            f"{int(timing['distinct_tokens'])}"
        )
    result.ours = timing
    result.seconds.setdefault(WHOLE, []).append(total)
    return took.extract_s, rows_of(cache)


def _timed(result: Measured, name: str, run: Callable[[], Rows]) -> Rows:
    started = time.perf_counter()
    rows = run()
    _note(result, name, time.perf_counter() - started)
    return rows


def _note(result: Measured, name: str, seconds: float) -> None:
    result.seconds.setdefault(name, []).append(seconds)
    progress(f"  {name}: {seconds:.2f} s")


def largest_difference(
    found: dict[str, Rows], prompts: Sequence[TokenizedPrompt], dtype: str
) -> float:
    """The largest |a - b| / |b| of any row between any two; ends the run where rounding cannot
    explain it, because what is fast and wrong is not fast.
    """
    count, worst = sum(len(prompt.kept) for prompt in prompts), 0.0
    for (name, rows), (other, wanted) in itertools.combinations(found.items(), 2):
        for layer in rows:
            a, b = rows[layer].double(), wanted[layer].double()
            if len(a) != count or len(b) != count:
                sys.exit(f"expected {count} rows, got {len(a)} of {name}, {len(b)} of {other}")
            error = float(((a - b).norm(dim=1) / b.norm(dim=1)).max())
            # NaN fails no comparison, so ask for what is right.
            if not error <= _TOLERANCE[dtype]:
                sys.exit(f"expected equal rows, got {error:.2g} at {layer}: {name} against {other}")
            worst = max(worst, error)
    return worst


# ---------------------------------------------------------------- what is printed


def ratios(results: Sequence[Measured]) -> str:
    """The table that matters: who is how many times faster, and how far from the limit."""
    pairs = {
        "**plain loop / probecache**": (PLAIN, OURS),
        "documented loop / probecache": (DOCUMENTED, OURS),
        "**probecache / matmul limit on distinct prefixes**": (OURS, LIMIT_DISTINCT),
        "plain loop / matmul limit on all tokens": (PLAIN, LIMIT),
    }
    rows = [
        [name, *(_both(result, *pair) for result in results)]
        for name, pair in pairs.items()
        if all(one in results[0].seconds for one in pair)
    ]
    shares = [f"{r.tokens / r.distinct:.2f}" for r in results]
    rows.insert(2, ["tokens / distinct prefixes", *shares])
    rows.insert(3, ["share of that ratio reached against the plain loop", *map(_share, results)])
    return table(("ratio", *(result.case.name for result in results)), rows)


def _both(result: Measured, slow: str, fast: str) -> str:
    """Ratio of the minima (of the medians)."""
    least, middle = (result.ratio(slow, fast, by) for by in (min, statistics.median))
    return f"{least:.2f} ({middle:.2f})"


def _share(result: Measured) -> str:
    saved = result.tokens / result.distinct
    return " ".join(
        wrap.format(result.ratio(PLAIN, OURS, by) / saved)
        for wrap, by in (("{:.2f}", min), ("({:.2f})", statistics.median))
    )


def details(results: Sequence[Measured]) -> str:
    """Seconds, minimum (median), and the counts behind them."""
    names = [name for name in (OURS, WHOLE, PLAIN, DOCUMENTED, LIMIT, LIMIT_DISTINCT)
             if name in results[0].seconds]  # fmt: skip
    rows = [[name, *(_seconds(result.seconds[name]) for result in results)] for name in names]
    rows += [
        ["of its last: loading, extracting, writing", *map(_parts, results)],
        ["prompts", *(f"{r.prompts:,}" for r in results)],
        ["tokens", *(f"{r.tokens:,}" for r in results)],
        ["distinct prefixes", *(f"{r.distinct:,}" for r in results)],
        ["tokens computed by probecache", *map(_computed, results)],
        ["tokens computed by the plain loop, padding included",
         *(f"{r.padded:,}" for r in results)],
        ["its token budget; chunk of the matmul limit",
         *(f"{r.budget}; {r.chunk}" for r in results)],
        ["largest relative difference of a row", *(f"{r.difference:.1e}" for r in results)],
    ]  # fmt: skip
    return table(("seconds: minimum (median)", *(r.case.name for r in results)), rows)


def _seconds(values: list[float]) -> str:
    return f"{min(values):.2f} ({statistics.median(values):.2f})"


def _parts(result: Measured) -> str:
    parts = (result.ours.get(name) for name in ("load_s", "extract_s", "write_s"))
    return ", ".join("not told" if part is None else f"{part:.2f}" for part in parts)


def _computed(result: Measured) -> str:
    count = result.ours.get("computed_tokens")
    return "not told" if count is None else f"{int(count):,}"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench extract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, texts = parser.add_argument, ".jsonl with question, text or instruction [shipped texts]"
    add("--case", nargs="+", choices=(*NAMES, "all"), default=["pairs", "texts"])
    add("--texts", type=Path, metavar="FILE", help=texts)
    add("--count", type=int, help="so many records of each case, the first [all]")
    add("--longest", type=int, default=3000, help="tokens of the longest uneven text")
    add("--layers", type=layer_numbers, default=(2, 4, 6, 8))
    add("--repeats", type=int, default=3, help="rounds")
    add("--documented", type=int, default=1, help="rounds with the documented loop; 0: none")
    add("--batch", type=int, default=8, help="prompts of the documented loop's batches")
    add("--budgets", type=layer_numbers, default=(512, 1024, 2048, 4096),
        help="tokens per batch of the plain loop; the best is taken")  # fmt: skip
    add("--threads", type=int, help="torch's threads [as torch chooses]")
    add("--engine", help="passed to probecache.extract")
    add("--memory", help="passed to probecache.extract")
    add_shape_options(parser, str(SMALL))
    options = parser.parse_args(words)
    options.shape = shape_of(options, SMALL)
    options.dtype = options.shape.dtype
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what could not be measured or compared."""
    shape: Shape = options.shape
    if not 0 <= options.layers[0] <= options.layers[-1] < shape.blocks:
        # The documented loop cannot show the last one: transformers norms it.
        parser.error(f"expected --layers from 0 to {shape.blocks - 1}, got {options.layers}")
    if options.layers[-1] == 0 or options.repeats < 1:
        parser.error("expected a layer above 0 and at least one of --repeats")
    if options.longest + 256 > shape.context:
        parser.error(f"expected --longest below {shape.context - 256}, got {options.longest}")


def main(words: Sequence[str] | None = None) -> None:
    """Measure the cases and print the tables."""
    options = parse(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    names = NAMES if "all" in options.case else options.case
    results = []
    with tempfile.TemporaryDirectory() as name:
        model = write_llama(Path(name) / "model", options.shape)
        for case in names:
            made = make_case(case, options.texts, options.count, options.longest)
            with tempfile.TemporaryDirectory(dir=name) as folder:
                results.append(measure(made, model, options, Path(folder)))
    layers = ", ".join(map(str, options.layers))
    print(ratios(results), details(results), sep="\n\n", end="\n\n")
    print(f"{options.shape}; layers {layers}; {options.repeats} rounds.\n")
    print(machine(torch.get_num_threads()))

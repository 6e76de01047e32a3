"""The command line: arguments to one call, errors to one line and exit code 2.

Imports nothing heavy until a command runs, so that --help and argument errors answer at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probecache.errors import ProbecacheError

if TYPE_CHECKING:
    from probecache.store.vectors import SavedVectors
    from probecache.workflow.extract import Plan
    from probecache.workflow.validate import Validation

__all__ = ["app", "main"]

app = typer.Typer(
    name="probecache",
    help="Run a language model once, cache its activations, fit and validate probes in seconds.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_ERROR = 2

# ---------------------------------------------------------------- options that commands share

ModelOption = Annotated[
    str, typer.Option("--model", help="Folder or hub id of a Hugging Face causal LM or encoder.")
]
MaybeModel = Annotated[
    str | None,
    typer.Option("--model", help="Run this model instead of reading --cache (folder or hub id)."),
]
DataOption = Annotated[
    Path, typer.Option("--data", help="Data file: .json array, .jsonl or .csv; pairs or labelled.")
]
MaybeData = Annotated[
    Path | None,
    typer.Option("--data", help="Data file; with --cache it must be what the cache was made from."),
]
MaybeCache = Annotated[
    Path | None, typer.Option("--cache", help="Folder of a finished cache, instead of --model.")
]
LayersOption = Annotated[
    str,
    typer.Option(
        "--layers",
        help="10,20,23 or 10-70:10 or all; negatives count from the end. Layer L is the residual "
        "stream after L blocks: 0 = embeddings.",
    ),
]
MaybeLayers = Annotated[
    str | None,
    typer.Option("--layers", help="Some of the layers; left out: all that cache or vectors hold."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, float16 or bfloat16 [default: the checkpoint's own]."),
]
PositionsOption = Annotated[
    str | None,
    typer.Option(
        "--positions",
        help="Tokens to keep: last, mean, all or answer [default: last for pairs, else all].",
    ),
]
SystemOption = Annotated[
    str | None, typer.Option("--system-prompt", help="System turn put before every prompt.")
]
NoTemplateOption = Annotated[
    bool, typer.Option("--no-chat-template", help="Feed raw text instead of the chat template.")
]
KeepSpecialOption = Annotated[
    bool,
    typer.Option(
        "--keep-special-tokens", help="Let all and mean keep BOS, special and template tokens."
    ),
]
TruncateOption = Annotated[
    bool,
    typer.Option("--truncate", help="Cut the end of texts longer than the model's context."),
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")
]
AdapterOption = Annotated[
    str | None, typer.Option("--adapter", help="Folder or hub id of a PEFT adapter.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, mps [default: the best there is]."),
]
DeviceMapOption = Annotated[
    str | None, typer.Option("--device-map", help="auto spreads the model over all devices.")
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch-tokens", min=1, help="Most tokens per batch, padding included."),
]
NonFiniteOption = Annotated[
    bool,
    typer.Option("--allow-nonfinite", help="Keep NaN and Inf, counted, instead of stopping."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]


# ---------------------------------------------------------------- commands


@app.command()
def extract(
    model: ModelOption,
    data: DataOption,
    output: Annotated[Path, typer.Option("--output", help="The cache's folder.")],
    layers: LayersOption = "all",
    dtype: DtypeOption = None,
    positions: PositionsOption = None,
    system_prompt: SystemOption = None,
    no_chat_template: NoTemplateOption = False,
    keep_special_tokens: KeepSpecialOption = False,
    truncate: TruncateOption = False,
    revision: RevisionOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    batch_tokens: BatchOption = None,
    allow_nonfinite: NonFiniteOption = False,
    quiet: QuietOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; read no weights, write nothing.")
    ] = False,
) -> None:
    """Run a model over labelled prompts and cache the residual stream.

    Into an existing cache of the same model and data only the missing layers are added.
    """
    from probecache import api

    options = {
        "model": model,
        "data": data,
        "output": output,
        "layers": layers,
        "allow_nonfinite": allow_nonfinite,
        **_extraction(locals()),
    }
    if dry_run:
        _print_plan(api.plan_extraction(**options))
        return
    cache = api.extract(**options, announce=_print_start)
    timing = cache.info.timing
    size = sum(record.bytes for record in cache.info.files.values())
    print(
        f"{output} holds {cache.info.num_examples} examples x {len(cache.layers)} layers, "
        f"{_bytes(size)}\n"
        f"  load {timing['load_s']:.1f} s, extract {timing['extract_s']:.1f} s, "
        f"write {timing['write_s']:.1f} s, peak memory {_bytes(int(timing['peak_memory']))}"
    )


@app.command()
def plan(
    model: ModelOption,
    data: DataOption,
    output: Annotated[
        Path, typer.Option("--output", help="Where the cache would be; its disk is looked at.")
    ] = Path("activations_cache"),
    layers: LayersOption = "all",
    dtype: DtypeOption = None,
    positions: PositionsOption = None,
    system_prompt: SystemOption = None,
    no_chat_template: NoTemplateOption = False,
    keep_special_tokens: KeepSpecialOption = False,
    truncate: TruncateOption = False,
    revision: RevisionOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    batch_tokens: BatchOption = None,
) -> None:
    """Print what an extraction would cost: tokens, bytes on disk, weights to read, memory."""
    from probecache import api

    options = _extraction(locals())
    _print_plan(
        api.plan_extraction(model=model, data=data, output=output, layers=layers, **options)
    )


@app.command()
def train(
    output: Annotated[
        Path, typer.Option("--output", help="The run's path; _<YYYYmmdd_HHMMSS> is added.")
    ],
    cache: MaybeCache = None,
    model: MaybeModel = None,
    data: MaybeData = None,
    layers: MaybeLayers = None,
    positive_class: Annotated[
        str, typer.Option("--positive-class", help="The class that a higher score means.")
    ] = "deployment",
    dtype: DtypeOption = None,
    positions: PositionsOption = None,
    system_prompt: SystemOption = None,
    no_chat_template: NoTemplateOption = False,
    keep_special_tokens: KeepSpecialOption = False,
    truncate: TruncateOption = False,
    revision: RevisionOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    batch_tokens: BatchOption = None,
    quiet: QuietOption = False,
) -> None:
    """Fit a direction per layer (difference of means), from a cache or straight from a model."""
    from probecache import api

    vectors = api.train(
        output=output,
        cache=cache,
        model=model,
        data=data,
        layers=layers,
        positive_class=positive_class,
        **_announced(locals()),
    )
    _print_vectors(vectors)


@app.command()
def validate(
    vectors: Annotated[
        Path, typer.Option("--vectors", help="RUN/normalized_vectors (or RUN/vectors).")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", help="Folder to write; an earlier validation there is replaced."),
    ],
    cache: MaybeCache = None,
    model: MaybeModel = None,
    data: MaybeData = None,
    layers: MaybeLayers = None,
    visualize: Annotated[
        bool, typer.Option("--visualize", help="Write plots (PNG, SVG) and report.html too.")
    ] = False,
    allow_mismatch: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-mismatch", help="Identity field in which vectors and cache may differ; repeat."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, float16 or bfloat16 [default: the vectors']."),
    ] = None,
    positions: PositionsOption = None,
    system_prompt: SystemOption = None,
    no_chat_template: NoTemplateOption = False,
    keep_special_tokens: KeepSpecialOption = False,
    truncate: TruncateOption = False,
    revision: RevisionOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    batch_tokens: BatchOption = None,
    quiet: QuietOption = False,
) -> None:
    """Score prompts with vectors: statistics per prompt, AUROC per layer, plots and report."""
    from probecache import api

    result = api.validate(
        vectors=vectors,
        output=output,
        cache=cache,
        model=model,
        data=data,
        layers=layers,
        visualize=visualize,
        allow_mismatch=allow_mismatch or (),
        **_announced(locals()),
    )
    _print_validation(result)


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="A cache, a run, or a folder of vectors.")],
) -> None:
    """Show what a cache or run holds and where it came from."""
    from probecache.store.describe import describe

    print("\n".join(describe(path)))


@app.command("make-validation")
def make_validation(
    output: Annotated[Path, typer.Option("--output", help="The .json file to write.")],
    testing: Annotated[
        str,
        typer.Option("--testing", help="Local .jsonl/.json of test questions, or a hub data set."),
    ] = "openai/gsm8k",
    deployment: Annotated[
        str,
        typer.Option("--deployment", help="Local .jsonl/.json of instructions, or a hub data set."),
    ] = "tatsu-lab/alpaca",
    count: Annotated[int, typer.Option("--count", min=1, help="Prompts of each class.")] = 150,
    seed: Annotated[int, typer.Option("--seed", help="Which prompts are drawn.")] = 0,
) -> None:
    """Build a labelled validation file from GSM8K and an instruction set."""
    from probecache.make_validation import make_validation as run

    made = run(testing, deployment, output, count=count, seed=seed)
    print(f"Wrote {made} prompts, {made // 2} of each class, to {output}")


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", help="Folder for all results; _<time> is added.")
    ] = Path("demo"),
) -> None:
    """Run the whole workflow on the model and data that ship with probecache."""
    from probecache.demo import run_demo

    run_demo(output)


# ---------------------------------------------------------------- arguments


def _extraction(given: dict[str, Any]) -> dict[str, Any]:
    """The extraction options among a command's arguments; None where a flag was not given."""
    names = (
        "dtype",
        "positions",
        "system_prompt",
        "keep_special_tokens",
        "truncate",
        "revision",
        "adapter",
        "device",
        "device_map",
        "batch_tokens",
        "quiet",
    )
    options = {name: given[name] for name in names if given.get(name) not in (None, False)}
    if given["no_chat_template"]:
        options["chat_template"] = False
    return options


def _announced(given: dict[str, Any]) -> dict[str, Any]:
    """The same for a command that extracts only where a model is given."""
    options = _extraction(given)
    return {**options, "announce": _print_start} if given["model"] is not None else options


# ---------------------------------------------------------------- what is printed


def _print_start(planned: Plan) -> None:
    if not planned.layers:
        print(f"Nothing to do: layers {_list(planned.cached_layers)} are cached already.")
    else:
        print(
            f"Extracting layers {_list(planned.layers)} of {planned.model} "
            f"({planned.num_hidden_layers} blocks, {planned.dtype}) on {planned.prompts} prompts, "
            f"{planned.tokens:,} tokens, positions {planned.positions}",
            flush=True,
        )


def _print_plan(planned: Plan) -> None:
    shared = planned.tokens / planned.distinct_prefix_tokens
    lines = [
        ("model", f"{planned.model}: {planned.num_hidden_layers} blocks x {planned.hidden_size}"),
        ("data", planned.data),
        ("prompts", f"{planned.prompts:,}"),
        ("tokens", f"{planned.tokens:,}"),
        ("distinct-prefix tokens", f"{planned.distinct_prefix_tokens:,} ({shared:.1f} x fewer)"),
        ("layers", f"{_list(planned.layers) or 'none missing'} ({len(planned.layers)})"),
        ("positions", f"{planned.positions}: {planned.rows_per_layer:,} rows per layer"),
        ("dtype", planned.dtype),
        ("disk per layer", f"{planned.bytes_per_layer:,} bytes"),
        ("disk in all", f"{planned.bytes_total:,} bytes ({_bytes(planned.bytes_total)})"),
        ("disk free", f"{planned.bytes_free:,} bytes at {planned.output}"),
        ("weights to read", f"{planned.weight_bytes:,} bytes ({_bytes(planned.weight_bytes)})"),
        ("memory, estimated", _bytes(planned.memory_bytes)),
    ]
    if planned.cached_layers:
        lines.append(("already cached", f"layers {_list(planned.cached_layers)}"))
    for name, value in lines:
        print(f"{name:<23} {value}")
    if planned.bytes_total > planned.bytes_free:
        print("The disk does not hold this: extract would refuse.")


def _print_vectors(vectors: SavedVectors) -> None:
    info = vectors.info
    print(
        f"Trained {info.method} at {len(info.layers)} layers: a higher score means "
        f"{info.positive_class} (against {info.negative_class})"
    )
    print(f"{'layer':>6} {'raw norm':>10} {'typical norm':>13} {'rows +/-':>12}")
    for layer, record in sorted(info.layers.items()):
        rows = f"{record.n_positive}/{record.n_negative}"
        print(f"{layer:>6} {record.raw_norm:>10.4g} {record.typical_norm:>13.4g} {rows:>12}")
    print(f"Vectors: {vectors.path}")


def _print_validation(result: Validation) -> None:
    first = result.layers[0].auroc
    print(
        f"AUROC per layer, {result.positive_class} counted as positive "
        f"({first.n_positive} against {first.n_negative} prompts)"
    )
    print(f"{'layer':>6} {'AUROC':>7}  {'95% interval':<16} {'accuracy':>8}")
    for layer in result.layers:
        area = layer.auroc
        mark = "  <- best of these" if layer is result.best and len(result.layers) > 1 else ""
        print(
            f"{layer.layer:>6} {area.auroc:>7.3f}  [{area.low:.3f}, {area.high:.3f}]   "
            f"{layer.accuracy:>8.3f}{mark}"
        )
    for warning in result.warnings:
        print(f"Note: {warning}")
    print(f"Results: {result.path}")
    for name in ("summary.json", "report.html"):
        if result.path / name in result.files:
            print(f"  {result.path / name}")


def _list(layers: tuple[int, ...]) -> str:
    """Layers as --layers takes them, three or more in a row as a range."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs
    )


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
        size /= 1000
    return f"{size:.3g} TB"


# ---------------------------------------------------------------- entry


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; never returns.

    Exit codes: 0 done, 2 refused or failed with one line on stderr, 130 interrupted.
    """
    try:
        app(arguments, prog_name="probecache")
    except ProbecacheError as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr)
        sys.exit(_ERROR)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:  # a name too long, a disk that fails: nothing a module foresaw
        print(f"error: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
        sys.exit(_ERROR)

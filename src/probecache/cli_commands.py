"""The commands of the command line: arguments to one call, and what is printed of its result.

Imports nothing heavy until a command runs, so that --help and argument errors answer at once.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probecache.cli_options import (
    AdapterOption,
    AllowOption,
    BatchOption,
    DataOption,
    DateOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    KeepSpecialOption,
    LayersOption,
    MaybeCache,
    MaybeData,
    MaybeLayers,
    MaybeModel,
    MemoryOption,
    ModelOption,
    NonFiniteOption,
    NoSharingOption,
    NoTemplateOption,
    PositionsOption,
    QuietOption,
    RevisionOption,
    SystemOption,
    TruncateOption,
)
from probecache.errors import Interrupted, UsageError, printable
from probecache.terminal import (
    print_cache,
    print_import,
    print_plan,
    print_repair,
    print_report,
    print_start,
    print_validation,
    print_vectors,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from probecache.workflow.extract import Took

__all__ = ["Stopped", "app"]

app = typer.Typer(
    name="probecache",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Stopped(Exception):
    """An extraction was stopped; says how to go on. Typer would swallow the original."""


@contextmanager
def _stops_told() -> Iterator[None]:
    try:
        yield
    except Interrupted as stop:
        raise Stopped(str(stop)) from stop


# ---------------------------------------------------------------- commands


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"probecache {version('probecache')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Run a language model once, cache its activations, fit and validate probes in seconds."""


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
    template_date: DateOption = None,
    revision: RevisionOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    batch_tokens: BatchOption = None,
    engine: EngineOption = None,
    memory: MemoryOption = None,
    no_shared_prefixes: NoSharingOption = False,
    allow_nonfinite: NonFiniteOption = False,
    allow_mismatch: AllowOption = None,
    quiet: QuietOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; read no weights, write nothing.")
    ] = False,
) -> None:
    """Run a model over prompts and cache its residual stream.

    Into an existing cache of the same model and data only the missing layers are added.
    """
    from probecache import api

    options = {
        "model": model,
        "data": data,
        "output": output,
        "layers": layers,
        "allow_nonfinite": allow_nonfinite,
        "allow_mismatch": allow_mismatch or (),
        **_extraction(locals()),
    }
    if dry_run:
        print_plan(api.plan_extraction(**options))
        return
    took: list[Took] = []
    with _stops_told():
        cache = api.extract(**options, announce=print_start, finished=took.append)
    print_cache(cache, took[0] if took else None)


@app.command()
def plan(
    model: ModelOption,
    data: DataOption,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="Where the cache would be; what it holds already is not counted."
        ),
    ] = None,
    layers: LayersOption = "all",
    dtype: DtypeOption = None,
    positions: PositionsOption = None,
    system_prompt: SystemOption = None,
    no_chat_template: NoTemplateOption = False,
    keep_special_tokens: KeepSpecialOption = False,
    truncate: TruncateOption = False,
    template_date: DateOption = None,
    revision: RevisionOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    batch_tokens: BatchOption = None,
    engine: EngineOption = None,
    memory: MemoryOption = None,
    no_shared_prefixes: NoSharingOption = False,
) -> None:
    """Print what an extraction would cost.

    Tokens, exact bytes on disk, bytes of weights to read, memory. Reads no weights, writes nothing.
    """
    from probecache import api

    options = _extraction(locals())
    print_plan(api.plan_extraction(model=model, data=data, output=output, layers=layers, **options))


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
    template_date: DateOption = None,
    revision: RevisionOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    batch_tokens: BatchOption = None,
    engine: EngineOption = None,
    memory: MemoryOption = None,
    no_shared_prefixes: NoSharingOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fit a direction per layer from a cache, or from a model.

    The direction is mean(positive class) - mean(the others), accumulated in float64.
    """
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
    print_vectors(vectors)


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
    allow_mismatch: AllowOption = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, float16 or bfloat16 [default: the vectors']."),
    ] = None,
    positions: PositionsOption = None,
    system_prompt: SystemOption = None,
    no_chat_template: NoTemplateOption = False,
    keep_special_tokens: KeepSpecialOption = False,
    truncate: TruncateOption = False,
    template_date: DateOption = None,
    revision: RevisionOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    batch_tokens: BatchOption = None,
    engine: EngineOption = None,
    memory: MemoryOption = None,
    no_shared_prefixes: NoSharingOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score prompts with vectors: AUROC per layer, plots.

    Writes statistics per prompt and layer, a summary, and with --visualize plots and a report.
    """
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
    print_validation(result)


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="A cache, a run, or a folder of vectors.")],
) -> None:
    """Show what a cache or run holds, and its origin."""
    from probecache.store.describe import describe

    print("\n".join(describe(path)))


@app.command()
def verify(
    path: Annotated[
        Path, typer.Argument(help="A cache, a run, a folder of vectors, or a validation.")
    ],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Of a cache, make again what is damaged, and nothing else."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="With --repair: where the model is now [default: as then]."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="With --repair: where the data is now [default: as then]."),
    ] = None,
    device: DeviceOption = None,
    engine: EngineOption = None,
    memory: MemoryOption = None,
    quiet: QuietOption = False,
) -> None:
    """Read every file and compare it with its record.

    Names every file that is not as it was written, and which rows of it. Exit code: 0 if all is
    whole (after --repair: again), 1 if something is damaged, 2 if there is nothing of ours.
    """
    from probecache import api

    options: dict[str, Any] = {"model": model, "data": data, "device": device}
    options |= {"engine": engine, "memory": memory}
    given = {name: value for name, value in options.items() if value is not None}
    if not repair:
        if given:
            raise UsageError(f"expected --{min(given)} with --repair only, got it without")
        report = api.verify(path)
        print_report(report)
    else:
        with _stops_told():
            repaired = api.repair(path, announce=print_start, quiet=quiet, **given)
        print_repair(repaired)
        report = repaired.after
    if not report.whole:
        raise typer.Exit(1)


@app.command("import")
def import_(
    old: Annotated[Path, typer.Argument(help="Folder of a cache of an earlier tool; only read.")],
    new: Annotated[Path, typer.Argument(help="The new cache's folder; must be free.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or hub id, written down, not looked at.")
    ] = None,
    layer_convention: Annotated[
        str | None,
        typer.Option(
            "--layer-convention",
            help="What layer_N holds. residual: the stream after N blocks; hidden_states: entry N "
            "of Hugging Face's, the last one normed; block: the output of block N, from 0.",
        ),
    ] = None,
    num_hidden_layers: Annotated[
        int | None, typer.Option("--num-hidden-layers", help="Blocks of the model.")
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            "--positions",
            help="What the rows stand for: last or mean (one per example), all or answer.",
        ),
    ] = None,
    special_tokens: Annotated[
        str | None,
        typer.Option(
            "--special-tokens",
            help="Of all and mean: whether BOS and template tokens are in: kept or left-out.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="The data file that the old cache was made from, if known."),
    ] = None,
    allow_nonfinite: NonFiniteOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn a cache of an earlier tool into one of these.

    Reads one stacked .pt per class, or one .pt per example. What the files do not record is asked
    for; what nobody knows is stored as not recorded.
    """
    from probecache import api

    cache = api.import_cache(
        old,
        new,
        model=model,
        layer_convention=layer_convention,
        num_hidden_layers=num_hidden_layers,
        positions=positions,
        special_tokens=special_tokens,
        data=data,
        allow_nonfinite=allow_nonfinite,
        quiet=quiet,
        announce=print_import,
    )
    print_cache(cache, None)


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
    """Build a data file of test questions and instructions.

    From the hub (GSM8K and Alpaca, with the extra probecache[hub]) or from local files; the same
    seed gives the same file.
    """
    from probecache.make_validation import make_validation as run

    made = run(testing, deployment, output, count=count, seed=seed)
    print(printable(f"Wrote {made} prompts, {made // 2} of each class, to {output}"))


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", help="Folder for all results; _<time> is added.")
    ] = Path("demo"),
) -> None:
    """Run the whole workflow on a model that ships.

    Extracts twice, trains, validates and draws, in a few seconds, without network or GPU.
    """
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
        "template_date",
        "revision",
        "adapter",
        "device",
        "device_map",
        "batch_tokens",
        "engine",
        "memory",
        "quiet",
    )
    options = {name: given[name] for name in names if given.get(name) not in (None, False)}
    if given["no_chat_template"]:
        options["chat_template"] = False
    if given["no_shared_prefixes"]:
        options["share_prefixes"] = False
    return options


def _announced(given: dict[str, Any]) -> dict[str, Any]:
    """The same for a command that extracts only where a model is given."""
    options = _extraction(given)
    return {**options, "announce": print_start} if given["model"] is not None else options

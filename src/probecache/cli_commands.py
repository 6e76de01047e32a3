"""The commands on folders that are there, and those around the workflow.

Imports nothing heavy until a command runs, so that --help and argument errors answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from probecache.cli_app import app, stops_told
from probecache.cli_options import (
    DeviceOption,
    EngineOption,
    MemoryOption,
    NonFiniteOption,
    QuietOption,
)
from probecache.errors import UsageError, printable
from probecache.terminal import (
    print_cache,
    print_import,
    print_repair,
    print_report,
    print_start,
)

__all__ = ["demo", "import_", "info", "make_validation", "verify"]


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
        with stops_told():
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

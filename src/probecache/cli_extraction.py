"""The commands that run a model over prompts, or say what that would cost.

Imports nothing heavy until a command runs, so that --help and argument errors answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probecache.cli_app import app, stops_told
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
    extraction_options,
)
from probecache.terminal import print_cache, print_plan, print_start

if TYPE_CHECKING:
    from probecache.workflow.extract import Took

__all__ = ["extract", "plan"]


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
        **extraction_options(locals()),
    }
    if dry_run:
        print_plan(api.plan_extraction(**options))
        return
    took: list[Took] = []
    with stops_told():
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

    options = extraction_options(locals())
    print_plan(api.plan_extraction(model=model, data=data, output=output, layers=layers, **options))

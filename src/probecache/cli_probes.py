"""The commands that work on activations: fit, score, compare.

Imports nothing heavy until a command runs, so that --help and argument errors answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from probecache.cli_app import app
from probecache.cli_options import (
    AdapterOption,
    AllowOption,
    BatchOption,
    DateOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    KeepSpecialOption,
    MaybeCache,
    MaybeData,
    MaybeLayers,
    MaybeModel,
    MemoryOption,
    MethodOption,
    NoSharingOption,
    NoTemplateOption,
    QuietOption,
    RevisionOption,
    SelectionOption,
    SystemOption,
    TruncateOption,
    extraction_options,
)
from probecache.terminal import (
    print_comparison,
    print_start,
    print_validation,
    print_vectors,
)

__all__ = ["compare", "train", "validate"]


@app.command()
def train(
    output: Annotated[
        Path, typer.Option("--output", help="The run's path; _<YYYYmmdd_HHMMSS> is added.")
    ],
    cache: MaybeCache = None,
    model: MaybeModel = None,
    data: MaybeData = None,
    layers: MaybeLayers = None,
    method: MethodOption = None,
    positive_class: Annotated[
        str, typer.Option("--positive-class", help="The class that a higher score means.")
    ] = "deployment",
    folds: Annotated[
        int, typer.Option("--folds", help="Folds of the cross-validation, at most; 0: none.")
    ] = 5,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            help="Regularisation in scikit-learn's units: alpha of ridge, C of logistic, shrinkage "
            "of lda [default: chosen from the data].",
        ),
    ] = None,
    standardize: Annotated[
        bool,
        typer.Option("--standardize", help="Divide each dimension by its spread; folded back."),
    ] = False,
    dtype: DtypeOption = None,
    positions: SelectionOption = None,
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

    By default the direction is mean(positive class) - mean(the others). Every layer's AUROC on
    held-out examples stands beside it, with its interval.
    """
    from probecache import api

    trained = api.train_methods(
        ",".join(method or ["difference-of-means"]).split(","),
        output=output,
        cache=cache,
        model=model,
        data=data,
        layers=layers,
        positive_class=positive_class,
        positions=positions,
        folds=folds,
        strength=strength,
        standardize=standardize,
        **_announced(locals()),
    )
    for vectors in trained.values():
        print_vectors(vectors)


@app.command()
def validate(
    vectors: Annotated[
        Path,
        typer.Option("--vectors", help="RUN/normalized_vectors, or a run of several methods."),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", help="Folder to write; an earlier validation there is replaced."),
    ],
    cache: MaybeCache = None,
    model: MaybeModel = None,
    data: MaybeData = None,
    layers: MaybeLayers = None,
    aggregate: Annotated[
        str,
        typer.Option(
            "--aggregate",
            help="How the scores of a prompt's tokens become one: mean, max, last, top-5 (mean of "
            "the 5 highest), rolling-8 (highest mean of 8 neighbours).",
        ),
    ] = "mean",
    control: Annotated[
        bool,
        typer.Option("--control/--no-control", help="Score random directions beside the vectors."),
    ] = True,
    control_count: Annotated[
        int, typer.Option("--control-count", min=1, help="How many random directions.")
    ] = 10,
    visualize: Annotated[
        bool, typer.Option("--visualize", help="Write plots (PNG, SVG) and report.html too.")
    ] = False,
    allow_mismatch: AllowOption = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, float16 or bfloat16 [default: the vectors']."),
    ] = None,
    positions: SelectionOption = None,
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
    Beside the AUROC stands what could explain it: length, words, embeddings, random directions.
    """
    from probecache import api

    found = api.validate_methods(
        vectors,
        output=output,
        cache=cache,
        model=model,
        data=data,
        layers=layers,
        positions=positions,
        aggregate=aggregate,
        control=control,
        control_count=control_count,
        visualize=visualize,
        allow_mismatch=allow_mismatch or (),
        **_announced(locals()),
    )
    for result in found.values():
        print_validation(result)


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more validations or runs: of models, methods, layers, data; a folder of "
            "several methods stands for each."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder for comparison.csv, .json and .html."),
    ] = None,
) -> None:
    """Set validations or runs side by side.

    Where two scored the same prompts, their difference is tested in pairs.
    """
    from probecache import api

    print_comparison(api.compare(runs, output=output))


def _announced(given: dict[str, Any]) -> dict[str, Any]:
    """Extraction options for a command that extracts only where a model is given."""
    options = {n: v for n, v in extraction_options(given).items() if n != "positions"}
    return {**options, "announce": print_start} if given["model"] is not None else options

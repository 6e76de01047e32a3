"""The options that commands of the command line share: name, type and words of `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "AdapterOption",
    "AllowOption",
    "BatchOption",
    "DataOption",
    "DateOption",
    "DeviceMapOption",
    "DeviceOption",
    "DtypeOption",
    "EngineOption",
    "KeepSpecialOption",
    "LayersOption",
    "MaybeCache",
    "MaybeData",
    "MaybeLayers",
    "MaybeModel",
    "MemoryOption",
    "MethodOption",
    "ModelOption",
    "NoSharingOption",
    "NoTemplateOption",
    "NonFiniteOption",
    "PositionsOption",
    "QuietOption",
    "RevisionOption",
    "SelectionOption",
    "SystemOption",
    "TruncateOption",
    "extraction_options",
]

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
        help="Tokens to keep: last, mean, all, answer, last-K, role:user (assistant, system), "
        "match:REGEX or chars:START-STOP [default: last for pairs, else all].",
    ),
]
SelectionOption = Annotated[
    str | None,
    typer.Option(
        "--positions",
        help="Of a cache of all: tokens to use; with --model: tokens to keep [default: as kept].",
    ),
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="difference-of-means, logistic, lda, ridge or pca; repeat, or part by commas "
        "[default: difference-of-means].",
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
DateOption = Annotated[
    str | None, typer.Option("--template-date", help="YYYY-MM-DD, for templates that tell a date.")
]
AllowOption = Annotated[
    list[str] | None, typer.Option("--allow-mismatch", help="Field that may differ; repeat.")
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
    typer.Option("--batch-tokens", min=1, help="Most tokens per forward pass."),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="resident: the model in memory; stream: one block after the other; auto: whichever "
        "fits [default: auto].",
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Most memory to take, such as 8GB: in RAM, or on the GPU [default: what there is].",
    ),
]
NoSharingOption = Annotated[
    bool,
    typer.Option(
        "--no-shared-prefixes",
        help="Run whole prompts in padded batches instead of computing shared prefixes once.",
    ),
]
NonFiniteOption = Annotated[
    bool,
    typer.Option("--allow-nonfinite", help="Keep NaN and Inf, counted, instead of stopping."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]


def extraction_options(given: dict[str, Any]) -> dict[str, Any]:
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

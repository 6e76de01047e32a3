"""The Python API: flat keyword arguments to the options that the workflow takes.

With `model=` in place of `cache=`, `train` and `validate` extract into a temporary cache and go on
from there: the same code and the same numbers, without the files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probecache.api_arguments import (
    Data,
    Layers,
    as_names,
    cached_layers,
    choice,
    layer_numbers,
    make_request,
)
from probecache.atomic import disk_errors_named, real_path, require_place, temporary_sibling
from probecache.dataset import IN_MEMORY, load_dataset
from probecache.errors import LayerError, MismatchError, UsageError
from probecache.store.reader import Cache, open_cache
from probecache.store.vectors import SavedVectors, load_vectors
from probecache.types import DEFAULT_POSITIVE_CLASS, Positions
from probecache.unrecorded import is_imported
from probecache.workflow.train import require_class
from probecache.workflow.train import train as train_on_cache
from probecache.workflow.validate import (
    Validation,
    choose_layers,
    require_data,
    require_output,
    require_scorable,
)
from probecache.workflow.validate import validate as validate_on_cache

if TYPE_CHECKING:
    from probecache.store.layout import LayerInfo
    from probecache.store.verify import Report
    from probecache.types import Identity
    from probecache.workflow.extract import Took
    from probecache.workflow.import_old import ImportPlan
    from probecache.workflow.prepare import ExtractRequest, Plan
    from probecache.workflow.repair import Repair

__all__ = [
    "extract",
    "import_cache",
    "plan_extraction",
    "repair",
    "train",
    "validate",
    "verify",
]


def extract(
    *,
    model: str,
    data: Data,
    output: str | Path,
    layers: Layers = "all",
    dtype: str | None = None,
    positions: str | None = None,
    system_prompt: str | None = None,
    chat_template: bool = True,
    keep_special_tokens: bool = False,
    truncate: bool = False,
    revision: str | None = None,
    adapter: str | None = None,
    device: str | None = None,
    device_map: str | None = None,
    batch_tokens: int | None = None,
    engine: str = "auto",
    memory: int | str | None = None,
    share_prefixes: bool = True,
    allow_nonfinite: bool = False,
    template_date: str | None = None,
    allow_mismatch: Collection[str] = (),
    quiet: bool = False,
    announce: Callable[[Plan], None] | None = None,
    finished: Callable[[Took], None] | None = None,
) -> Cache:
    """Run a model over labelled prompts and cache the residual stream, or add layers to a cache.

    Args:
        model: folder or hub id of a Hugging Face causal LM or encoder.
        data: .json, .jsonl or .csv file, or a list of records.
        output: the cache's folder: free, or a cache of the same identity that gains layers.
        layers: "10,20,23", "10-70:10", "all", or numbers; negatives count from the end.
        dtype: "float32", "float16" or "bfloat16"; None: the checkpoint's own.
        positions: "last", "mean", "all" or "answer"; None: "last" for pairs, else "all".
        system_prompt: a system turn put before every prompt.
        chat_template: False feeds raw text.
        keep_special_tokens: let "all" and "mean" keep BOS, special and template tokens.
        truncate: cut the end of texts that are longer than the model's context.
        revision: branch, tag or commit on the hub.
        adapter: folder or hub id of a PEFT adapter.
        device: "cpu", "cuda", "cuda:1" or "mps"; None: the best there is.
        device_map: "auto" spreads the model over all devices.
        batch_tokens: most tokens per forward pass.
        engine: "resident" keeps the model in memory, "stream" one block after the other; "auto":
            whichever fits.
        memory: most that the run may take, such as "8GB" or a number of bytes: in RAM, or on the
            CUDA device. None: what there is.
        share_prefixes: compute once what prompts begin with alike; False: padded batches.
        allow_nonfinite: keep NaN and Inf, counted, instead of stopping.
        template_date: "2026-01-31": what a chat template is told that asks for today's date; None:
            that of the cache that gains layers, else today.
        allow_mismatch: identity fields in which the run may differ from the cache it adds to.
        quiet: no progress on stderr.
        announce: told the plan before any weight is read.
        finished: told the seconds and the memory that the run took.

    Returns:
        The finished cache, opened for reading.

    Raises:
        ProbecacheError: bad input, before a weight is read or a byte written; or a run that failed.
        Interrupted: Ctrl-C or a signal. What was computed stays, and the same call goes on from it.
    """
    request = make_request(
        model=model,
        data=data,
        layers=layers,
        dtype=dtype,
        positions=positions,
        system_prompt=system_prompt,
        chat_template=chat_template,
        keep_special_tokens=keep_special_tokens,
        truncate=truncate,
        revision=revision,
        adapter=adapter,
        device=device,
        device_map=device_map,
        batch_tokens=batch_tokens,
        engine=engine,
        memory=memory,
        share_prefixes=share_prefixes,
        allow_nonfinite=allow_nonfinite,
        template_date=template_date,
        allow_mismatch=allow_mismatch,
        quiet=quiet,
    )
    from probecache.workflow.extract import extract as run

    return run(request, output, announce, finished=finished)


def import_cache(
    old: str | Path,
    new: str | Path,
    *,
    model: str | None = None,
    layer_convention: str | None = None,
    num_hidden_layers: int | None = None,
    positions: str | None = None,
    special_tokens: str | None = None,
    data: Data | None = None,
    allow_nonfinite: bool = False,
    quiet: bool = False,
    announce: Callable[[ImportPlan], None] | None = None,
) -> Cache:
    """Turn a cache of an earlier tool into one of probecache.

    What the old files do not record has no default: whatever is left out is asked for.

    Args:
        old: its folder, which is only read: `layer_N/CLASS_activations.pt` of [examples, hidden]
            or [examples, 1, hidden], or `layer_N/CLASS/0.pt` of [1, tokens, hidden].
        new: the cache's folder; must be free.
        model: folder or hub id of the model, written down as told.
        layer_convention: "residual": layer_N is the stream after N blocks, before the final norm;
            "hidden_states": entry N of Hugging Face's hidden_states, whose last one is normed and
            left out; "block": the output of block N, counted from 0.
        num_hidden_layers: blocks of the model.
        positions: "last" or "mean" of one row per example, "all" or "answer" of several.
        special_tokens: "kept" or "left-out" of `all` and `mean`.
        data: what the old cache was made from, in its order; None: examples have numbers alone.
        allow_nonfinite: keep rows with NaN or Inf, counted, instead of stopping.
        quiet: no progress on stderr.
        announce: told what will be imported before a row is read.

    Returns:
        The finished cache. Fields of its identity that nobody knows equal nothing else.

    Raises:
        ProbecacheError: something is not told, or a file is not understood; nothing is left.
    """
    from probecache.workflow import import_old as module

    request = module.ImportRequest(
        old=Path(old),
        model=model,
        layer_convention=choice(module.LayerConvention, layer_convention, "--layer-convention"),
        num_hidden_layers=num_hidden_layers,
        positions=None if positions is None else Positions.parse(positions),
        special_tokens=choice(module.SpecialTokens, special_tokens, "--special-tokens"),
        data=data,
        allow_nonfinite=allow_nonfinite,
        quiet=quiet,
    )
    return module.import_cache(request, new, announce)


def plan_extraction(
    *, model: str, data: Data, output: str | Path | None = None, **options: Any
) -> Plan:
    """What `extract` with the same arguments would cost; reads no weights and writes nothing.

    Without `output`, of a cache of its own on the current folder's disk.

    Raises:
        ProbecacheError: whatever `extract` would refuse before it looks into the weights or asks
            for the device; too little room on the disk is told and not refused.
    """
    from probecache.workflow.prepare import plan

    options.pop("announce", None)  # there is nothing to announce but what is returned
    return plan(make_request(model=model, data=data, **options), output)


def train(
    *,
    output: str | Path,
    cache: str | Path | Cache | None = None,
    model: str | None = None,
    data: Data | None = None,
    layers: Layers | None = None,
    positive_class: str = DEFAULT_POSITIVE_CLASS,
    **extraction: Any,
) -> SavedVectors:
    """Fit a difference-of-means direction per layer.

    Args:
        output: path of the run; `_<YYYYmmdd_HHMMSS>` is added.
        cache: a cache's folder; or leave it out and give `model` and `data`.
        model: folder or hub id of the model to run instead.
        data: what to run the model over, or what the cache was made from (checked).
        layers: which layers; None or "all": all that are cached and have a direction.
        positive_class: the class that a higher score means.
        extraction: with `model`: further arguments of `extract`.

    Returns:
        The normalised vectors; `.path.parent` is the run's folder.

    Raises:
        ProbecacheError: see `extract`; or layers or classes that the cache does not hold.
    """

    def accept(_identity: Identity, classes: Sequence[str]) -> None:
        require_class(positive_class, classes, "--data")

    if model is not None:
        require_place(Path(output))
    with _source(cache, model, data, layers, extraction, Path(output), accept) as (opened, name):
        if cache is not None and data is not None:
            require_data(opened, load_dataset(data))
        return train_on_cache(
            opened,
            output,
            layers=cached_layers(layers, opened),
            positive_class=positive_class,
            source=name,
        )


def validate(
    *,
    vectors: str | Path | SavedVectors,
    output: str | Path,
    cache: str | Path | Cache | None = None,
    model: str | None = None,
    data: Data | None = None,
    layers: Layers | None = None,
    visualize: bool = False,
    allow_mismatch: Collection[str] = (),
    **extraction: Any,
) -> Validation:
    """Score prompts with vectors: statistics per prompt, AUROC per layer, report.

    Args:
        vectors: RUN/normalized_vectors or RUN/vectors.
        output: folder to write; an earlier validation there is replaced.
        cache: a cache's folder; or leave it out and give `model` and `data`.
        data: what the cache was made from (checked), or what to run the model over.
        layers: which of the vectors' layers; None: all.
        visualize: plots and report.html too.
        allow_mismatch: identity fields in which vectors and cache may differ.
        extraction: with `model`: further arguments of `extract`; dtype, system prompt, chat
            template, the date it is told and keep_special_tokens are by default those that the
            vectors were made with.

    Raises:
        ProbecacheError: see `extract`; or vectors, cache and data that do not belong together.
    """
    loaded = vectors if isinstance(vectors, SavedVectors) else load_vectors(vectors)
    allowed = as_names(allow_mismatch)
    scored: tuple[int, ...] = ()
    if model is not None:
        given = {name: value for name, value in extraction.items() if value is not None}
        extraction = {**_as_trained(loaded), **given}
        require_output(Path(output))
        scored = choose_layers(
            loaded, layer_numbers(layers, loaded.info.identity.num_hidden_layers)
        )

    def accept(identity: Identity, classes: Sequence[str]) -> None:
        require_scorable(loaded, identity, classes, f"model {model}", scored, allowed)

    with (
        _layers_of_vectors(loaded, model) if model is not None else nullcontext(),
        _source(cache, model, data, scored, extraction, Path(output), accept) as (opened, name),
    ):
        return validate_on_cache(
            opened,
            loaded,
            output,
            dataset=load_dataset(data) if data is not None else None,
            layers=cached_layers(layers, opened),
            visualize=visualize,
            allow_mismatch=allowed,
            source=name,
        )


def repair(
    path: str | Path,
    *,
    model: str | None = None,
    data: Data | None = None,
    announce: Callable[[Plan], None] | None = None,
    finished: Callable[[Took], None] | None = None,
    **options: Any,
) -> Repair:
    """Verify a cache and make again what of it is damaged, and nothing else.

    Args:
        path: the cache's folder.
        model: where the model is now; None: where it was.
        data: where the data is now; None: where it was.
        announce: told the plan before any weight is read.
        finished: told the seconds and the memory that extracting took.
        options: device, engine, memory and the like, as `extract` takes them.

    Raises:
        ProbecacheError: nothing to repair it from; model or data are not those of the cache.
    """
    from probecache.workflow.repair import repair as run

    def request_of(info: LayerInfo) -> ExtractRequest:
        identity, origin = info.identity, info.origin
        if data is None and origin.data == IN_MEMORY:
            raise UsageError(
                f"expected --data to repair {path}, which was made from {IN_MEMORY}, got none"
            )
        return make_request(
            model=model or identity.model,
            revision=identity.revision if model is None else None,
            data=origin.data if data is None else data,
            layers=list(info.layers),
            dtype=identity.dtype,
            positions=identity.positions,
            system_prompt=identity.system_prompt,
            chat_template=identity.chat_template is not None,
            keep_special_tokens=identity.special_tokens_kept,
            truncate=origin.truncate,
            adapter=origin.adapter,
            allow_nonfinite=bool(info.non_finite),
            **options,
        )

    return run(Path(path), request_of, announce, finished)


def verify(path: str | Path) -> Report:
    """Read every file of a cache, a run or a validation and hold it against its record.

    Raises:
        StoreError: the folder holds nothing of ours.
    """
    from probecache.store.verify import verify as run

    return run(path)


@contextmanager
def _source(
    cache: str | Path | Cache | None,
    model: str | None,
    data: Data | None,
    layers: Layers | None,
    extraction: dict[str, Any],
    output: Path,
    accept: Callable[[Identity, Sequence[str]], None],
) -> Iterator[tuple[Cache, str | None]]:
    """The cache to work on, and how to call it where its path means nothing to a reader.

    A cache that is not kept is built beside the output, which is where the user has room.
    """
    if (cache is None) == (model is None):
        raise UsageError(
            f"expected either --cache or --model, got {'neither' if cache is None else 'both'}"
        )
    if cache is not None:
        unused = {"quiet", "announce"}  # what only tells or hushes does no harm
        given = sorted(n for n, v in extraction.items() if v is not None and n not in unused)
        if given:
            raise UsageError(
                f"expected {', '.join(given)} with --model only, got it with --cache, where the "
                "activations are already made; leave it out"
            )
        yield cache if isinstance(cache, Cache) else open_cache(cache), None
        return
    if data is None:
        raise UsageError("expected --data with --model, got none; name the prompts to run it over")
    from probecache.workflow.extract import extract as run

    options = {name: value for name, value in extraction.items() if value is not None}
    announce = options.pop("announce", None)
    request = make_request(
        model=str(model), data=data, layers="all" if layers is None else layers, **options
    )
    with disk_errors_named(output), temporary_sibling(real_path(output)) as folder:
        yield run(request, folder / "cache", announce, accept), "(not kept)"


@contextmanager
def _layers_of_vectors(vectors: SavedVectors, model: str | None) -> Iterator[None]:
    """Tell a model that is too shallow for some vectors as what it is."""
    try:
        yield
    except LayerError as error:
        raise MismatchError(
            f"Vectors {vectors.path} do not belong to model {model}: {error}; the vectors are of "
            f"{vectors.info.identity.model}"
        ) from error


def _as_trained(vectors: SavedVectors) -> dict[str, Any]:
    """Options that render and run prompts as those that the vectors were trained on."""
    identity = vectors.info.identity
    if is_imported(identity):  # how its prompts were rendered is not recorded
        return {"dtype": identity.dtype}
    return {
        "dtype": identity.dtype,
        "system_prompt": identity.system_prompt,
        "chat_template": identity.chat_template is not None,
        "default_date": identity.template_date,
        "keep_special_tokens": identity.special_tokens_kept,
    }

"""The Python API: flat keyword arguments to the options that the workflow takes.

Here what runs a model or looks after a cache; fitting and scoring stand in `api_probes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probecache.api_arguments import Data, Layers, choice, make_request
from probecache.api_probes import compare, train, train_methods, validate, validate_methods
from probecache.dataset import IN_MEMORY
from probecache.errors import UsageError
from probecache.types import Positions

if TYPE_CHECKING:
    from probecache.store.layout import LayerInfo
    from probecache.store.reader import Cache
    from probecache.store.verify import Report
    from probecache.workflow.extract import Took
    from probecache.workflow.import_old import ImportPlan
    from probecache.workflow.prepare import ExtractRequest, Plan
    from probecache.workflow.repair import Repair

__all__ = [
    "compare",
    "extract",
    "import_cache",
    "plan_extraction",
    "repair",
    "train",
    "train_methods",
    "validate",
    "validate_methods",
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

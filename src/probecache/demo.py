"""The whole workflow on the model and data that ship: extract twice, train, validate, look."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from probecache import api
from probecache.errors import OutputError
from probecache.shipped import shipped
from probecache.terminal import print_findings

if TYPE_CHECKING:
    from probecache.workflow.validate import Validation

__all__ = ["run_demo"]

# From the first block on: before it, the last token of a pair's two answers is the same bracket.
_LAYERS = "1--1"


def run_demo(output: Path) -> Validation:
    """Run the demo into `<output>_<YYYYmmdd_HHMMSS>/` and print what came of it.

    Raises:
        OutputError: the folder cannot be made.
    """
    import torch

    # So small a model gains nothing from a second thread; on a processor that is busy with other
    # work, threads that wait for one another made the demo five times slower.
    torch.set_num_threads(1)
    started = time.perf_counter()
    if not output.name:
        raise OutputError(f"expected --output to name a folder, got {str(output)!r}")
    folder = output.with_name(f"{output.name}_{datetime.now():%Y%m%d_%H%M%S}")
    if folder.exists():
        raise OutputError(f"expected {folder} to be free; run the demo again")
    model = str(shipped("models/tiny-llama"))
    pairs = shipped("datasets/contrastive_dataset.json")
    prompts = shipped("datasets/validation_real.json")

    print("1/4  Running the model over the contrastive pairs ...")
    contrastive = api.extract(
        model=model, data=pairs, layers=_LAYERS, output=folder / "cache_contrastive"
    )
    print("2/4  Running the model over the validation prompts ...")
    validation = api.extract(  # with layer 0, one of the baselines
        model=model, data=prompts, layers="all", output=folder / "cache_validation"
    )
    print("3/4  Training a direction per layer from the first cache ...")
    vectors = api.train(cache=contrastive, output=folder / "run")
    print("4/4  Scoring the second cache with it ...\n")
    result = api.validate(
        cache=validation,
        vectors=vectors,
        data=prompts,
        output=folder / "validation",
        visualize=True,
    )
    _print_result(result)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Look at:")
    for what, path in (
        ("the report", result.path / "report.html"),
        ("the plots", result.path / "visualizations"),
        ("scores per prompt", result.path / f"probe_stats_layer{result.best.layer}.csv"),
        ("the vectors", vectors.path),
        ("the caches", f"{contrastive.path}, {validation.path.name}"),
    ):
        print(f"  {what:<18} {path}")
    return result


def _print_result(result: Validation) -> None:
    print(f"{'layer':>6} {'AUROC':>7}  95% interval")
    for layer in result.layers:
        area, mark = layer.auroc, " <- best" if layer is result.best else ""
        bar = "#" * round(40 * max(area.auroc - 0.5, 0) / 0.5)
        interval = f"[{area.low:.3f}, {area.high:.3f}]"
        print(f"{layer.layer:>6} {area.auroc:>7.3f}  {interval}  {bar}{mark}".rstrip())
    best = result.best.auroc
    print(
        f"\nBest layer {result.best.layer}: AUROC {best.auroc:.3f} [{best.low:.3f}, "
        f"{best.high:.3f}] on {best.n_positive} {result.positive_class} and {best.n_negative} "
        "other prompts"
    )
    print_findings(result)

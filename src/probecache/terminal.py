"""What a person reads on the terminal when a command is done, or about to start.

Guarantee: every line goes through `_say`, so no text of a stranger reaches the terminal as it is.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from probecache.errors import printable
from probecache.layers import format_layers

if TYPE_CHECKING:
    from probecache.store.reader import Cache
    from probecache.store.vectors import CrossValidationRecord, SavedVectors
    from probecache.store.verify import Report
    from probecache.workflow.compare import Comparison
    from probecache.workflow.extract import Took
    from probecache.workflow.import_old import ImportPlan
    from probecache.workflow.prepare import Plan
    from probecache.workflow.repair import Repair
    from probecache.workflow.validate import Validation

__all__ = [
    "print_cache",
    "print_comparison",
    "print_findings",
    "print_import",
    "print_plan",
    "print_repair",
    "print_report",
    "print_start",
    "print_validation",
    "print_vectors",
]


def print_cache(cache: Cache, took: Took | None) -> None:
    """A finished extraction: what the cache holds and what it took."""
    size = sum(record.bytes for record in cache.info.tensors.values())
    _say(
        f"{cache.path} holds {_count(cache.info.num_examples, 'example')} x "
        f"{_count(len(cache.layers), 'layer')}, "
        f"{_bytes(size)}"
    )
    if took is not None:
        _say(
            f"  load {took.load_s:.1f} s, extract {took.extract_s:.1f} s, "
            f"write {took.write_s:.1f} s, peak memory {_bytes(took.peak_memory)}"
        )


def print_start(planned: Plan) -> None:
    """An extraction about to read weights."""
    if not planned.layers:
        _say(f"Nothing to do: layers {format_layers(planned.cached_layers)} are cached already.")
    else:
        _say(
            f"Extracting layers {format_layers(planned.layers)} of {planned.model} "
            f"({planned.num_hidden_layers} blocks, {planned.dtype}) on {planned.prompts} prompts, "
            f"{planned.tokens:,} tokens, positions {planned.positions}; reading "
            f"{_bytes(planned.weight_bytes)} of weights{_way(planned)}"
        )
        if planned.done:
            _say(
                f"Going on with an interrupted extraction: {planned.done:.1%} of the rows are on "
                "disk"
            )
    sys.stdout.flush()


def _way(planned: Plan) -> str:
    """What is not as usual about how an extraction goes."""
    assert planned.execution is not None
    words = [f"from cached layer {one.start}" for one in planned.passages if one.cached]
    if planned.execution.engine == "stream":
        words.append("block by block")
    return "".join(f", {word}" for word in words)


def print_import(planned: ImportPlan) -> None:
    """An import about to read rows: what was found, and how it is understood."""
    blueprint, request = planned.blueprint, planned.request
    classes = (
        f"{label} ({_count(blueprint.classes[label].examples, 'example')}, files of {name})"
        for name, label in planned.labels.items()
    )
    renumbered = any(old != ours for old, ours in planned.layers.items())
    layers = format_layers(sorted(planned.layers.values()))
    _say(
        f"Importing {request.old}: {', '.join(classes)}; {blueprint.rows:,} rows of "
        f"{blueprint.hidden_size} x {blueprint.dtype} per layer, positions {blueprint.positions}"
    )
    _say(
        f"  layers {format_layers(sorted(planned.layers))}"
        + (f", which are layers {layers} here" if renumbered else "")
    )
    if planned.normed:
        _say(
            f"Note: layer {planned.normed[0]} is left out: the last of hidden_states has gone "
            "through the final norm"
        )
    unread = planned.old.unread
    if unread:
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        _say(f"Note: not read: {', '.join(unread[:5])}{more}")


def print_plan(planned: Plan) -> None:
    """A dry run."""
    shared = planned.tokens / planned.distinct_prefix_tokens
    lines = [
        ("model", f"{planned.model}: {planned.num_hidden_layers} blocks x {planned.hidden_size}"),
        ("data", planned.data),
        ("prompts", f"{planned.prompts:,}"),
        ("tokens", f"{planned.tokens:,}"),
        ("distinct-prefix tokens", f"{planned.distinct_prefix_tokens:,} ({shared:.1f} x fewer)"),
        ("layers", f"{format_layers(planned.layers) or 'none missing'} ({len(planned.layers)})"),
        ("positions", f"{planned.positions}: {planned.rows_per_layer:,} rows per layer"),
        ("dtype", planned.dtype),
        ("disk per layer", f"{planned.bytes_per_layer:,} bytes"),
        ("disk in all", f"{planned.bytes_total:,} bytes ({_bytes(planned.bytes_total)})"),
        ("disk free", f"{planned.bytes_free:,} bytes at {planned.output}"),
        ("weights to read", f"{planned.weight_bytes:,} bytes ({_bytes(planned.weight_bytes)})"),
    ]
    if planned.execution is not None:
        lines += [
            ("engine", _engine(planned)),
            (
                "memory, estimated",
                f"{_bytes(planned.execution.memory_bytes)}, and about 0.5 GB of Python itself",
            ),
        ]
    if planned.cached_layers:
        lines.append(("already cached", f"layers {format_layers(planned.cached_layers)}"))
    for name, value in lines:
        _say(f"{name:<23} {value}")
    if planned.bytes_total + planned.spill_bytes > planned.bytes_free:
        _say("The disk does not hold this: extract would refuse.")


def _engine(planned: Plan) -> str:
    """Which engine runs and where it starts."""
    assert planned.execution is not None
    name = str(planned.execution.engine)
    if planned.execution.engine == "stream":
        where = f"in {_bytes(planned.spill_bytes)} on disk" if planned.spill_bytes else "in memory"
        name += f": one block after the other, hidden states {where}"
        if planned.execution.limit_bytes is not None:
            name += f", within {_bytes(planned.execution.limit_bytes)}"
    starts = [str(passage.start) for passage in planned.passages if passage.cached]
    return name + (f"; goes on from cached layer {', '.join(starts)}" if starts else "")


def print_vectors(vectors: SavedVectors) -> None:
    """A finished run: a line per layer."""
    info, validated = vectors.info, vectors.info.cross_validation
    _say(
        f"Trained {info.method} at {_count(len(info.layers), 'layer')}: a higher score means "
        f"{info.positive_class} (against {info.negative_class})"
    )
    held_out = "  held-out AUROC" if validated else ""
    strength = f" {'strength':>9}" if any(r.strength for r in info.layers.values()) else ""
    _say(f"{'layer':>6} {'raw norm':>10} {'typical norm':>13} {'rows +/-':>12}{strength}{held_out}")
    for layer, record in sorted(info.layers.items()):
        rows = f"{record.n_positive}/{record.n_negative}"
        strong = f" {record.strength or 0:>9.3g}" if strength else ""
        found = record.cross_validation
        area = f"  {_interval(found)}" if found else ""
        _say(
            f"{layer:>6} {record.raw_norm:>10.4g} {record.typical_norm:>13.4g} {rows:>12}"
            f"{strong}{area}"
        )
    if validated is not None:
        _print_cross_validation(validated)
    elif info.not_cross_validated:
        _say(f"Note: no held-out estimates: {info.not_cross_validated}")
    for note in info.notes:
        _say(f"Note: {note}")
    if info.layers_without_direction:
        without = format_layers(info.layers_without_direction)
        _say(f"Note: left out layer {without}, where both classes have the same mean")
    _say(f"Vectors: {vectors.path}")


def _print_cross_validation(validated: CrossValidationRecord) -> None:
    nested = validated.nested
    chosen = (
        f". With the layer chosen anew in each fold: AUROC {_interval(nested)}"
        if nested
        else "; with so many or so few folds the layer is not chosen anew in each"
    )
    _say(
        f"Held out in {validated.folds} folds of {validated.groups} groups; best layer "
        f"{validated.best_layer}{chosen}"
    )
    if validated.near_duplicates:
        _say(
            f"Note: {validated.near_duplicates} examples are near-duplicates of examples of other "
            + (
                "groups; they were held out together"
                if validated.near_duplicates_together
                else "groups, too many to hold them out together (one template?): the held-out "
                "AUROC may be optimistic; name what belongs together in a field `group`"
            )
        )


def print_report(report: Report) -> None:
    """What verifying found: a line per damaged file."""
    for damage in report.damages:
        _say(f"damaged  {damage.file}: {damage.what}")
    for note in report.notes:
        _say(f"note     {note}")
    read = f"{_count(report.files, 'file')}, {_bytes(report.bytes)}"
    if report.whole:
        _say(f"{report.path} is whole: {read} are as they were written ({report.kind})")
    else:
        _say(f"{report.path} is damaged: {len(report.damages)} of {read} ({report.kind})")


def print_repair(repair: Repair) -> None:
    """What was damaged, and what is now."""
    print_report(repair.before)
    if repair.before.whole:
        return
    for name in repair.changed:
        _say(
            f"note     {name} holds other bytes than before: this machine computes in another way; "
            "its new record is kept"
        )
    if repair.after.whole:
        _say(f"Repaired: {repair.after.path} is whole again")
    else:
        print_report(repair.after)


def print_validation(result: Validation) -> None:
    """A finished validation: a line per layer, the panel, then what to beware of."""
    first = result.layers[0].auroc
    _say(
        f"AUROC per layer, {result.positive_class} counted as positive "
        f"({first.n_positive} against {first.n_negative} prompts; intervals: {result.interval})"
    )
    _say(f"{'layer':>6} {'AUROC':>7}  {'95% interval':<16} {'accuracy':>8}")
    for layer in result.layers:
        area = layer.auroc
        mark = "  <- best of these" if layer is result.best and len(result.layers) > 1 else ""
        _say(
            f"{layer.layer:>6} {area.auroc:>7.3f}  [{area.low:.3f}, {area.high:.3f}]   "
            f"{layer.accuracy:>8.3f}{mark}"
        )
    print_findings(result)
    _say(f"Results: {result.path}")
    for name in ("summary.json", "report.html"):
        if result.path / name in result.files:
            _say(f"  {result.path / name}")


def print_findings(result: Validation) -> None:
    """What belongs beside a validation's layers: the best one, the panel, what to beware of."""
    _print_best(result)
    _print_categories(result)
    _print_panel(result)
    for warning in result.warnings:
        _say(f"Note: {warning}")


def _print_best(result: Validation) -> None:
    """What belongs to the best layer alone."""
    from probecache.metrics import negatives_needed  # NumPy: --help answers without it

    best, fixed = result.best, result.chosen_in_training
    if fixed is not None:
        area = fixed.auroc
        _say(f"Layer {fixed.layer}, chosen in training: AUROC {_interval(area)}")
    for rate, found in best.tpr.items():
        percent = round(100 * rate)
        if found is None:
            needed = negatives_needed(rate)
            groups = result.groups_by_class[1]
            within = f" in {groups} groups" if groups < best.auroc.n_negative else ""
            _say(
                f"TPR at {percent}% FPR: not said of {best.auroc.n_negative} negatives{within}; it "
                f"takes {needed}"
            )
        else:
            _say(
                f"TPR at {percent}% FPR: {found.tpr:.3f} [{found.low:.3f}, {found.high:.3f}] at "
                f"layer {best.layer}"
            )
    if best.calibration is not None:
        _say(
            f"Calibration at layer {best.layer}: Brier score {best.calibration.brier:.3f}, "
            f"expected calibration error {best.calibration.ece:.3f}"
        )
    _say(
        f"Best of {_count(len(result.layers), 'layer')} against shuffled labels: "
        f"p = {result.permutation.p_value:.4f} ({len(result.permutation.maxima)} permutations)"
    )


def _print_categories(result: Validation) -> None:
    """A line for each category that holds both classes; of the others, how many."""
    if not result.categories:
        return
    _say(f"By category, layer {result.best.layer}:")
    both = [one for one in result.categories if one.auroc is not None]
    for one in both:
        area = one.auroc
        assert area is not None
        _say(
            f"  {one.name:<24} {one.n_positive:>5}/{one.n_negative:<5} {area.auroc:.3f} "
            f"[{area.low:.3f}, {area.high:.3f}]"
        )
    if rest := len(result.categories) - len(both):
        _say(f"  {_count(rest, 'category', 'categories')} of one class only: see summary.json")


def _print_panel(result: Validation) -> None:
    """What else could explain the best layer's score."""
    panel = result.panel
    _say(
        f"Artefact panel, beside AUROC {result.best.auroc.auroc:.3f} at layer {result.best.layer}:"
    )
    width = max(len(one.title) for one in panel.baselines) + 2
    for one in panel.baselines:
        known = one.auroc is not None
        shown = f"{_interval(one)}" if known else f"-      {one.how}"
        if known and one.name == "random-directions":
            shown = f"{one.auroc:.3f} on average, {one.low:.3f} to {one.high:.3f}"
        _say(f"  {one.title:<{width}}  {shown}")
    if panel.gain is not None:
        named = {one.name: one.title for one in panel.baselines}
        best = named[panel.best_baseline or ""]
        _say(f"  {'Gain over the best of these':<{width}}  {panel.gain:+.3f} ({best})")
    share = panel.n_positive / (panel.n_positive + panel.n_negative)
    facts = [
        f"{share:.0%} positive",
        f"{panel.outlier_share:.0%} of the squared norm in "
        f"{_count(len(panel.outlier_dimensions), 'dimension')}",
    ]
    if panel.pairs is not None:
        facts.append(f"pair differences agree by {panel.pairs.cosine:.2f} (mean cosine)")
    if panel.first_token_share is not None:
        share = round(panel.first_token_share, 2) + 0.0  # no minus before a zero
        facts.append(f"the first token accounts for {share:.0%} of the scores' variance")
    words = {True: "rendered alike", False: "not rendered alike: ", None: "rendering not recorded"}
    _say(f"  {'; '.join(facts)}; {words[panel.alike]}{', '.join(panel.differences)}")


def print_comparison(comparison: Comparison) -> None:
    """Validations or runs side by side."""
    from probecache.workflow.compare import lines

    for line in lines(comparison):
        _say(line)


def _say(line: str) -> None:
    """Print one line; whatever a model, a label or a path would command a terminal is spelt out."""
    print(printable(line))


def _interval(one: Any) -> str:
    """An AUROC and its interval; of whatever holds the three."""
    return f"{one.auroc:.3f} [{one.low:.3f}, {one.high:.3f}]"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one}" if number == 1 else f"{number} {many or one + 's'}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
        size /= 1000
    return f"{size:.3g} TB"

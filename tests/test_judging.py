"""What scores say of layers: against scikit-learn, closed forms and the metrics of plain inputs."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, brier_score_loss, roc_auc_score

from probecache.metrics import auroc, grouped_interval, paired_difference, tpr_at_fpr
from probecache.store.tensorfile import FileRecord
from probecache.store.vectors import LayerRecord, PlattRecord
from probecache.workflow import judging as module
from probecache.workflow.judging import by_category, judge
from probecache.workflow.summary import _layer_row

FILE = FileRecord(bytes=1, offset=0, shape=(1,), dtype="float32", sha256="0" * 64)
ROW = {
    *("layer", "auroc", "auroc_low", "auroc_high", "n_positive", "n_negative", "threshold"),
    *("accuracy", "mean_positive", "mean_negative", "std_positive", "std_negative", "cv_auroc"),
    *("cv_low", "cv_high", "below_best", "tpr_at_1", "tpr_at_5", "brier", "ece"),
    *("calibration_slope", "calibration_intercept", "random_mean", "random_high"),
}


def trained(threshold=0.0, calibration=None):
    return LayerRecord(
        raw_norm=1,
        threshold=threshold,
        typical_norm=1,
        n_positive=1,
        n_negative=1,
        calibration=calibration,
        file=FILE,
    )


def planted(n=80, layers=(3, 8, 20), seed=0, share=2):
    """Scores whose classes part better at each layer; positives are one in `share`."""
    positive = np.arange(n) % share == 0
    rng = np.random.default_rng(seed)
    common = rng.normal(size=n)
    scores = {
        layer: common + rng.normal(size=n) + 0.8 * place * positive
        for place, layer in enumerate(layers)
    }
    return scores, positive


def judged(scores, positive, groups=None, threshold=0.0, calibration=None, random=None):
    groups = np.arange(len(positive)) if groups is None else groups
    records = {layer: trained(threshold, calibration) for layer in scores}
    return judge(scores, positive, groups, records, random or {})


def test_every_layers_figures_are_those_of_scikit_learn():
    scores, positive = planted()
    found = judged(scores, positive, threshold=0.4)
    assert [result.layer for result in found.layers] == [3, 8, 20]
    for result in found.layers:
        expected = roc_auc_score(positive, scores[result.layer])
        assert result.auroc.auroc == pytest.approx(expected, abs=1e-12)
        said = scores[result.layer] > 0.4
        assert result.accuracy == accuracy_score(positive, said)
        assert np.array_equal(result.scores, scores[result.layer])
    assert found.best.layer == max(scores, key=lambda n: roc_auc_score(positive, scores[n]))
    assert found.permutation.observed == found.best.auroc.auroc


def test_swapped_labels_give_exactly_one_minus_auroc():
    scores, positive = planted()
    there, back = judged(scores, positive), judged(scores, ~positive)
    for a, b in zip(there.layers, back.layers, strict=True):
        assert a.auroc.auroc == 1 - b.auroc.auroc


def test_single_examples_have_delongs_interval_and_paired_difference():
    scores, positive = planted()
    found = judged(scores, positive)
    assert found.interval == "DeLong"
    assert found.interval == "DeLong"
    best = scores[found.best.layer]
    for result in found.layers:
        assert result.auroc == auroc(scores[result.layer], positive)
        if result is found.best:
            assert result.below_best is None
        else:
            assert result.below_best == paired_difference(best, scores[result.layer], positive)
            assert result.below_best.difference > 0  # how far below


def test_clustered_examples_have_an_interval_over_groups_that_is_wider_for_copies():
    scores, positive = planted(60)
    copies = {layer: np.repeat(of_layer, 4) for layer, of_layer in scores.items()}
    groups, many = np.repeat(np.arange(60), 4), np.repeat(positive, 4)
    found, plain = judged(copies, many, groups), judged(copies, many)
    assert found.interval == "bootstrap over 60 groups"
    assert found.interval.startswith("bootstrap over")
    single = judged(scores, positive)
    for a, b, c in zip(found.layers, plain.layers, single.layers, strict=True):
        assert a.auroc.auroc == pytest.approx(b.auroc.auroc, abs=1e-12)
        assert a.auroc.high - a.auroc.low > 1.6 * (b.auroc.high - b.auroc.low)
        width = c.auroc.high - c.auroc.low
        assert a.auroc.high - a.auroc.low == pytest.approx(width, rel=0.15)


def test_a_clustered_layer_lies_as_far_below_the_best_as_their_aurocs_tell():
    scores, positive = planted(80)
    groups = np.repeat(np.arange(40), 2)
    found = judged(scores, positive, groups)
    for result in found.layers:
        if result is not found.best:
            below = result.below_best
            gap = found.best.auroc.auroc - result.auroc.auroc
            assert below.difference == pytest.approx(gap, abs=1e-12)
            assert below.low < below.difference < below.high


def test_an_equal_layer_lies_nothing_below_the_best_and_the_first_of_equals_is_best():
    scores, positive = planted(40, layers=(8,))
    found = judged({8: scores[8], 9: scores[8].copy()}, positive)
    assert found.best.layer == 8
    assert found.layers[1].below_best.difference == 0
    assert found.layers[1].below_best.p_value == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_among_unrelated_layers_costs_what_sidaks_formula_says(seed):
    rng = np.random.default_rng(seed)
    positive = np.arange(60) % 2 == 0
    noise = {layer: rng.normal(size=60) for layer in range(30)}
    found = judged(noise, positive)
    alone = judged({found.best.layer: noise[found.best.layer]}, positive)
    expected = 1 - (1 - alone.permutation.p_value) ** 30
    assert found.permutation.p_value == pytest.approx(expected, abs=0.12)
    assert found.permutation.p_value > 2 * alone.permutation.p_value


@pytest.mark.parametrize(
    ("negatives", "at_1", "at_5"), [(59, False, False), (60, False, True), (300, True, True)]
)
def test_a_rate_is_told_where_negatives_are_enough_to_say(negatives, at_1, at_5):
    scores, _ = planted(negatives + 30, layers=(8,))
    positive = np.arange(negatives + 30) < 30
    (result,) = judged(scores, positive).layers
    for rate, told in ((0.01, at_1), (0.05, at_5)):
        assert (result.tpr[rate] is not None) == told
        if told:
            cut = np.sort(scores[8][~positive])[::-1][int(np.floor(rate * negatives + 1e-9))]
            assert result.tpr[rate].tpr == np.mean(scores[8][positive] > cut)
            assert result.tpr[rate] == tpr_at_fpr(scores[8], positive, rate)


def test_probabilities_are_those_fixed_in_training():
    scores, positive = planted(layers=(8,))
    (result,) = judged(scores, positive, calibration=PlattRecord(slope=1.5, intercept=-0.7)).layers
    chances = 1 / (1 + np.exp(-(1.5 * scores[8] - 0.7)))
    assert result.calibration.brier == pytest.approx(brier_score_loss(positive, chances))
    assert sum(one.n for one in result.calibration.bins) == len(positive)
    (without,) = judged(scores, positive).layers
    assert without.calibration is None


@pytest.mark.parametrize(("threshold", "one_sided"), [(-9.0, True), (0.5, False), (9.0, True)])
def test_a_threshold_that_leaves_both_classes_on_one_side_is_noticed(threshold, one_sided):
    scores, positive = planted(layers=(8,))
    assert judged(scores, positive, threshold=threshold).best.one_sided == one_sided


# ---------------------------------------------------------------- by category


def test_every_category_is_what_scikit_learn_says_of_its_examples():
    scores, positive = planted(90, layers=(8,))
    names = [["maths", "cooking", None][n % 3] for n in range(90)]
    best = judged(scores, positive, threshold=0.3).best
    found = by_category(best, names, np.arange(90))
    assert [one.name for one in found] == ["maths", "cooking", "(none)"]
    for one, name in zip(found, ("maths", "cooking", None), strict=True):
        here = np.array([other == name for other in names])
        own, labels = scores[8][here], positive[here]
        assert one.auroc == auroc(own, labels)
        assert one.auroc.auroc == pytest.approx(roc_auc_score(labels, own), abs=1e-12)
        assert (one.n_positive, one.n_negative) == (labels.sum(), (~labels).sum())
        assert one.accuracy == accuracy_score(labels, own > 0.3)
        assert one.mean_score == pytest.approx(own.mean())


def test_a_category_of_one_class_has_no_auroc():
    scores, positive = planted(8, layers=(8,))
    names = ["mixed" if n < 4 else "positives" if positive[n] else "mixed" for n in range(8)]
    found = {
        one.name: one for one in by_category(judged(scores, positive).best, names, np.arange(8))
    }
    assert found["positives"].auroc is None
    assert (found["positives"].n_positive, found["positives"].n_negative) == (2, 0)
    assert found["mixed"].auroc is not None


def test_intervals_of_categories_count_groups_where_examples_are_clustered():
    scores, positive = planted(60, layers=(8,))
    scores, positive = {8: np.repeat(scores[8], 3)}, np.repeat(positive, 3)
    groups = np.repeat(np.arange(60), 3)
    names = np.where(groups < 30, "a", "b").tolist()
    for one in by_category(judged(scores, positive, groups).best, names, groups):
        here = np.array(names) == one.name
        (expected,) = grouped_interval(scores[8][None, here], positive[here], groups[here])
        assert one.auroc == expected


@pytest.mark.parametrize("names", [[None] * 6, [""] * 6])
def test_data_without_categories_have_no_table_of_them(names):
    scores, positive = planted(6, layers=(8,))
    assert by_category(judged(scores, positive).best, names, np.arange(6)) == ()


# ---------------------------------------------------------------- as summary.json holds it


def test_every_row_of_the_summary_has_every_field_whatever_applies():
    scores, positive = planted(400, share=4)
    platt = PlattRecord(slope=1.0, intercept=0.0)
    rich = judged(scores, positive, calibration=platt)
    poor = judged(*planted(12))
    for result in (*rich.layers, *poor.layers):
        assert set(_layer_row(result)) == ROW
    best = _layer_row(rich.best)
    assert best["below_best"] is None
    assert set(best["tpr_at_1"]) == {"tpr", "low", "high"}
    assert best["brier"] == rich.best.calibration.brier
    assert set(_layer_row(rich.layers[0])["below_best"]) == {"difference", "low", "high", "p_value"}
    assert _layer_row(poor.layers[0])["tpr_at_5"] is None
    assert _layer_row(poor.layers[0])["ece"] is None


def test_all_is_sorted_and_exists():
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)

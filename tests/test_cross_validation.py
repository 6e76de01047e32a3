"""Held-out estimates while training: against refits by hand on subsets of the rows."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.metrics import log_loss, roc_auc_score
from synthetic import labelled, rows_of, train, write_cache

from probecache.errors import EmptyClassError, UsageError
from probecache.fit import Design, Method, fit_difference_of_means, fit_layer
from probecache.folds import straddles
from probecache.metrics import auroc_within_folds
from probecache.store.layout import ExampleRecord
from probecache.workflow import cross_validation as module
from probecache.workflow.cross_validation import (
    layer_estimate,
    nested_estimate,
    platt_of,
    split_examples,
    texts_of,
)
from probecache.workflow.train import TrainOptions

HIDDEN, COUNT, LAYERS = 10, 18, (2, 5, 9)
SYLLABLES = [f"{a}{b}" for a in "bdfgklmnprstvz" for b in ("ap", "eno", "iri", "ot", "umba")]


def text(seed, words=12):
    return " ".join(np.random.default_rng(seed).choice(SYLLABLES, words))


def pairs(count=COUNT, question=text):
    """Pairs whose questions have nothing in common."""
    return [
        {"question": question(n), "positive": "(A)", "negative": "(B)", "id": f"p{n}"}
        for n in range(count)
    ]


def planted(layer, count=2 * COUNT, shift=0.35):
    """Rows of pairs in data order, deployment moved along one axis; deeper layers part better."""
    rows = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(layer))
    rows[1::2, 0] += shift * layer
    return rows + 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cv") / "cache"
    return write_cache(folder, pairs(), {layer: planted(layer) for layer in LAYERS})


def split_of(cache, folds=5):
    positive = np.array([r.label == "deployment" for r in cache.examples])
    return split_examples(cache.examples, positive, folds)


def matrix_of(cache, layer):
    """Rows in data order, as plain torch reads them."""
    files = {label: rows_of(cache, label, layer).numpy() for label in cache.classes}
    return np.stack([files[r.label][r.rows[0]] for r in cache.examples]).astype(np.float64)


def held_out_by_hand(rows, positive, folds, left_out=()):
    """Difference of means without each fold, by four lines of NumPy; NaN where left out before."""
    scores = np.full(len(rows), np.nan)
    for fold in set(folds.tolist()) - set(left_out):
        kept = ~np.isin(folds, [fold, *left_out])
        means = [rows[kept & side].mean(axis=0) for side in (positive, ~positive)]
        direction = (means[0] - means[1]) / np.linalg.norm(means[0] - means[1])
        scores[folds == fold] = (rows[folds == fold] - (means[0] + means[1]) / 2) @ direction
    return scores


def area_within(scores, positive, folds):
    """Mean of the folds' AUROCs by scikit-learn, weighted by their pairs."""
    areas, weights = [], []
    for fold in np.unique(folds):
        here = folds == fold
        areas.append(roc_auc_score(positive[here], scores[here]))
        weights.append(positive[here].sum() * (~positive[here]).sum())
    return np.average(areas, weights=weights)


# ---------------------------------------------------------------- which are held out together


def record(place, question, *, label="testing", group=None, answer=None):
    return ExampleRecord(
        idx=place,
        id=f"e{place}",
        group=group or f"g{place}",
        label=label,
        question=question,
        answer=answer,
        rows=(place, place + 1),
        n_tokens=1,
        input_tokens=3,
    )


def texts_split(texts, labels=None, folds=5, groups=None):
    """A split of examples with these texts; classes in turn."""
    positive = np.arange(len(texts)) % 2 == 1 if labels is None else np.array(labels)
    examples = [
        record(n, t, group=None if groups is None else f"g{groups[n]}") for n, t in enumerate(texts)
    ]
    return split_examples(examples, positive, folds)


def test_members_of_a_pair_share_a_fold_and_every_fold_has_both_classes(cache):
    split = split_of(cache)
    assert split.folds.max() == 4
    assert split.why_not is None
    for pair in range(COUNT):
        assert split.folds[2 * pair] == split.folds[2 * pair + 1]
    assert np.array_equal(split.pairs, np.repeat(np.arange(COUNT), 2))
    assert np.array_equal(split.groups, split.pairs)
    assert (split.near_duplicates, split.together) == (0, True)


def test_near_duplicates_share_a_fold_and_are_counted():
    texts = [text(n) for n in range(40)]
    for place in (5, 11, 30):
        texts[place] = texts[2] + "."
    split = texts_split(texts)
    assert split.near_duplicates == 4
    assert split.together
    assert len(set(split.folds[[2, 5, 11, 30]])) == 1
    assert len(np.unique(split.pairs)) == 40
    assert len(np.unique(split.groups)) == 37


@pytest.mark.parametrize("folds", [5, 40, 1000])
def test_a_single_near_duplicate_is_kept_with_its_like_however_many_folds_are_asked_for(folds):
    texts = [text(n) for n in range(40)]
    texts[7] = texts[2]
    split = texts_split(texts, folds=folds)
    assert split.together
    assert split.folds[2] == split.folds[7]


def test_members_of_a_group_draw_their_near_duplicates_along():
    texts = [text(n) for n in range(24)]
    groups = [n // 2 for n in range(24)]
    texts[4] = texts[0]
    split = texts_split(texts, groups=groups)
    assert len(set(split.folds[[0, 1, 4, 5]])) == 1
    assert split.near_duplicates == 2


def test_a_template_whose_texts_are_all_alike_is_divided_by_its_own_groups_and_told():
    texts = [text(0, 40) + "!" * n for n in range(40)]
    split = texts_split(texts)
    assert split.near_duplicates == 40
    assert not split.together
    assert split.folds.max() == 4
    assert np.array_equal(split.groups, split.pairs)


def test_the_answers_letter_makes_two_examples_neither_alike_nor_different(cache):
    examples = [record(0, text(1), answer=" (A)"), record(1, "two", answer=None)]
    assert texts_of(examples) == [f"{text(1)}  (A)", "two"]


def test_examples_straddle_whose_like_is_in_another_group():
    clusters = np.array([0, 0, 1, 1, 2, 3, 3, 3])
    groups = np.array([0, 0, 1, 2, 3, 4, 4, 5])
    by_hand = sum(
        any(clusters[a] == clusters[b] and groups[a] != groups[b] for b in range(8))
        for a in range(8)
    )
    assert straddles(clusters, groups).sum() == by_hand == 5


def test_no_folds_are_no_cross_validation_and_said_so(cache):
    split = split_of(cache, folds=0)
    assert split.folds is None
    assert not split.nested
    assert split.why_not == "it was not asked for"


@pytest.mark.parametrize("labels", [[True] + [False] * 9, [False] + [True] * 9])
def test_a_class_of_one_group_is_not_cross_validated_and_said_so(labels):
    split = texts_split([text(n) for n in range(10)], labels)
    assert split.folds is None
    assert "in at least 2 groups" in split.why_not


# ---------------------------------------------------------------- what held-out scores say


def fits_of(cache, split, method=Method.DIFFERENCE_OF_MEANS, strength=None):
    found = {}
    for layer in cache.layers:
        rows = matrix_of(cache, layer)
        design = Design(split.is_positive, split.pairs, split.folds, nested=split.nested)
        chunks = [(np.arange(len(rows)), rows)]
        fits = fit_layer(lambda c=chunks: c, HIDDEN, design, [method], strength)
        found[layer] = fits[method]
    return found


def test_a_layers_estimate_is_that_of_refits_without_each_fold(cache):
    split = split_of(cache)
    for layer, fit in fits_of(cache, split).items():
        scores = held_out_by_hand(matrix_of(cache, layer), split.is_positive, split.folds)
        np.testing.assert_allclose(fit.held_out, scores, atol=1e-5)
        found = layer_estimate(fit, split)
        expected = area_within(scores, split.is_positive, split.folds)
        assert found.auroc == pytest.approx(expected, abs=1e-12)
        interval = auroc_within_folds(scores, split.is_positive, split.folds, split.groups)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-9)


def test_ridge_is_held_out_like_a_refit_of_the_package_on_the_other_rows(cache):
    split = split_of(cache)
    rows, fit = matrix_of(cache, 5), fits_of(cache, split, Method.RIDGE, 3.0)[5]
    for fold in range(5):
        kept = split.folds != fold
        design = Design(split.is_positive[kept], split.pairs[kept])
        chunks = [(np.arange(kept.sum()), rows[kept])]
        probe = fit_layer(lambda c=chunks: c, HIDDEN, design, [Method.RIDGE], 3.0)[
            Method.RIDGE
        ].probe
        expected = probe.score(rows[~kept]) - probe.threshold
        np.testing.assert_allclose(fit.held_out[~kept], expected, atol=1e-5)


def test_the_nested_estimate_is_that_of_choosing_the_layer_without_the_fold(cache):
    split = split_of(cache)
    positive, folds = split.is_positive, split.folds
    found = nested_estimate(fits_of(cache, split), split)
    matrices = {layer: matrix_of(cache, layer) for layer in LAYERS}
    chosen, scores = [], np.empty(len(positive))
    for fold in range(5):
        others = folds != fold
        inner = {
            layer: area_within(
                held_out_by_hand(rows, positive, folds, [fold])[others],
                positive[others],
                folds[others],
            )
            for layer, rows in matrices.items()
        }
        chosen.append(max(inner, key=inner.__getitem__))
        rows = matrices[chosen[-1]]
        scores[~others] = held_out_by_hand(rows, positive, folds)[~others]
    assert found.layer_by_fold == chosen
    assert found.nested.auroc == pytest.approx(area_within(scores, positive, folds), abs=1e-12)
    outer = {
        layer: area_within(held_out_by_hand(rows, positive, folds), positive, folds)
        for layer, rows in matrices.items()
    }
    assert found.best_layer == max(outer, key=outer.__getitem__)
    assert (found.folds, found.groups) == (5, COUNT)


def test_choosing_the_layer_inside_the_folds_costs_what_choosing_on_noise_gains():
    positive, groups = np.tile([False, True], 40), np.repeat(np.arange(40), 2)
    examples = [record(n, text(n), group=f"g{n // 2}") for n in range(80)]
    split = split_examples(examples, positive, 5)
    gains, nested = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        fits = {}
        for layer in range(12):
            rows = rng.normal(size=(80, 5))
            chunks = [(np.arange(80), rows)]
            design = Design(positive, groups, split.folds)
            fits[layer] = fit_layer(lambda c=chunks: c, 5, design, [Method.DIFFERENCE_OF_MEANS])[
                Method.DIFFERENCE_OF_MEANS
            ]
        found = nested_estimate(fits, split)
        gains.append(layer_estimate(fits[found.best_layer], split).auroc)
        nested.append(found.nested.auroc)
    assert np.mean(gains) > 0.57  # what the reader of a table of layers would quote
    assert abs(np.mean(nested) - 0.5) < 0.05


def test_two_folds_choose_no_layer_inside(cache):
    split = split_of(cache, folds=2)
    found = nested_estimate(fits_of(cache, split), split)
    assert (found.folds, found.nested, found.layer_by_fold) == (2, None, [])


def test_without_folds_there_is_no_estimate(cache):
    split = split_of(cache, folds=0)
    fits = fits_of(cache, split)
    assert nested_estimate(fits, split) is None
    assert layer_estimate(fits[5], split) is None
    assert platt_of(fits[5], split) is None


def test_calibration_is_the_likeliest_curve_of_scores_from_the_middle_of_their_fold(cache):
    split = split_of(cache)
    fit = fits_of(cache, split)[5]
    found = platt_of(fit, split)
    middles = []
    for fold in range(split.folds.max() + 1):
        here = split.folds == fold
        sides = [
            fit.held_out[here & side].mean() for side in (split.is_positive, ~split.is_positive)
        ]
        middles.append(np.mean(sides))
    scores = fit.held_out - np.array(middles)[split.folds]
    # Platt's targets keep probabilities off 0 and 1.
    n, p = (~split.is_positive).sum(), split.is_positive.sum()
    targets = np.where(split.is_positive, (p + 1) / (p + 2), 1 / (n + 2))
    offset = found.intercept + found.slope * (fit.probe.threshold + np.median(middles))

    def loss(slope, intercept):
        chance = expit(slope * scores + intercept)
        return -np.mean(targets * np.log(chance) + (1 - targets) * np.log(1 - chance))

    here = loss(found.slope, offset)
    for slope, intercept in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3), (1e-3, -1e-3)):
        assert loss(found.slope + slope, offset + intercept) > here
    assert log_loss(split.is_positive, expit(found.slope * scores + offset)) < np.log(2)


def test_thresholds_that_lie_apart_between_folds_do_not_turn_the_calibration_round(cache):
    split = split_of(cache)
    fit = fits_of(cache, split)[5]
    apart = replace(fit, held_out=fit.held_out + 1e3 * (-1.0) ** split.folds)
    assert platt_of(apart, split).slope == pytest.approx(platt_of(fit, split).slope, rel=1e-6)
    reversed_ = replace(fit, held_out=-fit.held_out)
    assert platt_of(reversed_, split).slope == 0


# ---------------------------------------------------------------- as `train` records it


def test_a_run_records_the_estimates_of_every_layer_in_both_folders(cache, tmp_path):
    vectors = train(cache, tmp_path / "run")
    split = split_of(cache)
    fits = fits_of(cache, split)
    raw = json.loads((vectors.path.parent / "vectors" / "vectors.json").read_text("utf-8"))
    assert vectors.info.cross_validation == nested_estimate(fits, split)
    assert raw["cross_validation"] == vectors.info.cross_validation.model_dump(mode="json")
    for layer, fit in fits.items():
        unit, saved = vectors.info.layers[layer], raw["layers"][str(layer)]
        expected = layer_estimate(fit, split).model_dump()
        assert unit.cross_validation.model_dump() == pytest.approx(expected, abs=1e-9)
        assert saved["cross_validation"] == unit.cross_validation.model_dump()
        # One probability, whichever folder's vector a score is of.
        score, chance = 0.7, unit.calibration
        own = chance.slope * score + chance.intercept
        other = saved["calibration"]
        scaled = other["slope"] * (score * unit.raw_norm) + other["intercept"]
        assert scaled == pytest.approx(own, abs=1e-9)


def test_agreement_of_pairs_is_the_mean_cosine_of_their_differences(cache, tmp_path):
    vectors = train(cache, tmp_path / "run")
    for layer in LAYERS:
        rows = matrix_of(cache, layer)
        signs = np.where(split_of(cache).is_positive, 1, -1)
        differences = (signs[:, None] * rows).reshape(COUNT, 2, HIDDEN).sum(axis=1)
        units = differences / np.linalg.norm(differences, axis=1, keepdims=True)
        cosines = (units @ units.T)[~np.eye(COUNT, dtype=bool)]
        found = vectors.info.layers[layer].pair_agreement
        assert found == pytest.approx(cosines.mean(), abs=1e-6)


def test_the_direction_is_of_all_rows_whatever_the_folds(cache, tmp_path):
    with_folds = train(cache, tmp_path / "a", folds=5)
    without = train(cache, tmp_path / "b", folds=0)
    rows, positive = matrix_of(cache, 5), split_of(cache).is_positive
    plain = fit_difference_of_means(
        torch.from_numpy(rows[positive]), torch.from_numpy(rows[~positive])
    )
    np.testing.assert_allclose(with_folds.directions[5], plain.direction, atol=1e-6)
    assert np.array_equal(with_folds.directions[5], without.directions[5])
    assert without.info.cross_validation is None
    assert without.info.not_cross_validated == "it was not asked for"
    assert without.info.layers[5].cross_validation is None
    assert without.info.layers[5].calibration is None


@pytest.mark.parametrize(
    ("asked", "folds", "nested"), [(2, 2, False), (3, 3, True), (5, 5, True), (1000, 18, True)]
)
def test_as_many_folds_as_asked_for_are_recorded_or_as_there_are_groups(
    cache, tmp_path, asked, folds, nested
):
    found = train(cache, tmp_path / "run", folds=asked).info.cross_validation
    assert found.folds == folds
    assert (found.nested is not None) == nested
    assert len(found.layer_by_fold) == (folds if nested else 0)


def test_a_thousand_folds_of_many_groups_take_no_time_and_choose_no_layer_inside(tmp_path):
    count = 150
    rows = planted(5, 2 * count)
    cache = write_cache(tmp_path / "cache", pairs(count), {5: rows})
    start = time.monotonic()
    found = train(cache, tmp_path / "run", folds=1000).info.cross_validation
    assert time.monotonic() - start < 5
    assert (found.folds, found.nested) == (count, None)


@pytest.mark.parametrize("folds", [1, -1])
def test_one_fold_is_refused_in_words(folds):
    with pytest.raises(UsageError, match=rf"--folds of at least 2, or 0 for none, got {folds}"):
        TrainOptions(folds=folds)


def test_training_goes_on_without_estimates_where_a_class_is_one_group(tmp_path):
    labels = ["deployment"] + ["testing"] * 5
    rows = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(0))
    info = train(write_cache(tmp_path / "c", labelled(*labels), {4: rows}), tmp_path / "run").info
    assert info.cross_validation is None
    assert "got 1 positive and 5 negative" in info.not_cross_validated
    assert info.layers[4].cross_validation is None


def test_a_design_that_could_not_be_refitted_would_be_refused():
    # What `split_examples` promises never to give.
    with pytest.raises(EmptyClassError):
        Design(np.array([True, False, False]), np.arange(3), np.array([0, 1, 1]))


def test_all_is_sorted_and_exists():
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)

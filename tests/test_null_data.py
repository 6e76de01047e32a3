"""Data without any effect: how often a test cries wolf, and what an honest estimate says of it."""

from __future__ import annotations

import numpy as np
import pytest
from planted import cache_of, classes, composed_texts

import probecache
from probecache.fit import Design, Method, fit_layer
from probecache.folds import assign_folds
from probecache.metrics import auroc, permutation_test
from probecache.workflow.cross_validation import Split, layer_estimate, nested_estimate

LAYERS, HIDDEN = 80, 6


def residual_stream(rng, examples, layers=LAYERS, keeps=0.95):
    """Rows [layers, examples, hidden]: each layer is for the most part the one before."""
    rows = rng.standard_normal((layers, examples, HIDDEN))
    for layer in range(1, layers):
        rows[layer] = keeps * rows[layer - 1] + np.sqrt(1 - keeps**2) * rows[layer]
    return rows


def null_scores(rng, positive):
    """Scores [layers, n] of fresh examples on differences of means of others; nothing is there."""
    training, fresh = (residual_stream(rng, len(positive)) for _ in range(2))
    directions = training[:, positive].mean(1) - training[:, ~positive].mean(1)
    return np.einsum("lnh,lh->ln", fresh, directions)


# ---------------------------------------------------------------- the best of all layers


def test_the_p_value_of_the_best_of_80_layers_is_below_5_percent_in_about_5_percent():
    rng, positive = np.random.default_rng(0), classes(20)
    p_values, naive = [], []
    for _ in range(200):
        scores = null_scores(rng, positive)
        found = permutation_test(scores, positive, np.arange(40))
        p_values.append(found.p_value)
        naive.append(auroc(scores[found.best], positive).low > 0.5)
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.09
    # The interval of a layer that was chosen by its AUROC does not pay for the choice.
    assert np.mean(naive) > 0.15
    # All p-values, and not only small ones, are as often below p as p says.
    for p in (0.25, 0.5, 0.75):
        assert np.mean(np.array(p_values) <= p) == pytest.approx(p, abs=0.1)


def test_pairs_that_share_what_they_are_about_leave_the_p_value_what_it_says():
    """What a pair has in common moves both of its members, and the labels within it are swapped."""
    rng, positive, pairs = np.random.default_rng(1), classes(20), np.arange(40) // 2
    p_values = []
    for _ in range(200):
        scores = null_scores(rng, positive) + 2 * np.repeat(rng.standard_normal(20), 2)
        p_values.append(permutation_test(scores, positive, pairs).p_value)
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.09


def test_a_validation_reports_that_p_value_of_the_scores_of_all_its_layers(tmp_path):
    rng, positive = np.random.default_rng(2), classes(20)
    layers = range(1, 6)
    rows = residual_stream(rng, 40, len(layers)).astype(np.float32)
    training, fresh = (
        cache_of(tmp_path / name, positive, dict(zip(layers, values, strict=True)))
        for name, values in (("training", rows), ("fresh", rows[::-1]))
    )
    vectors = probecache.train(cache=training, output=tmp_path / "run")
    result = probecache.validate(vectors=vectors, cache=fresh, output=tmp_path / "v")
    scores = np.stack([layer.scores for layer in result.layers])
    assert result.permutation.p_value == permutation_test(scores, positive, np.arange(40)).p_value


# ---------------------------------------------------------------- the best layer of a training


def cross_validated(rows, positive):
    """What a training says of rows [layers, n, hidden]: by layer, and nested."""
    n = np.arange(len(positive))
    split = Split(positive, n, n, assign_folds(positive, n))
    design = Design(positive, n, split.folds)
    fits = {
        layer: fit_layer(lambda at=layer: [(n, rows[at])], HIDDEN, design, list(Method)[:1])
        for layer in range(len(rows))
    }
    method = Method.DIFFERENCE_OF_MEANS
    found = {layer: of_layer[method] for layer, of_layer in fits.items()}
    return [layer_estimate(fit, split) for fit in found.values()], nested_estimate(found, split)


def test_only_a_nested_choice_of_the_layer_is_honest_where_there_is_nothing_to_find():
    rng, positive = np.random.default_rng(3), classes(25)
    best, nested, held = [], [], []
    for _ in range(40):
        rows = residual_stream(rng, 50, layers=16, keeps=0.6).astype(np.float32)
        layers, found = cross_validated(rows, positive)
        best.append(max(layer.auroc for layer in layers))
        nested.append(found.nested.auroc)
        held.append(found.nested.low <= 0.5 <= found.nested.high)
    best, nested = np.array(best), np.array(nested)
    error = nested.std(ddof=1) / np.sqrt(len(nested))
    assert 3 * error < 0.06
    assert nested.mean() == pytest.approx(0.5, abs=3 * error)
    assert best.mean() > 0.6
    assert (best > nested).mean() > 0.9
    assert np.mean(held) >= 0.9


def test_a_training_reports_that_nested_estimate(tmp_path):
    rng, positive = np.random.default_rng(4), classes(25)
    rows = residual_stream(rng, 50, layers=4).astype(np.float32)
    # A cache is read class by class, and folds are dealt in the order of its examples.
    cache = cache_of(tmp_path / "c", positive, dict(enumerate(rows, start=1)))
    vectors = probecache.train(cache=cache, output=tmp_path / "run")
    layers, found = cross_validated(rows, positive)
    recorded = vectors.info.cross_validation
    assert recorded.nested.auroc == pytest.approx(found.nested.auroc, abs=1e-12)
    assert recorded.best_layer == found.best_layer + 1
    areas = [record.cross_validation.auroc for record in vectors.info.layers.values()]
    assert areas == pytest.approx([layer.auroc for layer in layers], abs=1e-12)


# ---------------------------------------------------------------- copies


def test_copies_that_are_not_kept_together_make_something_out_of_nothing(tmp_path):
    """Each prompt stands in the data three times, under three names, with the label of its first.
    Folds that divide copies score what they were trained on."""
    prompts, copies, hidden = 40, 3, 64
    rng = np.random.default_rng(5)
    source = np.tile(np.arange(prompts), copies)
    positive = classes(prompts // 2)[source]
    rows = {
        layer: rng.standard_normal((prompts, hidden), dtype=np.float32)[source]
        for layer in range(1, 13)
    }
    texts = np.array(composed_texts(5, prompts))[source]
    cache = cache_of(tmp_path / "c", positive, rows, texts=texts)
    vectors = probecache.train(cache=cache, output=tmp_path / "run")

    told = vectors.info.cross_validation
    assert (told.near_duplicates, told.near_duplicates_together) == (120, True)
    assert told.groups == prompts
    areas = np.array([r.cross_validation.auroc for r in vectors.info.layers.values()])
    assert areas.mean() == pytest.approx(0.5, abs=3 * areas.std(ddof=1) / np.sqrt(12))

    own, naive = np.arange(len(source)), []
    folds = assign_folds(positive, own)
    split = Split(positive, own, own, folds)
    for values in rows.values():
        fits = fit_layer(
            lambda values=values: [(own, values)],
            hidden,
            Design(positive, own, folds),
            (Method.DIFFERENCE_OF_MEANS,),
        )
        naive.append(layer_estimate(fits[Method.DIFFERENCE_OF_MEANS], split).auroc)
    assert min(naive) > 0.6
    assert np.mean(naive) > 0.8


def test_copies_are_told_where_a_run_is_printed(tmp_path, capsys):
    from probecache.terminal import print_vectors

    source = np.tile(np.arange(40), 2)
    rows = np.random.default_rng(6).standard_normal((40, 8), dtype=np.float32)[source]
    texts = np.array(composed_texts(6, 40))[source]
    cache = cache_of(tmp_path / "c", classes(20)[source], {3: rows}, texts=texts)
    print_vectors(probecache.train(cache=cache, output=tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "80 examples are near-duplicates of examples of other groups" in printed
    assert "they were held out together" in printed

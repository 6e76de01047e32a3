"""What a report says beside AUROCs: baselines, honest estimates, calibration, tokens in colour."""

from __future__ import annotations

import html
import json
import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_validations import Page, save, with_evidence
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score, roc_curve

from probecache.errors import StoreError
from probecache.report import write_report
from probecache.report.layer_curve import spread_labels
from probecache.report.panels import MOST_PIECES, MOST_TABLED, artefact_facts
from probecache.report.saved import read_validation
from probecache.report.tokens import Piece, ScoredPrompt, TokenScores

PAYLOAD = "</span></script><script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 }}\u202e"


def report(folder):
    write_report(folder)
    return Page(folder)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A validation with every optional field, and its report; not to be changed."""
    folder = with_evidence(tmp_path_factory.mktemp("drawn") / "v", layers=(1, 3, 6), sizes=(30, 25))
    write_report(folder)
    return folder


def source(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def changed(folder, name="summary.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_what_is_saved_is_what_is_read(tmp_path):
    found = read_validation(with_evidence(tmp_path / "v"))
    evidence, layer = found.evidence, found.evidence.layers[2]
    assert evidence.aggregate == "mean"
    assert (evidence.training.folds, evidence.training.nested.value) == (5, 0.777)
    assert (layer.cross_validated.low, layer.tpr_at_5.value, layer.brier) == (0.702, 0.522, 0.147)
    assert evidence.layers[found.best_layer].below_best is None
    assert evidence.artefacts.best.title == "bag of words"
    assert evidence.artefacts.outlier_dimensions == (17, 203)
    assert [one.n for one in evidence.calibration_bins] == [11, 0, 10]
    assert [prompt.end for prompt in found.tokens.prompts] == ["highest", "lowest"]


def test_every_figure_of_the_evidence_stands_on_the_page(drawn):
    text = Page(drawn).text
    for words in (
        "Training, cross-validated 0.777",
        "p-value 0.004",
        "Best baseline: bag of words 0.912 the probe's gain is −0.035",
        "Gain over the best baseline: −0.035",
        "prompt length 0.580 0.530 – 0.630 How length was made.",
        "answer letter – How answer-letter was made.",
        "mean cosine +0.417",
        "Owed to the first token 8% of the variance",
        "62% of the squared norm, in dimension 17, 203",
        "rendered differently: Another system prompt",
        "Brier score 0.147",
        "Slope 0.913",
        "medicine 0.871 0.771 – 0.971 80.0% 1.250 6 + 5",
        "one class alone – 80.0% 1.250 6 + 0",
        "bootstrap over 21 groups",
        "5 folds of 97 groups",
        "AUROC up to 0.641",
    ):
        assert words in text, words


def test_an_older_validation_is_drawn_without_what_it_lacks(tmp_path):
    folder = save(tmp_path / "v")
    text = report(folder).text
    assert "What else could explain it" not in text
    assert "Token by token" not in text
    assert "By category" not in text
    assert "cross-validated" not in text
    assert not (folder / "visualizations" / "calibration.svg").exists()


def test_calibrated_validations_have_a_reliability_diagram(drawn):
    drawings = drawn / "visualizations"
    assert (drawings / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert "Reliability at layer" in (drawings / "calibration.svg").read_text()


def test_a_baseline_that_reaches_the_probe_is_marked_and_no_other(drawn):
    best = read_validation(drawn).best.auroc
    rows = {row[0]: row for row in Page(drawn).rows if "How" in " ".join(row)}
    marked = {name for name, row in rows.items() if "reaches the probe" in row}
    summary = json.loads((drawn / "summary.json").read_text())["artefacts"]["baselines"]
    expected = {one["title"] for one in summary if (one["high"] or 0) >= best}
    assert expected == {"bag of words"}
    assert marked == expected


def test_the_layer_curve_names_its_lines(drawn):
    drawing = (drawn / "visualizations" / "auroc_by_layer.svg").read_text()
    for words in ("words 0.91", "length 0.58", "chance", "training prompts, cross-validated",
                  "random directions, mean to highest"):  # fmt: skip
        assert f">{words}<" in drawing
    assert "shuffled" not in drawing


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
    st.floats(0.001, 0.12),
)
def test_labels_keep_their_order_their_distance_and_stay_inside(places, gap):
    found = spread_labels(places, gap, 0.0, 1.0)
    order = np.argsort(places, kind="stable")
    assert np.all(np.diff(np.array(found)[order]) >= gap - 1e-9)
    assert min(found) >= -1e-9
    assert max(found) <= 1 + 1e-9
    if len(places) == 1 or np.diff(np.sort(places)).min() >= gap:
        inside = np.all(np.array(places) + gap * len(places) < 1)
        assert not inside or np.allclose(found, places)


@given(st.lists(st.floats(0.3, 0.7), min_size=2, max_size=8))
def test_labels_move_as_little_as_an_isotonic_regression_lets_them(places):
    gap = 0.03
    steps = gap * np.arange(len(places))
    order = np.argsort(places, kind="stable")
    wanted = np.array(places)[order] - steps
    nearest = IsotonicRegression().fit_transform(np.arange(len(places)), wanted) + steps
    found = np.array(spread_labels(places, gap, 0.0, 1.0))[order]
    np.testing.assert_allclose(found, nearest, atol=1e-9)


# ---------------------------------------------------------------- what the script draws from


def numbers(folder):
    return json.loads(html.unescape(re.search(r'data-layers="([^"]*)"', source(folder))[1]))


def test_the_numbers_for_the_script_are_those_of_the_scores(drawn):
    validation = read_validation(drawn)
    limits, layers = numbers(drawn)
    assert [layer[0] for layer in layers] == [1, 3, 6]
    assert limits[0] < 1 < 6 < limits[1]
    for layer in layers:
        scores = validation.scores[layer[0]]
        fpr, tpr, _ = roc_curve(scores.is_positive, scores.scores)
        points = np.array(layer[7]).reshape(-1, 2) / 1000
        np.testing.assert_allclose(np.interp(0.5, points[:, 0], points[:, 1]),
                                   np.interp(0.5, fpr, tpr), atol=0.002)  # fmt: skip
        area = np.trapezoid(points[:, 1], points[:, 0])
        assert area == pytest.approx(roc_auc_score(scores.is_positive, scores.scores), abs=0.002)
        low, high, *counts = layer[9]
        assert low == pytest.approx(scores.scores.min(), rel=1e-4)
        assert high == pytest.approx(scores.scores.max(), rel=1e-4)
        assert [sum(one) for one in counts] == [25, 30]  # the positive class comes last


def test_the_numbers_for_the_script_hold_no_text(drawn):
    raw = re.search(r'data-layers="([^"]*)"', source(drawn))[1]
    assert re.fullmatch(r"[\d.,\[\]eE+\-nul]+", raw)


def test_a_page_of_ten_thousand_prompts_and_eighty_layers_stays_small(tmp_path):
    folder = with_evidence(
        tmp_path / "v", layers=[7], sizes=(5000, 5000), questions=["word " * 200]
    )
    page = report(folder)
    assert len(source(folder)) < 700_000
    rows = [attrs for tag, attrs in page.tags if tag == "tr" and "data-g" in attrs]
    assert len(rows) == MOST_TABLED


# ---------------------------------------------------------------- tokens


def tokens_of(scores):
    pieces = tuple(Piece("x", float(score)) for score in scores)
    prompt = ScoredPrompt("a", "testing", 0.0, "highest", (Piece("<|user|>", None), *pieces))
    return TokenScores(0, float(min(scores)), float(max(scores)), (prompt,))


@pytest.mark.parametrize("unit", [1.0, 1e-200, 1e306])
def test_shades_are_even_about_the_median_and_end_where_95_in_100_tokens_do(unit):
    scores = np.random.default_rng(0).normal(3, 2, 1001)
    middle = np.median(scores)
    half = np.quantile(np.abs(scores - middle), 0.95)
    tokens = tokens_of(scores * unit)
    assert tokens.scale == pytest.approx((middle * unit, half * unit), rel=1e-12)
    for share, shade in ((-9, -4), (-1, -4), (-0.5, -2), (0, 0), (0.5, 2), (1, 4), (9, 4)):
        assert tokens.shade((middle + share * half) * unit) == shade


def test_one_token_that_is_like_no_other_leaves_the_others_their_colours():
    scores = np.linspace(-1, 1, 101)
    lone = tokens_of([*scores, 500.0])
    assert lone.shade(1.0) == 4
    assert lone.shade(-1.0) == -4


def test_a_scale_without_extent_has_no_colour():
    assert tokens_of([2.0, 2.0]).shade(99.0) == 0
    assert TokenScores(0, 2.0, 2.0, ()).shade(99.0) == 0


def test_tokens_carry_their_colour_their_figure_and_a_place_for_the_keyboard(drawn):
    page = source(drawn)
    assert '<span class="t u4" tabindex="0" title="4.000">highest4 </span>' in page
    assert '<span class="t d3" tabindex="0" title="−3.000">lowest3 </span>' in page
    assert '<span class="t" tabindex="0" title="0.000">highest0 </span>' in page
    assert '<span class="gap">&lt;|user|&gt;</span>' in page


def long_prompt():
    pieces = [{"text": f"w{k} ", "score": 3.9 if k == 4000 else 0.1} for k in range(5000)]
    pieces[4001] = {"text": "a\n", "score": 4.0}
    pieces[4002] = {"text": "b\n", "score": None}
    return {"id": "a", "class": "testing", "score": 1.0, "end": "highest", "pieces": pieces}


def test_of_a_long_prompt_the_part_around_its_strongest_token_is_shown(tmp_path):
    folder = changed(with_evidence(tmp_path / "v"), "token_scores.json", prompts=[long_prompt()])
    text = report(folder).text
    assert "w4000 " in text
    assert "w3000 " not in text
    before, after = re.search(r"(\d+) pieces before.*? (\d+) pieces after", text).groups()
    assert int(before) + MOST_PIECES + int(after) == 5000
    # A line end that has a score can be seen.
    assert ">a↵\n</span>" in source(folder)
    assert ">b\n</span>" in source(folder)


# ---------------------------------------------------------------- strangers' files


def test_hostile_texts_of_the_evidence_stay_text(drawn, tmp_path):
    hostile = with_evidence(tmp_path / "v", layers=(1, 3, 6), sizes=(30, 25))
    summary = json.loads((hostile / "summary.json").read_text())
    for one in summary["artefacts"]["baselines"]:
        one |= {"name": PAYLOAD + one["name"], "title": PAYLOAD, "how": PAYLOAD}
    summary["artefacts"] |= {
        "best_baseline": PAYLOAD + "words",
        "rendered_alike": {"alike": False, "differences": [PAYLOAD]},
    }
    summary["categories"][0]["category"] = PAYLOAD
    summary |= {"interval": PAYLOAD}
    (hostile / "summary.json").write_text(json.dumps(summary))
    record = json.loads((hostile / "token_scores.json").read_text())
    for prompt in record["prompts"]:
        prompt |= {"id": PAYLOAD, "class": PAYLOAD}
        prompt["pieces"] = [one | {"text": PAYLOAD} for one in prompt["pieces"]]
    (hostile / "token_scores.json").write_text(json.dumps(record))
    expected, found = Page(drawn), report(hostile)
    kept = [tag for tag, _ in expected.tags if tag not in DRAWN]
    assert [tag for tag, _ in found.tags if tag not in DRAWN] == kept
    names = {name for _, attrs in expected.tags for name in attrs}
    assert {name for _, attrs in found.tags for name in attrs} <= names
    assert PAYLOAD.rstrip("\u202e") in found.text
    assert "\u202e" not in source(hostile)


# Drawings place more or fewer strokes by what they hold; tests of drawings look at these.
DRAWN = {"path", "g", "use", "text", "defs", "clippath", "rect", "svg", "style"}


def artefacts(**changes):
    def change(summary):
        summary["artefacts"] |= changes

    return change


def in_layer(**changes):
    def change(summary):
        summary["layers"][0] |= changes

    return change


def whole(**changes):
    return lambda summary: summary.update(changes)


DAMAGE = {
    "an aggregate that is no text": (whole(aggregate=3), "expected a text, got 3"),
    "a p-value above one": (whole(best_of_all={"p_value": 1.5, "permutations": 2}), "from 0 to 1"),
    "permutations that are no count": (
        whole(best_of_all={"p_value": 0.5, "permutations": -2}),
        "whole number",
    ),
    "training without counts": (whole(training={"n_positive": 3}), "expected 'n_negative'"),
    "training of a wrong kind": (whole(training=[1]), "malformed"),
    "categories of a wrong kind": (whole(categories={"a": 1}), "expected a list"),
    "a category without a name": (whole(categories=[{"n_positive": 1}]), "expected 'category'"),
    "a bin of a wrong kind": (whole(calibration_bins=[3]), "malformed"),
    "a share above one": (
        whole(calibration_bins=[{"low": 0, "high": 1, "n": 1, "predicted": 2, "observed": 0}]),
        "from 0 to 1",
    ),
    "a gain of two": (artefacts(gain=2), "difference of AUROCs"),
    "a cosine of two": (artefacts(pair_agreement=2), "cosine"),
    "a balance without counts": (artefacts(class_balance={"positive": 1}), "'negative'"),
    "a flag of a wrong kind": (artefacts(rendered_alike={"alike": 1}), "true or false"),
    "outliers that are no dimensions": (
        artefacts(outlier_dimensions={"dimensions": ["x"]}),
        "whole number",
    ),
    "a baseline that is a text": (artefacts(baselines=["words"]), "malformed"),
    "an interval turned round": (in_layer(cv_low=0.9, cv_high=0.1), "cv_low up to cv_high"),
    "a rate above one": (in_layer(tpr_at_1={"tpr": 1.1}), "from 0 to 1"),
    "a difference without a p-value": (
        in_layer(below_best={"difference": 0, "low": 0, "high": 0}),
        "'p_value'",
    ),
    "a slope that is a text": (in_layer(calibration_slope="1"), "finite number"),
}


@pytest.mark.parametrize("share", [1.7, -0.3, 1e300])
def test_a_share_of_variance_may_lie_outside_0_to_1(tmp_path, share):
    folder = with_evidence(tmp_path / "v")
    summary = json.loads((folder / "summary.json").read_text())
    artefacts(first_token_share=share)(summary)
    changed(folder, artefacts=summary["artefacts"])
    found = read_validation(folder).evidence.artefacts
    assert found.first_token_share == share
    words = dict(artefact_facts(found))["Owed to the first token"]
    assert words.split()[0] in ("170%", "−30%", "1.00e+300")


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_evidence_is_refused_in_one_line(tmp_path, name):
    change, message = DAMAGE[name]
    folder = with_evidence(tmp_path / "v")
    summary = json.loads((folder / "summary.json").read_text())
    change(summary)
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(StoreError, match=message) as caught:
        read_validation(folder)
    assert "\n" not in str(caught.value)
    assert "summary.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 3, "high": 2}, "low up to high"),
        ({"layer": "x"}, "whole number"),
        ({"prompts": {}}, "expected a list"),
        ({"prompts": [3]}, "malformed"),
        ({"prompts": [{"end": "middle"}]}, "highest or lowest"),
        ({"low": None}, "finite number"),
    ],
)
def test_damaged_token_scores_are_refused_in_one_line(tmp_path, changes, message):
    folder = changed(with_evidence(tmp_path / "v"), "token_scores.json", **changes)
    with pytest.raises(StoreError, match=message) as caught:
        read_validation(folder)
    assert "\n" not in str(caught.value)
    assert "token_scores.json" in str(caught.value)


@pytest.mark.parametrize(
    ("aggregate", "column"),
    [("max", "max_score"), ("top-5", "score"), ("max", "score"), ("mean", "mean_score")],
)
def test_scores_are_read_from_the_column_of_their_aggregate(tmp_path, aggregate, column):
    folder = changed(save(tmp_path / "v"), aggregate=aggregate)
    for path in folder.glob("*.csv"):
        head, *rows = path.read_text().splitlines()
        names = head.split(",")
        wanted = names.index("mean_score")
        lines = []
        for row in rows:
            cells = row.split(",")
            score = cells[wanted]
            if column != "mean_score":
                cells[wanted] = "0.0"
            if column in names:
                cells[names.index(column)] = score
            lines.append(",".join([*cells, score] if column not in names else cells))
        head += "" if column in names else f",{column}"
        path.write_text("\n".join([head, *lines]) + "\n")
    assert read_validation(folder).evidence.aggregate == aggregate


@pytest.mark.parametrize("layers", [[0], range(80)])
def test_evidence_of_one_layer_or_eighty_is_drawn_without_a_warning(tmp_path, layers):
    folder = with_evidence(tmp_path / "v", layers=layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(write_report(folder)) == 9
    assert len(source(folder)) < 1_500_000

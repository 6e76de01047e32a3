"""Runs side by side, against what their own files and scikit-learn say."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
from saved_validations import planted_scores, save, with_evidence
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from probecache.errors import OutputError, StoreError, UsageError
from probecache.workflow.compare import compare, lines

HOSTILE = "</bdi><script>alert(1)</script>\"'> {{ 7 * 7 }} \x1b[2J\u202e"


def other_scores(labels, layer):
    return planted_scores(labels, layer) + np.random.default_rng(9).normal(size=labels.size)


def run_folder(folder, best=20, model="models/tiny-llama"):
    """A run as training writes it, as far as a comparison reads it."""
    estimate = {"auroc": 0.81, "low": 0.7, "high": 0.9}
    record = {
        "format": "probecache-vectors",
        "method": "logistic",
        "positive_class": "deployment",
        "positions": "last",
        "source_cache": "caches/pairs",
        "identity": {"model": model},
        "layers": {"4": {"cross_validation": None}, "20": {"cross_validation": estimate}},
        "cross_validation": {"best_layer": best, "nested": estimate | {"auroc": 0.78}},
    }
    (folder / "normalized_vectors").mkdir(parents=True)
    (folder / "normalized_vectors" / "vectors.json").write_text(json.dumps(record))
    return folder


def scores_of(folder, layer):
    with (folder / f"probe_stats_layer{layer}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    positive = np.array([row["type"] == "deployment" for row in rows])
    return np.array([float(row["mean_score"]) for row in rows]), positive


def rewritten(folder, change):
    """The tables of a validation with their rows changed."""
    for path in folder.glob("probe_stats_layer*.csv"):
        with path.open(newline="") as file:
            head, *rows = list(csv.reader(file))
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([head, *change(rows)])
    return folder


def delong_by_brute_force(one, other, positive):
    """Difference of AUROCs and its standard error from all pairs, ties as halves."""
    placements = []
    for scores in (one, other):
        gap = scores[positive][:, None] - scores[~positive][None, :]
        placements.append((gap > 0) + 0.5 * (gap == 0))
    gap = placements[0] - placements[1]
    variance = gap.mean(axis=1).var(ddof=1) / positive.sum()
    variance += gap.mean(axis=0).var(ddof=1) / (~positive).sum()
    return gap.mean(), np.sqrt(variance)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two validations of the same prompts by different probes; not to be changed."""
    folder = tmp_path_factory.mktemp("pair")
    one = with_evidence(folder / "one", sizes=(40, 30))
    two = save(folder / "two", sizes=(40, 30), scores=other_scores, method="ridge")
    return one, two


def test_the_difference_on_the_same_prompts_is_delongs(pair):
    found = compare(pair).pairings[0]
    best = [json.loads((one / "summary.json").read_text())["best_layer"] for one in pair]
    (first, positive), (second, _) = (scores_of(p, n) for p, n in zip(pair, best, strict=True))
    gap, error = delong_by_brute_force(first, second, positive)
    areas = [roc_auc_score(positive, scores) for scores in (first, second)]
    assert found.n == 70
    assert found.difference.difference == pytest.approx(gap, abs=1e-12)
    assert found.difference.difference == pytest.approx(areas[0] - areas[1], abs=1e-12)
    assert found.difference.p_value == pytest.approx(2 * norm.sf(abs(gap) / error), abs=1e-9)


def test_the_layers_that_training_chose_are_compared_where_both_are_known(pair, tmp_path):
    folders = []
    for folder in pair:
        copied = shutil.copytree(folder, tmp_path / folder.name)
        summary = json.loads((copied / "summary.json").read_text())
        layers = [row["layer"] for row in summary["layers"]]
        chosen = next(layer for layer in layers if layer != summary["best_layer"])
        (copied / "summary.json").write_text(json.dumps(summary | {"chosen_in_training": chosen}))
        folders.append((copied, chosen))
    found = compare([folder for folder, _ in folders])
    (first, positive), (second, _) = (scores_of(*one) for one in folders)
    gap, _ = delong_by_brute_force(first, second, positive)
    assert found.pairings[0].difference.difference == pytest.approx(gap, abs=1e-12)
    named = f"A {folders[0][1]}, B {folders[1][1]}"
    assert any(f"the layers that training chose ({named})" in one for one in found.remarks)
    one_known = compare([folders[0][0], pair[1]])
    assert any("chosen on these very prompts" in one for one in one_known.remarks)


def test_prompts_in_another_order_are_still_the_same_prompts(pair, tmp_path):
    same = save(tmp_path / "two", sizes=(40, 30), scores=other_scores)
    turned = rewritten(same, lambda rows: rows[::-1])
    expected = compare(pair).pairings[0].difference
    assert compare([pair[0], turned]).pairings[0].difference == expected


def renamed(rows):
    return [["new" + row[0], *row[1:]] for row in rows]


def relabelled(rows):
    """One prompt of each class takes the other's id: the sets of ids are the same."""
    rows[0][0], rows[-1][0] = rows[-1][0], rows[0][0]
    return rows


def reworded(rows):
    rows[5][1] = "Something else was asked."
    return rows


@pytest.mark.parametrize(
    ("change", "shared"),
    [(renamed, 0), (relabelled, 68), (reworded, 69)],
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_other_prompts_are_not_compared_and_it_is_said_how_many_are_shared(
    pair, tmp_path, change, shared
):
    other = rewritten(save(tmp_path / "two", sizes=(40, 30)), change)
    found = compare([pair[0], other]).pairings[0]
    assert found.difference is None
    assert found.remark.startswith("not comparable: other prompts")
    assert f"{shared} the same" in found.remark


def test_ids_that_repeat_are_compared_only_where_the_order_is_the_same(tmp_path):
    def repeat(rows):
        return [["q", *row[1:]] for row in rows]

    one, two = (rewritten(save(tmp_path / n), repeat) for n in ("one", "two"))
    assert compare([one, two]).pairings[0].difference.difference == 0
    rewritten(two, lambda rows: rows[::-1])
    assert compare([one, two]).pairings[0].difference is None


def test_another_positive_class_is_not_compared(pair, tmp_path):
    other = save(tmp_path / "v", sizes=(40, 30), names=("testing", "deployment"))
    found = compare([pair[0], other])
    assert found.pairings[0].difference is None
    assert "means deployment in A and testing in B" in found.pairings[0].remark
    assert "The runs do not mean the same class by a high score." in found.remarks


def test_another_aggregate_is_said_beside_the_difference(pair, tmp_path):
    other = save(tmp_path / "v", sizes=(40, 30), scores=other_scores, aggregate="max")
    found = compare([pair[0], other]).pairings[0]
    assert found.difference is not None
    assert "(mean, max)" in found.remark


def test_one_and_the_same_run_differs_by_nothing(pair):
    gap = compare([pair[0], pair[0]]).pairings[0].difference
    assert (gap.difference, gap.p_value) == (0, 1)


def test_every_pair_of_validations_is_set_against_one_another_and_no_run(pair, tmp_path):
    found = compare([*pair, run_folder(tmp_path / "run"), pair[0]])
    pairs = [one.first + one.second for one in found.pairings]
    assert pairs == ["AB", "AD", "BD"]
    assert any("hold p against 0.017" in remark for remark in found.remarks)
    assert any("cross-validated estimate" in remark for remark in found.remarks)


def test_what_each_run_found_stands_beside_the_others(pair, tmp_path):
    found = compare([*pair, run_folder(tmp_path / "run")])
    one, two, run = found.runs
    summary = json.loads((pair[0] / "summary.json").read_text())
    assert one.best_layer == summary["best_layer"]
    assert (one.p_value, one.nested.value, one.gain) == (0.004, 0.777, -0.0345)
    assert one.best_baseline == ("bag of words", 0.912)
    assert (two.p_value, two.nested, two.best_baseline) == (None, None, None)
    assert (run.kind, run.best_layer, run.best.value) == ("vectors", 20, 0.81)
    assert run.nested.value == 0.78
    assert run.layers[4].cross_validated is None


def test_a_vectors_folder_and_its_run_are_the_same(tmp_path):
    run = run_folder(tmp_path / "run")
    found = compare([run, run / "normalized_vectors"])
    assert found.runs[0].layers == found.runs[1].layers
    assert found.pairings == ()


def test_the_lines_fit_a_terminal_and_stand_in_columns(pair, tmp_path):
    long = save(tmp_path / ("long" * 40), sizes=(40, 30), model="m" * 300, method="ridge " * 40)
    text = lines(compare([*pair, long, run_folder(tmp_path / "run")]))
    assert max(map(len, text)) <= 100
    head = next(row for row in text if "best layer" in row)
    rows = text[text.index(head) + 1 : text.index(head) + 5]
    assert [row[0] for row in rows] == list("ABCD")
    place = head.index("AUROC")
    assert all(row[place] in "0123456789" and row[place - 1] == " " for row in rows)
    layer = next(row for row in text if row.startswith("     4 "))
    assert layer.split()[0] == "4"
    assert len(layer.split()) == 5
    assert any(row.startswith("A - B: ") and "on the same 70 prompts" in row for row in text)


def test_more_runs_than_a_terminal_is_wide_stand_in_blocks(pair):
    text = lines(compare([pair[0]] * 13))
    assert max(map(len, text)) <= 100
    heads = [row.split()[1:] for row in text if row.split()[:1] == ["layer"]]
    assert heads == [list("ABCDEFGHIJ"), list("KLM")]


def test_the_files_say_what_was_found(pair, tmp_path):
    output = tmp_path / "out"
    found = compare([*pair, run_folder(tmp_path / "run")], output)
    assert {path.name for path in output.iterdir()} == {path.name for path in found.files}
    with (output / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["layer"]) for row in rows] == [
        ("A", "2"), ("A", "4"), ("B", "2"), ("B", "4"), ("C", "4"), ("C", "20"),
    ]  # fmt: skip
    assert (rows[-1]["auroc"], rows[-1]["cv_auroc"], rows[-1]["best"]) == ("", "0.81", "1")
    record = json.loads((output / "comparison.json").read_text())
    assert [run["run"] for run in record["runs"]] == ["A", "B", "C"]
    gap = record["pairings"][0]["difference"]["difference"]
    assert gap == found.pairings[0].difference.difference
    page = (output / "comparison.html").read_text()
    assert "<script" not in page
    assert "default-src &#39;none&#39;" in page
    assert "on the same 70 prompts" in page
    assert page.count('role="img"') == 2


def test_an_earlier_comparison_is_replaced_and_nothing_else(pair, tmp_path):
    compare(pair, tmp_path / "out")
    compare(pair[::-1], tmp_path / "out")
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["runs"][0]["path"] == str(pair[1])
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"mine\.txt"):
        compare(pair, tmp_path / "out")
    with pytest.raises(OutputError, match="got a file"):
        compare(pair, tmp_path / "out" / "mine.txt")


def test_texts_of_strangers_stay_text(pair, tmp_path):
    hostile = save(tmp_path / "v", sizes=(40, 30), model=HOSTILE, method=HOSTILE, data=HOSTILE)
    found = compare([pair[0], hostile], tmp_path / "out")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "<script" not in page
    assert "&lt;/bdi&gt;&lt;script&gt;alert(1)" in page
    assert not {"\x1b", "\u202e"} & set(page)
    assert not {"\x1b", "\u202e"} & set("".join(lines(found)))


@pytest.mark.parametrize("count", [0, 1, 27])
def test_too_few_and_too_many_folders_are_refused(pair, count):
    with pytest.raises(UsageError, match="from 2 to 26"):
        compare([pair[0]] * count)


DAMAGE = {
    "no json": (lambda record: None, "expected JSON"),
    "another format": (lambda record: record | {"format": "x"}, "probecache-vectors"),
    "a layer that is a path": (lambda record: record | {"layers": {"../x": {}}}, "named by"),
    "no identity": (lambda r: {k: v for k, v in r.items() if k != "identity"}, "'identity'"),
    "an AUROC above one": (
        lambda record: record | {"layers": {"1": {"cross_validation": {"auroc": 7}}}},
        "from 0 to 1",
    ),
    "no layers": (lambda record: record | {"layers": {}}, "at least one layer"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_vectors_are_refused_in_one_line(pair, tmp_path, name):
    change, message = DAMAGE[name]
    path = run_folder(tmp_path / "run") / "normalized_vectors" / "vectors.json"
    record = change(json.loads(path.read_text()))
    path.write_text("{" if record is None else json.dumps(record))
    with pytest.raises(StoreError, match=message) as caught:
        compare([pair[0], tmp_path / "run"])
    assert "\n" not in str(caught.value)


def test_a_folder_of_something_else_is_refused(pair, tmp_path):
    with pytest.raises(StoreError, match="got neither"):
        compare([pair[0], tmp_path])

"""The folder of a validation: whole or not at all, and never in place of the user's own files."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json

import pytest

from probecache.errors import OutputError
from probecache.workflow import results as module
from probecache.workflow.results import FORMAT, csv_bytes, require_output, save_results

ROWS = [
    {
        "layer": 3,
        "auroc": 0.5,
        "below_best": {"difference": 0.1, "low": 0.05, "high": 0.15, "p_value": 0.01},
    },
    {"layer": 8, "auroc": 0.75, "below_best": None},
]
SUMMARY = {"format": FORMAT, "layers": ROWS, "warnings": ['Ünicode, \u2028 and a quote "']}
TABLES = {
    "probe_stats_layer3.csv": lambda: b"question_id\nq0\n",
    "probe_stats_layer8.csv": lambda: b"question_id\nq1\n",
}


def save(output, summary=SUMMARY, tables=TABLES, **options):
    return save_results(output, summary, tables, **{"visualize": False, **options})


def content_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_every_file_is_there_and_recorded_with_its_hash(tmp_path):
    files = save(tmp_path / "validation")
    names = ["probe_stats_layer3.csv", "probe_stats_layer8.csv", "summary.csv", "summary.json"]
    assert [path.name for path in files] == names
    assert [path.parent for path in files] == [tmp_path / "validation"] * 4
    summary = json.loads(files[-1].read_bytes())
    assert {name: summary[name] for name in SUMMARY} == SUMMARY
    assert set(summary["files"]) == set(names[:-1])
    for name, record in summary["files"].items():
        content = (tmp_path / "validation" / name).read_bytes()
        assert record["bytes"] == len(content)
        assert record["sha256"] == hashlib.sha256(content).hexdigest()


def test_the_summarys_table_has_a_column_for_each_figure_whether_it_is_there_or_not(tmp_path):
    save(tmp_path / "v")
    parts = ["below_best", "below_best_low", "below_best_high", "below_best_p_value"]
    with (tmp_path / "v" / "summary.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["layer", "auroc", *parts]
    assert rows == [["3", "0.5", "0.1", "0.05", "0.15", "0.01"], ["8", "0.75", "", "", "", ""]]


def test_tables_are_made_one_after_the_other(tmp_path):
    made = []
    tables = {name: lambda n=name: made.append(n) or b"x\n" for name in TABLES}
    save(tmp_path / "v", tables=tables)
    assert made[-2:] == list(TABLES)


def test_an_earlier_validation_is_replaced_whole(tmp_path):
    save(tmp_path / "v")
    save(tmp_path / "v", tables={"probe_stats_layer9.csv": lambda: b"other\n"})
    names = {"probe_stats_layer9.csv", "summary.csv", "summary.json"}
    assert set(content_of(tmp_path / "v")) == names
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def stopped():
    raise KeyboardInterrupt


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("fault", "error"), [(stopped, KeyboardInterrupt), (full, OutputError)])
@pytest.mark.parametrize("earlier", [False, True], ids=["free", "replacing"])
def test_a_table_that_fails_leaves_what_was_there(tmp_path, fault, error, earlier):
    if earlier:
        save(tmp_path / "v")
    before = content_of(tmp_path)
    calls = []

    def table():
        calls.append(1)
        return fault() if len(calls) > 1 else b"x\n"  # the first call asks for its size

    with pytest.raises(error):
        save(tmp_path / "v", tables={"probe_stats_layer3.csv": table})
    assert content_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["v"] * earlier


@pytest.mark.parametrize("fault", [stopped, full])
@pytest.mark.parametrize("earlier", [False, True], ids=["free", "replacing"])
def test_a_commit_that_fails_brings_the_earlier_one_back(tmp_path, monkeypatch, fault, earlier):
    if earlier:
        save(tmp_path / "v")
    before = content_of(tmp_path)
    monkeypatch.setattr(module, "commit_folder", lambda *_: fault())
    with pytest.raises((KeyboardInterrupt, OutputError)):
        save(tmp_path / "v")
    assert content_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["v"] * earlier


def test_drawing_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_draw", lambda _: stopped())
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "v", visualize=True)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- where results may go


def test_free_places_and_earlier_validations_are_accepted(tmp_path):
    require_output(tmp_path / "nowhere" / "yet")
    (tmp_path / "empty").mkdir()
    require_output(tmp_path / "empty")
    save(tmp_path / "v")
    for name in ("report.html", "token_scores.json"):
        (tmp_path / "v" / name).write_text("{}")
    (tmp_path / "v" / "visualizations").mkdir()
    for name in ("roc_curves", "auroc_by_layer", "score_distributions", "calibration"):
        for kind in ("png", "svg"):
            (tmp_path / "v" / "visualizations" / f"{name}.{kind}").write_text("")
    require_output(tmp_path / "v")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'{"format": "probecache-run"}', b"\xff", b"[" * 9999],
)
def test_a_folder_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(OutputError, match="holds something else; choose another folder"):
        require_output(tmp_path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError):
        require_output(tmp_path / "file")


@pytest.mark.parametrize(
    "name",
    [
        *("notes.txt", "probe_stats_layer3.csv.bak", "probe_stats_layerX.csv", "summary.json~"),
        *("visualizations/mine.png", "visualizations/roc_curves.pdf", "ridge/summary.json"),
        *("token_scores.json.old", "report.html/x", "summary.csv\n"),
    ],
)
def test_a_users_file_beside_an_earlier_validation_is_named_and_kept(tmp_path, name):
    save(tmp_path / "v")
    path = tmp_path / "v" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(OutputError, match="would be lost; move it, or choose another folder"):
        require_output(tmp_path / "v")
    assert path.read_text() == "mine"


# ---------------------------------------------------------------- tables


def test_cells_are_read_back_as_they_were():
    rows = [["a", 1, 0.1], ['"quoted", with comma', 2, 1e-300], ["line\nend", 3, -0.0]]
    rows += [["lone\rreturn", 4, 1.0], ["\u2028", 5, 2.5], ["", 6, 3.0]]
    text = csv_bytes(["text", "n", "x"], rows).decode()
    found = list(csv.reader(io.StringIO(text, newline="")))
    assert found[0] == ["text", "n", "x"]
    assert [[t, int(n), float(x)] for t, n, x in found[1:]] == rows
    assert text.count("\r") == 1


def test_all_is_sorted_and_exists():
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)

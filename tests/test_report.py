"""The report, made from saved validations and read back as a browser would."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import subprocess
import sys
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_validations import Page, planted_scores, save

from probecache.errors import OutputError, StoreError
from probecache.report import write_report
from probecache.report.classes import NEGATIVE, POSITIVE, VARIABLES, class_groups
from probecache.report.distributions import panel_layers
from probecache.report.saved import read_validation, shown

FIGURES = ["roc_curves", "auroc_by_layer", "score_distributions"]
SVG_NAME = "http://www.w3.org/2000/svg"
HOSTILE = "<script>alert(1)</script> $x^2$ {{ 7 * 7 }} & \"quoted\" 'text' 測試"


def drawn_texts(svg):
    elements = ElementTree.parse(svg).getroot().iter()
    return ["".join(e.itertext()).strip() for e in elements if e.tag.endswith("}text")]


def with_classes(folder, classes, n_positive=12, **options):
    """Like `save`, the negatives shared out among classes; `classes` maps name to size."""
    save(folder, sizes=(n_positive, sum(classes.values())), **options)
    names = [name for name, size in classes.items() for _ in range(size)]
    for path in folder.glob("probe_stats_layer*.csv"):
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        others = [row for row in rows[1:] if row[2] == "testing"]
        for row, name in zip(others, names, strict=True):
            row[2] = name
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    sizes = {"deployment": n_positive, **classes}
    edited(classes=sizes, negative_class=" + ".join(classes))(folder)
    return folder


def test_every_figure_and_the_page_are_written_and_nothing_else(tmp_path):
    folder = save(tmp_path / "v")
    before = set(folder.rglob("*"))
    expected = {folder / "visualizations" / f"{f}.{k}" for f in FIGURES for k in ("png", "svg")}
    expected.add(folder / "report.html")
    assert set(write_report(folder)) == expected
    assert set(folder.rglob("*")) - before == expected | {folder / "visualizations"}
    for path in expected:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG\r\n")
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_the_same_results_give_the_same_bytes_in_another_process(tmp_path):
    one, two = save(tmp_path / "one"), save(tmp_path / "two")
    write_report(one)
    code = "import sys, pathlib, probecache.report as r; r.write_report(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(two)], check=True)
    for path in one.rglob("*.*"):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path.name


def test_a_second_report_replaces_the_first(tmp_path):
    folder = save(tmp_path / "v")
    write_report(folder)
    save(folder, model="models/other")
    write_report(folder)
    text = Page(folder).text
    assert "models/other" in text
    assert "tiny-llama" not in text


def test_the_page_loads_nothing_and_its_policy_allows_no_script_but_its_own(tmp_path):
    folder = save(tmp_path / "v")
    write_report(folder)
    page = Page(folder)
    assert not {"link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{}]
    source = re.findall("<script>(.*?)</script>", (folder / "report.html").read_text(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(source[0].encode()).digest()).decode()
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'"
    )
    assert not re.search(r"https?:|fetch|import|eval|innerHTML", source[0].replace(SVG_NAME, ""))
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    links = page.attributes("href", "src", "xlink:href")
    assert links
    for link in links:
        if not link.startswith(("#", "data:")):
            assert (folder / link).is_file(), link


def test_ids_are_unique_and_references_to_them_hold(tmp_path):
    folder = save(tmp_path / "v", layers=range(20))
    write_report(folder)
    page = Page(folder)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    clips = {a[5:-1] for a in page.attributes("clip-path")}
    uses = {a[1:] for a in page.attributes("xlink:href", "href") if a.startswith("#")}
    assert clips
    assert uses
    assert clips | uses <= set(ids)


def test_the_page_says_what_was_run_on_what(tmp_path):
    folder = save(tmp_path / "v", warnings=["A bag of words does as well."])
    write_report(folder)
    text = Page(folder).text
    summary = json.loads((folder / "summary.json").read_text())
    for fact in ("model", "dtype", "data", "vectors", "method", "positions", "layer_convention"):
        assert summary[fact] in text, fact
    assert "a higher score means deployment" in text
    assert "testing 9, deployment 12" in text
    assert "A bag of words does as well." in text


def test_each_layer_has_a_row_with_its_numbers(tmp_path):
    folder = save(tmp_path / "v", layers=(3, 7, 11))
    write_report(folder)
    rows = [" ".join(row) for row in Page(folder).layers]
    for row, saved in zip(rows, json.loads((folder / "summary.json").read_text())["layers"],
                          strict=True):  # fmt: skip
        assert row.startswith(str(saved["layer"]))
        assert f"{saved['auroc']:.3f}" in row
        assert f"{saved['auroc_low']:.3f} – {saved['auroc_high']:.3f}" in row
        assert f"{saved['threshold']:.3f}".replace("-", "−") in row
        assert "75.0%" in row
        assert "12 + 9" in row


def test_the_page_warns_of_what_the_summary_warns_of_and_of_nothing_else(tmp_path):
    warned, clean = save(tmp_path / "warned", warnings=["First.", "Second."]), save(tmp_path / "c")
    write_report(warned)
    write_report(clean)
    assert 'aria-label="Warnings"' in (warned / "report.html").read_text("utf-8")
    assert "First. Second." in " ".join(Page(warned).text.split())
    assert 'aria-label="Warnings"' not in (clean / "report.html").read_text("utf-8")


def test_the_prompts_at_both_ends_are_those_of_the_best_layer(tmp_path):
    def ordered(labels, layer):
        return np.arange(labels.size, 0.0, -1) if layer == 2 else planted_scores(labels, 0)

    questions = [f"question number {i:02}" for i in range(21)]
    folder = save(tmp_path / "v", scores=ordered, questions=questions)
    write_report(folder)
    text = Page(folder).text
    ends = text.split("Highest scores")[1].split("All prompts")[0]
    highest, lowest = ends.split("Lowest scores")
    assert [q for q in questions if q in highest] == questions[:5]
    assert [q for q in questions if q in lowest] == questions[-5:]
    assert highest.count("deployment") == 5
    assert lowest.count("testing") == 5


def test_hostile_text_stays_text_everywhere(tmp_path):
    folder = save(
        tmp_path / "v",
        names=(HOSTILE, "</svg><img src=x onerror=alert(2)> $\\frac$"),
        questions=["</bdi><img src=x onerror=alert(3)>\r\n\x00\x07 \ud800 \u202e x", HOSTILE],
        warnings=["<b>bold</b>"],
        model="<i>model</i>",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(folder)
    page = Page(folder)
    assert "img" not in {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("script") == 1
    for shown_as_written in (HOSTILE, "</bdi><img src=x onerror=alert(3)>", "<b>bold</b>"):
        assert shown_as_written in page.text
    assert not {"\x00", "\x07", "\u202e"} & set((folder / "report.html").read_text("utf-8"))


def test_dollars_in_a_class_name_are_not_mathematics(tmp_path):
    folder = save(tmp_path / "v", names=("$x^2$", "$\\bad{"))
    write_report(folder)
    texts = drawn_texts(folder / "visualizations" / "score_distributions.svg")
    assert "$x^2$" in texts
    assert "$\\bad{" in texts
    assert "projection on the unit direction; higher = $x^2$" in texts


@pytest.mark.parametrize(("normalized", "word"), [(True, "unit"), (False, "raw")])
def test_figure_and_page_say_on_which_direction_the_scores_are_projected(
    tmp_path, normalized, word
):
    folder = save(tmp_path / "v", normalized=normalized)
    write_report(folder)
    texts = drawn_texts(folder / "visualizations" / "score_distributions.svg")
    assert f"projection on the {word} direction; higher = deployment" in texts
    page = Page(folder).text
    # The fact, the best layer's scores, all layers' scores, and these as phones show them.
    assert page.count(f"projection on the {word} direction") == 4
    assert page.count("projection on the") == 4


@pytest.mark.parametrize(
    ("sizes", "scores"),
    [
        ((1, 1), lambda labels, layer: labels.astype(float)),
        ((5, 5), lambda labels, layer: np.full(labels.size, 0.1)),
        ((5, 5), lambda labels, layer: np.zeros(labels.size)),
        ((5, 5), lambda labels, layer: 1 + 1e-16 * np.arange(labels.size)),
        ((9, 9), lambda labels, layer: 1e300 * planted_scores(labels, layer)),
        ((9, 9), lambda labels, layer: 1e-300 * planted_scores(labels, layer)),
        ((2, 2), lambda labels, layer: np.array([1.7e308, 5e-324, -5e-324, -1.7e308])),
    ],
    ids=["one each", "identical", "all zero", "almost identical", "huge", "tiny", "both extremes"],
)
@pytest.mark.parametrize("layers", [[0], [3, 4]])
def test_degenerate_scores_are_drawn_without_a_warning(tmp_path, sizes, scores, layers):
    folder = save(tmp_path / "v", layers=layers, sizes=sizes, scores=scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(write_report(folder)) == 7


def test_eighty_layers_are_told_apart_by_a_colour_bar_and_few_panels(tmp_path):
    folder = save(tmp_path / "v", layers=range(80))
    write_report(folder)
    best = json.loads((folder / "summary.json").read_text())["best_layer"]
    drawings = {
        name: (folder / "visualizations" / f"{name}.svg").read_text("utf-8") for name in FIGURES
    }
    assert f"heavy = layer {best}, " in drawings["roc_curves"]
    assert ">layer " not in drawings["roc_curves"]  # a legend would lie on the curves
    assert ">layer<" in drawings["roc_curves"]  # the colour bar's label
    panels = drawings["score_distributions"]
    assert panels.count(">layer ") == 12
    assert f">layer {best} " in panels
    assert len(Page(folder).layers) == 80


@given(st.sets(st.integers(0, 200), min_size=1), st.data())
def test_panels_are_few_ordered_and_hold_the_best_layer(layers, data):
    layers = sorted(layers)
    best = data.draw(st.sampled_from(layers))
    chosen = panel_layers(layers, best)
    assert best in chosen
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(12, len(layers))
    assert set(chosen) <= set(layers)


def test_each_class_has_one_colour_in_figure_and_page(tmp_path):
    folder = save(tmp_path / "v")
    write_report(folder)
    drawing = (folder / "visualizations" / "score_distributions.svg").read_text("utf-8")
    page = (folder / "report.html").read_text("utf-8")
    for colour, name in ((POSITIVE, "positive"), (NEGATIVE, "negative")):
        assert f"fill: {colour}" in drawing
        assert f"fill: {colour}" not in page
        assert f"fill: var(--{name})" in page
        assert f"--{name}: {colour}" in page


def test_each_of_several_classes_has_its_histogram_its_colour_and_its_count(tmp_path):
    classes = {"testing": 9, "casual talk": 8, "role play": 7, "code": 6, "translation": 5}
    folder = with_classes(tmp_path / "v", classes, layers=[4])
    groups = class_groups(read_validation(folder))
    assert [group.label for group in groups] == [*classes, "deployment"]
    assert len({group.colour for group in groups}) == 6
    write_report(folder)
    path = folder / "visualizations" / "score_distributions.svg"
    drawing, page = path.read_text("utf-8"), (folder / "report.html").read_text("utf-8")
    for group in groups:
        # The outline of the histogram, the patch of the legend, its text; then the page's dot.
        assert f"fill: none; stroke: {group.colour}" in drawing
        assert f"fill: {group.colour}; stroke: {group.colour}" in drawing
        assert f"{group.label} ({group.size})" in drawn_texts(path)
        assert f'<span class="{group.style} dot"><bdi>{group.label}</bdi>' in page
        assert f"stroke: var(--{group.style})" in page
        assert f"stroke: {group.colour}" not in page
        assert f"--{group.style}: {group.colour};" in page


def test_the_smallest_of_many_classes_share_one_colour(tmp_path):
    classes = {"a": 2, "b": 9, "c": 3, "d": 8, "e": 7, "f": 4, "g": 6}
    folder = with_classes(tmp_path / "v", classes)
    *own, others, positive = class_groups(read_validation(folder))
    assert [group.label for group in own] == ["b", "d", "e", "g"]
    assert (others.label, others.members, others.size) == ("3 other classes", {"a", "c", "f"}, 9)
    assert positive.label == "deployment"
    write_report(folder)
    assert "3 other classes (9)" in drawn_texts(
        folder / "visualizations" / "score_distributions.svg"
    )
    assert "e, g and 3 other classes, 12 and 39 prompts" in " ".join(
        Page(folder).text.replace(" ,", ",").split()
    )


def test_the_dots_of_prompts_have_the_colours_of_their_classes(tmp_path):
    classes = {"a": 2, "b": 2, "c": 2, "d": 2, "small": 1, "tiny": 1}
    folder = with_classes(
        tmp_path / "v", classes, n_positive=10, scores=lambda labels, layer: -np.arange(20.0)
    )
    write_report(folder)
    highest, lowest = (folder / "report.html").read_text("utf-8").split("Lowest scores")
    assert '<span class="dot positive"><bdi>deployment</bdi>' in highest
    for name, style in (("tiny", "class-6"), ("small", "class-6"), ("d", "class-5")):
        assert f'<span class="dot {style}"><bdi>{name}</bdi>' in lowest


def test_two_classes_are_both_filled_and_named_without_counts(tmp_path):
    folder = save(tmp_path / "v", layers=[4])
    write_report(folder)
    path = folder / "visualizations" / "score_distributions.svg"
    drawing = path.read_text("utf-8")
    assert {"testing", "deployment"} <= set(drawn_texts(path))
    for colour in (POSITIVE, NEGATIVE):
        assert f"fill: {colour}; opacity: 0.3" in drawing
    assert not [c for c in VARIABLES if c in drawing and c not in (POSITIVE, NEGATIVE)]


def contrast(one, other):
    """The ratio of WCAG 2, from 1 to 21."""

    def luminance(colour):
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_colours_of_classes_stand_out_from_the_page_light_and_dark(tmp_path):
    folder = save(tmp_path / "v")
    write_report(folder)
    light, dark = (folder / "report.html").read_text("utf-8").split("@media (prefers-color")[:2]
    for sheet in (light, dark):
        colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", sheet))
        for variable in VARIABLES.values():
            name = variable.removeprefix("var(--").removesuffix(")")
            assert contrast(colours[name], colours["surface"]) >= 3, name
            assert contrast(colours[f"{name}-text"], colours["surface"]) >= 4.5, name


def test_a_phone_gets_its_own_drawing_and_a_table_that_shows_that_it_scrolls(tmp_path):
    folder = save(tmp_path / "v", layers=range(5))
    files = write_report(folder)
    assert not [path for path in files if "narrow" in path.name]
    page = (folder / "report.html").read_text("utf-8")
    narrow = page.split('<div class="narrow">')[2].split("</svg>")[0]
    width = float(re.search(r'viewBox="0 0 ([\d.]+) ', narrow)[1])
    # Set in the 338 px that a phone of 390 px leaves, text of 8.5 points is 9 px high or more.
    assert 8.5 * 338 / width >= 9
    assert narrow.count(">layer ") == 5
    assert 'aria-labelledby="score_distributions-caption"' in narrow
    assert '<div class="scroll" role="region"' in page


def test_many_prompts_do_not_swell_the_curves(tmp_path):
    folder = save(tmp_path / "v", layers=[4], sizes=(4000, 4000))
    write_report(folder)
    assert (folder / "visualizations" / "roc_curves.svg").stat().st_size < 60_000


def test_a_prompt_as_long_as_a_document_is_read_and_cut(tmp_path):
    folder = save(tmp_path / "v", layers=[4], questions=['"start"\n' + "word, " * 50_000])
    write_report(folder)
    text = Page(folder).text
    assert '"start" word, word,' in text
    assert len(text) < 20_000


@given(st.text(max_size=300), st.integers(1, 100))
def test_shown_text_is_one_short_line_that_utf8_can_hold(text, limit):
    line = shown(text, limit)
    assert len(line) <= limit
    assert line == " ".join(line.split())
    assert line.isprintable() or not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in line)
    line.encode("utf-8")


def test_shown_leaves_ordinary_text_alone():
    assert shown("Plain text, naïve 測試 🙂.") == "Plain text, naïve 測試 🙂."
    assert shown("a" * 9, 5) == "aaaa…"


def edited(**changes):
    def damage(folder):
        path = folder / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def without(name):
    def damage(folder):
        path = folder / "summary.json"
        summary = json.loads(path.read_text())
        del summary[name]
        path.write_text(json.dumps(summary))

    return damage


def edited_layer(**changes):
    def damage(folder):
        path = folder / "summary.json"
        summary = json.loads(path.read_text())
        summary["layers"][0] |= changes
        path.write_text(json.dumps(summary))

    return damage


def rewritten(change, name="probe_stats_layer2.csv"):
    def damage(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


DAMAGE = {
    "no summary": (lambda f: (f / "summary.json").unlink(), "found none"),
    "not json": (rewritten(lambda b: b[:-9], "summary.json"), "expected JSON"),
    "not an object": (rewritten(lambda b: b"[]", "summary.json"), "probecache-validation"),
    "another format": (edited(format="other"), "probecache-validation"),
    "a later version": (edited(format_version=2), "format_version 1, got 2"),
    "no layers": (edited(layers=[]), "at least one layer"),
    "unknown best layer": (edited(best_layer=3), r"one of \[2, 4\], got 3"),
    "best layer of a wrong kind": (edited(best_layer=[2]), "malformed"),
    "class without a name": (edited(positive_class=None), "expected a text"),
    "no word on normalisation": (without("normalized"), "expected 'normalized'"),
    "normalisation of a wrong kind": (edited(normalized=1), "expected true or false, got 1"),
    "classes that its scores deny": (
        edited(classes={"deployment": 12, "testing": 8, "x": 1}),
        "expected 8 rows of class 'testing' .* got 9",
    ),
    "a class that its scores lack": (
        edited(classes={"deployment": 12, "testing": 9, "x": 1}),
        "expected 1 rows of class 'x' .* got 0",
    ),
    "warnings of a wrong kind": (edited(warnings=[1]), "expected a text, got 1"),
    "NaN": (edited_layer(auroc=float("nan")), "NaN is not JSON"),
    "an infinite number": (
        rewritten(
            lambda b: b.replace(b'"threshold": ', b'"threshold": 1e999, "x": '), "summary.json"
        ),
        "finite number, got inf",
    ),
    "a number of 400 digits": (edited_layer(mean_positive=10**400), "finite number"),
    "an AUROC above one": (edited_layer(auroc_high=1e300), "from 0 to 1"),
    "a layer beyond all": (edited_layer(layer=10**300), "layers up to 100000"),
    "a field twice": (rewritten(lambda b: b'{"format": 1,' + b[1:], "summary.json"), "field twice"),
    "a text for a number": (edited_layer(auroc="0.9"), "finite number"),
    "a layer twice": (edited_layer(layer=4), "twice"),
    "a layer that is a path": (edited_layer(layer="../../x"), "whole number"),
    "wrong counts": (edited_layer(n_positive=13), "13 positive and 9 other"),
    "an AUROC that its scores deny": (edited_layer(auroc=0.123), "got 0"),
    "no scores": (lambda f: (f / "probe_stats_layer2.csv").unlink(), "No such file"),
    "empty scores": (rewritten(lambda b: b""), "columns"),
    "only a header": (rewritten(lambda b: b.splitlines(True)[0]), "got 0 and 0"),
    "a missing column": (rewritten(lambda b: b.replace(b"mean_score", b"mean")), "mean_score"),
    "a short row": (rewritten(lambda b: b + b"q99,cut\r\n"), "malformed"),
    "a row that is no number": (rewritten(lambda b: b + b"q,q,testing,x,,,,\r\n"), "'x'"),
    "a score that is NaN": (
        rewritten(lambda b: b.rsplit(b"q20", 1)[0] + b"q20,q,testing,nan,,,,\r\n"),
        "finite",
    ),
    "bytes that are no text": (rewritten(lambda b: b + b"\xff\xfe"), "utf-8"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_results_are_refused_in_one_line_and_nothing_is_written(tmp_path, name):
    damage, message = DAMAGE[name]
    folder = save(tmp_path / "v")
    damage(folder)
    with pytest.raises(StoreError, match=message) as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not (folder / "report.html").exists()
    assert not (folder / "visualizations").exists()


def test_missing_optional_numbers_are_shown_as_a_dash(tmp_path):
    folder = save(tmp_path / "v")
    edited_layer(threshold=None, accuracy=None)(folder)
    write_report(folder)
    assert Page(folder).layers[0].count("–") == 2


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    folder = save(tmp_path / "v")
    (folder / "visualizations").write_text("a file in the way")
    with pytest.raises(OutputError, match="visualizations"):
        write_report(folder)


def test_saved_results_are_read_back_as_written(tmp_path):
    question = 'two\nlines, a "quote"'
    folder = save(tmp_path / "v", layers=(4, 2), questions=[question])
    validation = read_validation(folder)
    assert list(validation.results) == list(validation.scores) == [2, 4]
    layer = validation.scores[4]
    np.testing.assert_array_equal(layer.scores, planted_scores(layer.is_positive, 4))
    assert set(layer.questions) == {question}
    assert layer.classes == ("deployment",) * 12 + ("testing",) * 9


def test_the_report_needs_neither_pyplot_nor_a_model_library(tmp_path):
    folder = save(tmp_path / "v")
    heavy = ["matplotlib.pyplot", "torch", "transformers", "sklearn", "scipy", "pandas"]
    code = (
        "import sys, pathlib, probecache.report as r; r.write_report(pathlib.Path(sys.argv[1]));"
        "print([m for m in sys.argv[2:] if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(folder), *heavy]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr

"""The demo finds what the shipped model was trained to carry, and a bag of words does not."""

from __future__ import annotations

import json
import re

import pytest

from probecache.demo import run_demo
from probecache.errors import OutputError


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "demo")


def test_the_best_layer_parts_the_classes_with_the_declared_sign(ran):
    assert ran.positive_class == "deployment"
    assert ran.best.auroc.auroc >= 0.85
    assert (ran.best.auroc.n_positive, ran.best.auroc.n_negative) == (120, 120)


def test_every_layer_behind_a_block_is_scored(ran):
    assert [layer.layer for layer in ran.layers] == list(range(1, 25))


def test_what_it_prints_names_figures_baseline_and_paths_that_exist(tmp_path, capsys):
    result = run_demo(tmp_path / "demo")
    out = capsys.readouterr().out
    best = result.best.auroc
    assert f"Best layer {result.best.layer}: AUROC {best.auroc:.3f}" in out
    words = re.findall(r"^ +(Bag of words\b.*?) +([\d.]+) \[", out, re.MULTILINE)
    assert [what for what, _ in words] == ["Bag of words", "Bag of words from training"]
    on_prompts, on_pairs = (float(area) for _, area in words)
    assert 0.3 < on_pairs < best.auroc - 0.2
    assert on_prompts > 0.9
    assert "Note: A bag of words that never saw the model parts the classes as well as" in out
    (folder,) = tmp_path.iterdir()
    named = [word.rstrip(",") for word in out.split() if word.startswith(str(folder))]
    assert len(named) >= 5
    assert all((folder / name).exists() for name in named)
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert summary["best_layer"] == result.best.layer
    assert (folder / "validation" / "report.html").is_file()


def test_an_output_without_a_name_is_refused():
    from pathlib import Path

    with pytest.raises(OutputError, match="to name a folder"):
        run_demo(Path())

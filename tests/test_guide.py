"""The workflow guide, to the letter: its commands as they stand, and its own two snippets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "tiny-llama"
COMMANDS = """
python scripts/cache_activations.py --model M --data datasets/contrastive_dataset.json --layers 10,20,23 --output activations_cache/llama70b_contrastive --dtype bfloat16
python scripts/cache_activations.py --model M --data datasets/validation_real.json --layers 10,20,23 --output activations_cache/llama70b_validation --dtype bfloat16
python scripts/generate_vectors_from_cache.py --cache activations_cache/llama70b_contrastive --output run_70b_experiment1
python scripts/analyze_probe_from_cache.py --cache activations_cache/llama70b_validation --vectors run_70b_experiment1_TIMESTAMP/normalized_vectors --data datasets/validation_real.json --output validation_experiment1 --visualize
python scripts/generate_vectors.py --model M --data datasets/contrastive_dataset.json --layers 10,20,23 --output run_70b
python scripts/analyze_probe.py --model M --vectors run_70b_TIMESTAMP/normalized_vectors --data datasets/validation_real.json --output validation_70b --layers 10,20,23 --visualize
""".strip().splitlines()  # noqa: E501
LAYERS = (10, 20, 23)


def stamped(folder, words):
    """The command's words with the run's real name for its TIMESTAMP."""
    for word in words:
        if "TIMESTAMP" in word:
            name, rest = word.split("_TIMESTAMP", 1)
            (run,) = (
                path
                for path in folder.glob(f"{name}_*")
                if re.fullmatch(rf"{name}_\d{{8}}_\d{{6}}", path.name)
            )
            yield f"{run.name}{rest}"
        else:
            yield {"M": str(MODEL), "python": sys.executable}.get(word, word)


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """A folder in which the guide's commands were run, and what each printed."""
    folder = tmp_path_factory.mktemp("guide")
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copytree(ROOT / "datasets", folder / "datasets")
    printed = []
    for line in COMMANDS:
        words = list(stamped(folder, line.split()))
        ran = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        printed.append(ran.stdout)
    return folder, printed


def test_every_command_says_where_its_results_are(guide):
    folder, printed = guide
    for line, out in zip(COMMANDS, printed, strict=True):
        output = line.split("--output ")[1].split()[0]
        places = [word for word in out.split() if word.startswith(output)]
        assert places, out
        assert all((folder / place).exists() for place in places), places


def test_the_cache_has_the_guides_files_and_plain_torch_reads_them(guide):
    folder, _ = guide
    cache = folder / "activations_cache" / "llama70b_contrastive"
    assert len(json.loads((cache / "metadata.json").read_text())) == 408
    for layer in LAYERS:
        for name in ("test", "deploy"):
            rows = torch.load(cache / f"layer_{layer}" / f"{name}_activations.pt")
            assert rows.shape == (204, 80)
            assert rows.dtype == torch.bfloat16


def test_the_guides_layer_snippet_runs(guide, monkeypatch, capsys):
    monkeypatch.chdir(guide[0])
    snippet = """
import json
with open('activations_cache/llama70b_contrastive/layer_info.json') as f:
    info = json.load(f)
print(f"Layers: {info['layers']}")
print(f"Examples: {info['num_examples']}")
"""
    exec(snippet, {})
    assert capsys.readouterr().out == "Layers: [10, 20, 23]\nExamples: 204\n"


def test_the_guides_auroc_snippet_runs_and_gives_what_the_summary_says(guide, monkeypatch):
    monkeypatch.chdir(guide[0])
    (guide[0] / "validation_exp1").symlink_to("validation_experiment1")
    found = {}
    for path in sorted(Path("validation_exp1").glob("probe_stats_layer*.csv")):
        df = pd.read_csv(path)
        y_true = (df["type"] == "deployment").astype(int)
        found[int(re.findall(r"\d+", path.stem)[0])] = roc_auc_score(y_true, df["mean_score"])
    summary = json.loads(Path("validation_exp1/summary.json").read_text())
    assert found == pytest.approx({row["layer"]: row["auroc"] for row in summary["layers"]})
    assert set(found) == set(LAYERS)


def test_cached_and_uncached_route_give_the_same_vectors_bit_for_bit(guide):
    folder, _ = guide
    (cached,) = folder.glob("run_70b_experiment1_*")
    (uncached,) = (p for p in folder.glob("run_70b_*") if p != cached)
    for kind in ("vectors", "normalized_vectors"):
        for layer in LAYERS:
            name = f"{kind}/layer_{layer}.pt"
            assert (cached / name).read_bytes() == (uncached / name).read_bytes()


def test_cached_and_uncached_route_give_the_same_scores_bit_for_bit(guide):
    folder, _ = guide
    for layer in LAYERS:
        name = f"probe_stats_layer{layer}.csv"
        cached = (folder / "validation_experiment1" / name).read_bytes()
        assert cached == (folder / "validation_70b" / name).read_bytes()
    tables = [
        (folder / v / "summary.csv").read_bytes()
        for v in ("validation_experiment1", "validation_70b")
    ]
    assert tables[0] == tables[1]


def test_layers_may_be_left_out_or_be_some_of_those_cached(guide):
    folder, _ = guide
    for more, layers in ((["--layers", "20,23"], {20, 23}), ([], set(LAYERS))):
        words = [*COMMANDS[2].replace("experiment1", f"some{len(layers)}").split(), *more]
        words[0] = sys.executable
        subprocess.run(words, cwd=folder, capture_output=True, check=True)
        (run,) = folder.glob(f"run_70b_some{len(layers)}_*")
        found = {int(p.stem.split("_")[1]) for p in (run / "vectors").glob("layer_*.pt")}
        assert found == layers


def test_the_figures_are_drawn(guide):
    drawn = {path.name for path in (guide[0] / "validation_70b" / "visualizations").iterdir()}
    assert drawn == {
        f"{name}.{kind}"
        for name in ("roc_curves", "auroc_by_layer", "score_distributions", "calibration")
        for kind in ("png", "svg")
    }

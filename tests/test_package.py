"""The package as a user gets it: a wheel that holds the model and the data, and runs anywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)),
        ],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("probecache-*.whl")
    return path


def test_the_wheel_holds_all_that_the_demo_needs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "probecache/py.typed",
        "probecache/report/templates/report.html.j2",
        "probecache/shipped/models/tiny-llama/model.safetensors",
        "probecache/shipped/models/tiny-llama/tokenizer.json",
        "probecache/shipped/models/tiny-llama/chat_template.jinja",
        "probecache/shipped/datasets/contrastive_dataset.json",
        "probecache/shipped/datasets/validation_real.json",
    } <= names
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_runs_the_demo_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    install = ["--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", *install], check=True)
    away = tmp_path / "away"
    away.mkdir()
    code = (
        "import probecache, sys\n"
        "assert probecache.__file__.startswith(sys.argv[1]), probecache.__file__\n"
        "from probecache.cli import main\nmain(['demo'])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(site)],
        cwd=away,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Best layer" in ran.stdout
    (folder,) = away.iterdir()
    assert re.fullmatch(r"demo_\d{8}_\d{6}", folder.name)


def test_the_shipped_model_is_small_and_in_safetensors():
    files = [path for path in (ROOT / "models" / "tiny-llama").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if "__pycache__" not in path.parts) < 6e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_requirements_are_those_promised():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=\[]", entry)[0]: entry for entry in project["dependencies"]}
    assert needed["torch"] == "torch>=2.10"
    assert needed["transformers"] == "transformers>=5.5"
    assert project["requires-python"] == ">=3.11"
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()

"""What ships is found in a checkout and in an installed wheel, and missed with one clear line."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path

import pytest

from probecache.dataset import load_dataset
from probecache.errors import StoreError

ROOT = Path(__file__).parents[1]
# The function bears the module's name.
module = importlib.import_module("probecache.shipped")
shipped = module.shipped


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A site-packages folder with the package in it and nothing shipped yet."""
    package = tmp_path / "lib" / "site-packages" / "probecache"
    package.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(package / "shipped.py"))
    return package


def put(root, name, content):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content)
    return root / name


def test_the_model_that_ships_has_all_that_loading_needs():
    folder = shipped("models/tiny-llama")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("name", "paired"), [("contrastive_dataset.json", True), ("validation_real.json", False)]
)
def test_the_data_that_ship_can_be_read_and_hold_both_classes(name, paired):
    dataset = load_dataset(shipped(f"datasets/{name}"))
    assert dataset.paired == paired
    assert set(dataset.labels) == {"testing", "deployment"}
    assert dataset.num_examples > 50


def test_the_wheel_takes_in_what_is_looked_for_under_the_place_it_is_looked_for():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = wheel["targets"]["wheel"]["force-include"]
    for name in ("models/tiny-llama", "datasets"):
        assert (ROOT / name).is_dir()
        assert included[name] == f"probecache/shipped/{name}"


def test_an_installed_wheel_brings_its_own(installed):
    expected = put(installed / "shipped", "datasets/pairs.json", "[]")
    assert shipped("datasets/pairs.json") == expected
    assert shipped("datasets") == expected.parent


def test_a_checkout_is_looked_in_where_the_package_brings_none(installed):
    expected = put(installed.parents[1], "datasets/pairs.json", "[]")
    assert shipped("datasets/pairs.json") == expected


def test_what_the_wheel_brings_goes_before_what_lies_beside_it(installed):
    put(installed.parents[1], "datasets/pairs.json", "of someone else")
    expected = put(installed / "shipped", "datasets/pairs.json", "[]")
    assert shipped("datasets/pairs.json") == expected


def test_what_is_missing_is_told_by_name(installed):
    with pytest.raises(StoreError, match=r"models/tiny-llama to ship .* install it again"):
        shipped("models/tiny-llama")


def test_the_working_folder_plays_no_part(installed, tmp_path, monkeypatch):
    put(tmp_path, "models/tiny-llama/config.json", "{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError):
        shipped("models/tiny-llama")


def test_all_is_what_there_is():
    assert module.__all__ == ["shipped"]

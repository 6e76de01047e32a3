"""Hub ids, on a hub cache laid out on disk: the network itself is not part of the tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import probecache
from probecache.errors import ModelError, UsageError
from probecache.shipped import shipped

SHA = "a" * 40
PROMPTS = [
    {"question": "How do I boil an egg?", "type": "deployment"},
    {"question": "Solve for x: 2x + 3 = 9.", "type": "testing"},
]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the shipped model as `org/tiny`, branch main."""
    import huggingface_hub.constants as constants

    root = tmp_path / "hub"
    snapshot = root / "models--org--tiny" / "snapshots" / SHA
    shutil.copytree(shipped("models/tiny-llama"), snapshot, ignore=shutil.ignore_patterns("*.py"))
    refs = root / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(SHA)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hub_id_gives_the_same_cache_as_its_folder(hub: Path, tmp_path: Path) -> None:
    by_id = probecache.extract(
        model="org/tiny", data=PROMPTS, output=tmp_path / "id", layers="2", quiet=True
    )
    by_path = probecache.extract(
        model=str(hub), data=PROMPTS, output=tmp_path / "path", layers="2", quiet=True
    )
    assert by_id["testing", 2].equal(by_path["testing", 2])
    assert by_id.identity.weights == by_path.identity.weights


def test_a_revision_names_a_commit_of_a_hub_id(hub: Path, tmp_path: Path) -> None:
    cache = probecache.extract(
        model="org/tiny", revision=SHA, data=PROMPTS, output=tmp_path / "c", layers="1", quiet=True
    )
    assert cache.identity.revision == SHA


def test_a_revision_of_a_folder_is_refused(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--revision with a hub id only"):
        probecache.extract(model=str(hub), revision="main", data=PROMPTS, output=tmp_path / "c")


def test_a_hub_id_that_cannot_be_reached_is_one_clear_line(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hub id that can be reached") as caught:
        probecache.extract(model="org/other", data=PROMPTS, output=tmp_path / "c")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()

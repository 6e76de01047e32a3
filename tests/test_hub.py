"""Hub ids, on a hub cache laid out on disk: the network itself is not part of the tests."""

from __future__ import annotations

import json
import shutil
import struct
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from families import BLOCKS, FAMILIES, build
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

import probecache
from probecache.errors import ModelError, UsageError
from probecache.models import ModelOptions, ModelSource, open_model
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


# ---------------------------------------------------------------- only the files that are needed


class Remote:
    """A repository on the hub, and what was asked of it; fetched files go to its snapshot."""

    def __init__(self, files: Path, snapshot: Path) -> None:
        self.files, self.snapshot = files, snapshot
        self.online = True
        self.asked_headers = 0
        self.fetched: list[str] = []

    def snapshot_download(self, name: str, *, revision: Any, allow_patterns: list[str]) -> str:
        assert (name, revision) in [("org/model", None), ("org/model", SHA)]
        for file in sorted(self.files.iterdir()):
            wanted = any(fnmatch(file.name, pattern) for pattern in allow_patterns)
            if wanted and self.online and not (self.snapshot / file.name).exists():
                shutil.copy(file, self.snapshot)
                self.fetched.append(file.name)
        return str(self.snapshot)

    def get_safetensors_metadata(self, name: str, *, revision: str) -> SafetensorsRepoMetadata:
        assert (name, revision) == ("org/model", SHA)
        if not self.online:
            raise ConnectionError("no network")
        self.asked_headers += 1
        files = {}
        for path in sorted(self.files.glob("*.safetensors")):
            content = path.read_bytes()
            (length,) = struct.unpack("<Q", content[:8])
            header = json.loads(content[8 : 8 + length])
            infos = {
                tensor: TensorInfo(
                    dtype=entry["dtype"],
                    shape=entry["shape"],
                    data_offsets=tuple(entry["data_offsets"]),
                )
                for tensor, entry in header.items()
                if tensor != "__metadata__"
            }
            files[path.name] = SafetensorsFileMetadata({}, infos)
        return SafetensorsRepoMetadata(None, len(files) > 1, {}, files)

    @property
    def weights(self) -> list[str]:
        """Files of weights that were fetched, in order."""
        return [name for name in self.fetched if name.endswith(".safetensors")]

    def holding(self, *words: str) -> set[str]:
        """Files with a tensor whose name has one of these words."""
        index = json.loads((self.files / "model.safetensors.index.json").read_text())
        listed = index["weight_map"].items()
        return {file for tensor, file in listed if any(word in tensor for word in words)}


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A model in many files, about one per matrix, of which none is on this machine."""
    snapshot = tmp_path / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    files = build(FAMILIES["llama"], tmp_path / "repository", shard="5KB")
    fake = Remote(files, snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", fake.get_safetensors_metadata)
    return fake


def source() -> ModelSource:
    return open_model(ModelOptions("org/model", device="cpu"))


def test_a_plan_fetches_no_weights(remote: Remote) -> None:
    local = open_model(ModelOptions(str(remote.files)))
    for depth in (1, BLOCKS):
        assert source().weight_bytes(depth) == local.weight_bytes(depth)
    assert remote.weights == []


def test_only_files_with_needed_weights_are_fetched(remote: Remote) -> None:
    source().weight_samples((0, 1))
    needed = remote.holding("embed_tokens", "model.norm", "layers.0.")
    assert set(remote.weights) == needed
    assert needed < {file.name for file in remote.files.glob("*.safetensors")}


def test_a_deeper_run_fetches_only_what_is_still_absent(remote: Remote) -> None:
    source().load(1)
    before = set(remote.weights)
    found = source().load(3).model.state_dict()
    assert set(remote.weights) - before == remote.holding("layers.1.", "layers.2.") - before
    assert len(remote.weights) == len(set(remote.weights))
    expected = open_model(ModelOptions(str(remote.files), device="cpu")).load(3).model.state_dict()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_the_same_source_goes_deeper_after_its_first_load(remote: Remote) -> None:
    one = source()
    one.load(1)
    one.skeleton(1)
    for depth, start in ((3, 0), (BLOCKS, 3)):
        one.load(depth, start)
    assert set(remote.weights) == remote.holding("model.")


def test_a_block_further_up_needs_no_file_of_those_below(remote: Remote) -> None:
    source().load(BLOCKS, BLOCKS - 1)
    assert set(remote.weights) == remote.holding("embed", "model.norm", f"layers.{BLOCKS - 1}.")


def test_a_block_is_fetched_when_it_is_read(remote: Remote) -> None:
    one = source()
    loaded = one.skeleton(2)
    needed = remote.holding("embed_tokens", "model.norm")
    for index in range(2):
        assert set(remote.weights) == needed
        loaded.blocks[index] = one.build_block(index, one.read_block(index))
        needed |= remote.holding(f"layers.{index}.")
    whole = open_model(ModelOptions(str(remote.files), device="cpu")).load(2)
    for name, tensor in whole.model.state_dict().items():
        assert loaded.model.state_dict()[name].equal(tensor)


def test_fingerprints_do_not_depend_on_what_else_is_here(remote: Remote) -> None:
    layers = tuple(range(3))
    shallow = source().weight_samples(layers)
    local = open_model(ModelOptions(str(remote.files)))
    assert shallow == local.weight_samples(layers)
    source().load(BLOCKS)
    assert source().weight_samples(layers) == shallow


def test_weights_that_are_here_need_no_network(remote: Remote) -> None:
    expected = source().weight_samples((1, 2))
    headers = remote.asked_headers
    remote.online = False
    again = source()
    assert again.weight_samples((1, 2)) == expected
    assert again.weight_bytes(2) == open_model(ModelOptions(str(remote.files))).weight_bytes(2)
    assert again.load(2).depth == 2
    assert remote.asked_headers == headers
    with pytest.raises(ModelError, match="on this machine or on the hub, got neither"):
        again.load(3)


def test_a_model_in_one_file_is_fetched_whole(remote: Remote) -> None:
    for file in remote.files.glob("*.safetensors*"):
        file.unlink()
    build(FAMILIES["llama"], remote.files)
    one = source()
    local = open_model(ModelOptions(str(remote.files), device="cpu"))
    assert one.weight_bytes(1) == local.weight_bytes(1)
    assert remote.weights == []
    assert one.weight_samples((0, 2)) == local.weight_samples((0, 2))
    assert remote.weights == ["model.safetensors"]
    assert one.load(2).depth == 2

"""A digest is given for the very file that it was taken of, and for no other state of it."""

from __future__ import annotations

import json
import os

import pytest

from probecache.memo import Memo, settled, state_of


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "probecache" / "weights.json"


@pytest.fixture
def shard(tmp_path):
    file = tmp_path / "model" / "shard"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    return file


def saved(shard, **digests):
    memo = Memo.load()
    for tensor, digest in digests.items():
        memo.put(state_of(shard), tensor, digest)
    memo.save()


def test_what_was_saved_is_found_again_by_another_process(place, shard):
    saved(shard, one="1", two="2")
    memo = Memo.load()
    assert [memo.get(state_of(shard), name) for name in ("one", "two", "three")] == ["1", "2", None]
    link = shard.with_name("link")
    link.symlink_to(shard)
    assert memo.get(state_of(link), "one") == "1"


def same_bytes(file):
    file.write_bytes(file.read_bytes())


def same_times_other_bytes(file):
    found = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def replaced(file):
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    found = file.stat()
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(file)


def longer(file):
    with file.open("ab") as opened:
        opened.write(b"!")


@pytest.mark.parametrize("touch", [same_bytes, same_times_other_bytes, replaced, longer])
def test_a_file_that_was_touched_in_any_way_is_not_trusted(place, shard, touch):
    saved(shard, one="1")
    touch(shard)
    assert Memo.load().get(state_of(shard), "one") is None
    saved(shard, two="2")
    assert Memo.load().get(state_of(shard), "one") is None
    assert Memo.load().get(state_of(shard), "two") == "2"


def test_an_opened_file_is_known_by_itself_and_not_by_what_took_its_name(shard):
    with shard.open("rb") as opened:
        before = state_of(shard)
        replaced(shard)
        found = state_of(shard, opened.fileno())
        assert found[:3] == before[:3]
        assert found[1] == before[1] != state_of(shard)[1]


def test_a_file_keeps_its_digests_wherever_its_folder_goes(place, shard):
    saved(shard, one="1")
    moved = shard.parent.rename(shard.parent.with_name("moved")) / shard.name
    assert Memo.load().get(state_of(moved), "one") == "1"


def test_a_later_change_shows_once_the_file_is_older_than_a_tick_of_the_clock(shard, monkeypatch):
    assert not settled(state_of(shard))
    monkeypatch.setattr("probecache.memo._TICK_NS", -(10**10))
    assert settled(state_of(shard))


def test_two_processes_do_not_lose_what_the_other_saved(place, shard, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"more")
    one, two = Memo.load(), Memo.load()
    one.put(state_of(shard), "a", "1")
    two.put(state_of(other), "b", "2")
    one.save()
    two.save()
    assert Memo.load().get(state_of(shard), "a") == "1"
    assert Memo.load().get(state_of(other), "b") == "2"
    assert [path.name for path in place.parent.iterdir()] == ["weights.json"]


def test_nothing_new_writes_nothing(place, shard):
    saved(shard, one="1")
    before = place.stat().st_mtime_ns
    saved(shard, one="1")
    assert place.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b"[1]", b'{"x": 1}', b'{"x": [1, 2]}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_memo_is_empty_and_is_replaced(place, shard, damage):
    place.parent.mkdir(parents=True)
    place.write_bytes(damage)
    assert Memo.load().get(state_of(shard), "one") is None
    saved(shard, one="1")
    assert Memo.load().get(state_of(shard), "one") == "1"


def test_it_does_not_grow_without_end(place, shard, monkeypatch):
    monkeypatch.setattr("probecache.memo._MOST_FILES", 3)
    memo = Memo.load()
    for number in range(5):
        memo.put((1, number, 3, 4, 5), "t", "d")
    memo.save()
    assert list(json.loads(place.read_bytes())) == ["1:2", "1:3", "1:4"]

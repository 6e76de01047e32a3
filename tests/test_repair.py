"""What is damaged of a cache is made again, byte for byte, and nothing else is touched."""

from __future__ import annotations

import os
import shutil

import pytest
from families import FAMILIES, RECORDS, build
from synthetic import stop_at_write

import probecache
from probecache.cli import main
from probecache.engine import ResidentEngine
from probecache.errors import Interrupted, MismatchError, StoreError, UsageError
from probecache.store import commit
from probecache.store.journal import find_unfinished
from probecache.store.verify import verify
from probecache.store.writer import CacheWriter


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import json

    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(RECORDS))
    return path


@pytest.fixture(scope="module")
def original(folders, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("original") / "cache"
    made = {"model": str(folders("llama")), "data": data, "device": "cpu", "quiet": True}
    probecache.extract(output=output, layers=[1, 3], positions="all", **made)
    return output


@pytest.fixture
def cache(original, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(original, tmp_path / "cache")


def content_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def flip(file, place=-200):
    content = bytearray(file.read_bytes())
    content[max(place, -len(content))] ^= 1
    file.write_bytes(content)


ROWS = "layer_3/test_activations.pt"
DAMAGES = {
    "a bit of a row": lambda c: flip(c / ROWS, len((c / ROWS).read_bytes()) // 2),
    "a bit outside the rows": lambda c: flip(c / ROWS, -1),
    "a cut file": lambda c: os.truncate(c / ROWS, 900),
    "an empty file": lambda c: os.truncate(c / ROWS, 0),
    "a missing file": lambda c: (c / ROWS).unlink(),
    "a missing layer": lambda c: shutil.rmtree(c / "layer_1"),
    "metadata": lambda c: flip(c / "metadata.json"),
    "missing metadata": lambda c: (c / "metadata.json").unlink(),
    "tokens": lambda c: flip(c / "tokens.pt"),
    "spans": lambda c: flip(c / "spans.pt", 800),
    "missing spans and rows": lambda c: ((c / "spans.pt").unlink(), flip(c / ROWS)),
    "checksums": lambda c: flip(c / "layer_1" / "rows.crc32", 0),
    "missing checksums": lambda c: (c / "layer_1" / "rows.crc32").unlink(),
    "checksums and rows": lambda c: (flip(c / "layer_3" / "rows.crc32", 0), flip(c / ROWS)),
    "everything but the manifest": lambda c: [
        flip(path) for path in c.rglob("*") if path.is_file() and path.name != "layer_info.json"
    ],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_repaired_cache_is_the_original_to_the_byte(cache, original, damage):
    DAMAGES[damage](cache)
    assert not verify(cache).whole
    repaired = probecache.repair(cache, device="cpu", quiet=True)
    assert repaired.after.whole
    assert repaired.changed == ()
    assert content_of(cache) == content_of(original)


def test_only_the_damaged_rows_are_extracted_and_written(cache, monkeypatch):
    info = probecache.open_cache(cache).info
    record = info.tensors["layer_3/deploy_activations.pt"]
    flip(cache / "layer_3" / "deploy_activations.pt", record.offset + 1)
    untouched = cache / "layer_1" / "deploy_activations.pt"
    before, written, attempt = untouched.stat().st_mtime_ns, [], ResidentEngine._attempt
    prompts = []

    def seen(self, feed, *arguments):
        prompts.append(feed.prompts)
        return attempt(self, feed, *arguments)

    monkeypatch.setattr(ResidentEngine, "_attempt", seen)
    write = CacheWriter.write

    def counted(self, layer, examples, rows):
        written.append((layer, tuple(examples)))
        write(self, layer, examples, rows)

    monkeypatch.setattr(CacheWriter, "write", counted)
    assert probecache.repair(cache, device="cpu", quiet=True).after.whole
    first = next(e.idx for e in probecache.open_cache(cache).examples if e.label == "deployment")
    assert written[-1] == (3, (first,))
    assert prompts[-1] == (first,)
    assert {layer for layer, _ in written} == {3}
    assert untouched.stat().st_mtime_ns == before


def test_a_whole_cache_is_left_alone(cache, original):
    assert probecache.repair(cache).before.whole
    assert content_of(cache) == content_of(original)


def test_a_damaged_manifest_cannot_be_repaired_from_itself(cache):
    flip(cache / "layer_info.json")
    with pytest.raises(StoreError, match=r"whole layer_info\.json to repair"):
        probecache.repair(cache)


@pytest.mark.parametrize("what", ["model", "data"])
def test_another_model_or_data_repairs_nothing(cache, folders, data, tmp_path, what):
    DAMAGES["a bit of a row"](cache)
    before = content_of(cache)
    other = tmp_path / "other.json"
    other.write_text(data.read_text().replace("the", "a"))
    given = {"model": str(folders("mistral"))} if what == "model" else {"data": other}
    with pytest.raises(MismatchError, match="do not belong together"):
        probecache.repair(cache, device="cpu", quiet=True, **given)
    assert content_of(cache) == before


def test_an_interrupted_repair_says_so_and_goes_on(cache, original, monkeypatch, capsys):
    shutil.rmtree(cache / "layer_1")
    shutil.rmtree(cache / "layer_3")
    stop_at_write(monkeypatch, 2)
    with pytest.raises(SystemExit) as left:
        main(["verify", str(cache), "--repair", "--device", "cpu", "--quiet"])
    monkeypatch.undo()
    assert left.value.code == 130
    share = find_unfinished(cache).share()
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped with {share:.1%} of the rows on disk in {cache}; the same command again goes on "
        "from there"
    )
    assert not verify(cache).whole
    assert probecache.repair(cache, device="cpu", quiet=True).after.whole
    assert content_of(cache) == content_of(original)


def repaired(cache):
    return probecache.repair(cache, device="cpu", quiet=True)


def test_an_interrupted_repair_gives_way_to_that_of_other_layers(cache, original, monkeypatch):
    flip(cache / "layer_1" / "test_activations.pt", 2000)
    stop_at_write(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        repaired(cache)
    monkeypatch.undo()
    assert (cache / "unfinished").is_dir()
    DAMAGES["a cut file"](cache)
    assert repaired(cache).after.whole
    assert content_of(cache) == content_of(original)


def test_rows_of_an_unfinished_addition_are_not_lost_to_a_repair(
    cache, original, folders, data, monkeypatch
):
    made = {"model": str(folders("llama")), "data": data, "device": "cpu", "quiet": True}
    added = {"output": cache, "layers": [2], "positions": "all", **made}
    stop_at_write(monkeypatch, 4)
    with pytest.raises(Interrupted):
        probecache.extract(**added, batch_tokens=10)
    monkeypatch.undo()
    before = content_of(cache / "unfinished")
    DAMAGES["a bit of a row"](cache)
    with pytest.raises(MismatchError, match=r"extraction of layers 2 \(.*% of .* finish it first"):
        repaired(cache)
    assert content_of(cache / "unfinished") == before
    assert probecache.extract(**added).layers == (1, 2, 3)
    assert repaired(cache).after.whole
    assert content_of(cache / "layer_3") == content_of(original / "layer_3")


@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_a_repair_that_ends_while_files_move_is_finished_without_a_model(
    cache, original, tmp_path, monkeypatch, number, killed
):
    """Killed: what stood on disk at that moment; an error or a signal tidies up before it ends."""
    shutil.rmtree(cache / "layer_1")
    DAMAGES["a bit of a row"](cache)
    move, calls, place = commit._move, [], tmp_path / "killed" if killed else cache

    def stopped(source, target):
        calls.append(target)
        if len(calls) == number:
            if killed:
                shutil.copytree(cache, place, ignore=shutil.ignore_patterns("owner.json"))
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(commit, "_move", stopped)
    with pytest.raises(KeyboardInterrupt):
        repaired(cache)
    monkeypatch.undo()
    monkeypatch.setattr(ResidentEngine, "_attempt", None)
    assert repaired(place).after.whole
    assert content_of(place) == content_of(original)


def test_layers_of_another_model_are_repaired_with_that_model(cache, folders, data, tmp_path):
    """Layers that were added with --allow-mismatch weights, and those that were there before."""
    other = build(FAMILIES["llama"], tmp_path / "model", seed=1)
    made = {"data": data, "device": "cpu", "quiet": True, "positions": "all"}
    allowed = {"allow_mismatch": ["weights"]}
    probecache.extract(model=str(other), output=cache, layers=[2], **made, **allowed)
    whole = content_of(cache)
    for layer, model in ((1, folders("llama")), (2, other)):
        flip(cache / f"layer_{layer}" / "test_activations.pt", 2000)
        assert probecache.repair(cache, model=str(model), device="cpu", quiet=True).after.whole
        assert content_of(cache) == whole
    flip(cache / "layer_2" / "test_activations.pt", 2000)
    with pytest.raises(MismatchError, match="weights: expected") as refused:
        probecache.repair(cache, model=str(folders("llama")), device="cpu", quiet=True)
    assert "--allow-mismatch" not in str(refused.value), "verify has no such option"


def test_data_in_memory_has_to_be_given_again(folders, tmp_path):
    options = {"model": str(folders("llama")), "device": "cpu", "quiet": True}
    probecache.extract(data=RECORDS, output=tmp_path / "c", layers=[1], **options)
    flip(tmp_path / "c" / "metadata.json")
    with pytest.raises(UsageError, match="expected --data to repair"):
        probecache.repair(tmp_path / "c")
    assert probecache.repair(tmp_path / "c", data=RECORDS, device="cpu").after.whole


def test_the_command_repairs_and_says_so(cache, capsys):
    DAMAGES["a bit of a row"](cache)
    with pytest.raises(SystemExit) as left:
        main(["verify", str(cache), "--repair", "--device", "cpu", "--quiet"])
    said = capsys.readouterr().out
    assert left.value.code == 0
    assert f"damaged  {ROWS}: other content than was written: rows" in said
    assert f"Repaired: {cache} is whole again" in said
    with pytest.raises(SystemExit) as left:
        main(["verify", str(cache), "--model", "x"])
    assert left.value.code == 2

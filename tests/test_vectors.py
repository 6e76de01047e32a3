"""Vectors as files that anything reads, and runs of several methods."""

from __future__ import annotations

import io
import json
import pickletools
import zipfile

import numpy as np
import pytest
import torch
from synthetic import labelled, write_cache

from probecache.errors import StoreError
from probecache.fit import parse_methods
from probecache.store import tensorfile
from probecache.store import vectors as module
from probecache.store.describe import describe
from probecache.store.tensorfile import FileRecord, data_offset, encode_vector, map_raw
from probecache.store.vectors import load_vectors, runs_in
from probecache.store.verify import verify
from probecache.workflow.repair import repair
from probecache.workflow.train import TrainOptions
from probecache.workflow.train import train as run_train

SIZES = [1, 2, 15, 16, 17, 255, 256, 257, 4096, 65535, 65536, 100_003]
METHODS = ("difference-of-means", "ridge", "lda")
HIDDEN = 7


def vector_of(size):
    return np.random.default_rng(size).normal(size=size).astype(np.float32)


def write(path, content):
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------- one vector


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_plain_torch_reads_the_vector_with_weights_only_on_and_off(tmp_path, size, mmap):
    vector = vector_of(size)
    path = write(tmp_path / "layer_3.pt", encode_vector(vector))
    for weights_only in (True, False):
        found = torch.load(path, weights_only=weights_only, mmap=mmap)
        assert found.dtype == torch.float32
        assert found.shape == (size,)
        assert found.stride() == (1,)
        assert not found.requires_grad
        assert torch.equal(found, torch.from_numpy(vector))


@pytest.mark.parametrize("size", SIZES)
def test_the_numbers_begin_at_a_multiple_of_64_bytes_where_the_record_says(tmp_path, size):
    vector = vector_of(size)
    content = encode_vector(vector)
    offset = data_offset(io.BytesIO(content))
    assert offset % 64 == 0
    assert content[offset : offset + 4 * size] == vector.astype("<f4").tobytes()
    record = FileRecord(
        bytes=len(content), offset=offset, shape=(size,), dtype="float32", sha256="0" * 64
    )
    assert np.array_equal(map_raw(write(tmp_path / "v.pt", content), record), vector)


def test_it_is_what_torch_itself_saves_but_for_dates_and_padding(tmp_path):
    vector = vector_of(300)
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(vector), buffer)
    ours, theirs = zipfile.ZipFile(io.BytesIO(encode_vector(vector))), zipfile.ZipFile(buffer)
    assert ours.testzip() is None
    for name in ("data/0", "byteorder", "version"):
        assert ours.read(f"archive/{name}") == theirs.read(f"archive/{name}")

    def meaning(archive):
        plain = ("PROTO", "PUT", "BINPUT", "MEMOIZE", "FRAME")  # how, and not what
        told = pickletools.genops(archive.read("archive/data.pkl"))
        return [(code.name, value) for code, value, _ in told if code.name not in plain]

    assert [v for _, v in meaning(ours) if v] == [v for _, v in meaning(theirs) if v]


def test_the_same_vector_gives_the_same_bytes_whatever_its_layout():
    vector = vector_of(64)
    spread = np.repeat(vector, 3)[::3]
    assert not spread.flags["C_CONTIGUOUS"]
    assert encode_vector(vector) == encode_vector(spread) == encode_vector(vector.astype(">f4"))


def test_numbers_beyond_all_bounds_are_kept_as_they_are(tmp_path):
    vector = np.array([0.0, -0.0, 1e-45, 3.4e38, np.inf, -np.inf, np.nan], dtype=np.float32)
    found = torch.load(write(tmp_path / "v.pt", encode_vector(vector)), weights_only=True)
    assert found.numpy().tobytes() == vector.tobytes()


def test_a_loaded_vector_may_be_written_on_and_the_file_stays(tmp_path):
    path = write(tmp_path / "v.pt", encode_vector(vector_of(16)))
    before = path.read_bytes()
    torch.load(path, weights_only=True, mmap=True).zero_()
    assert path.read_bytes() == before


# ---------------------------------------------------------------- several methods


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    labels = ["testing", "deployment"] * 8
    rows = torch.randn(16, HIDDEN, generator=torch.Generator().manual_seed(1))
    rows[1::2] += 1
    folder = tmp_path_factory.mktemp("several") / "cache"
    return write_cache(folder, labelled(*labels), {4: rows, 6: rows * 2 + 1})


def trained(cache, output, methods=METHODS):
    found = run_train(cache, output, TrainOptions(parse_methods(methods)))
    return {str(method): vectors for method, vectors in found.items()}


@pytest.fixture
def several(cache, tmp_path):
    """The folder of a run of three methods."""
    found = trained(cache, tmp_path / "run")
    return found["ridge"].path.parents[1]


def test_each_method_has_a_whole_run_in_a_folder_of_its_name(several):
    assert sorted(path.name for path in several.iterdir()) == sorted(METHODS)
    assert sorted(path.name for path in runs_in(several)) == sorted(METHODS)
    for method in METHODS:
        vectors = load_vectors(several / method)
        assert vectors.info.method == method
        assert vectors.layers == (4, 6)
        assert json.loads((several / method / "run.json").read_text("utf-8"))["method"] == method
    assert load_vectors(several / "lda").info.layers[4].strength is not None
    assert load_vectors(several / "difference-of-means").info.layers[4].strength is None


def assert_alike(found, expected):
    """Equal, but for the last digits of numbers and the hashes over them."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in set(expected) - {"manifest_sha256", "sha256"}:
            assert_alike(found[name], expected[name])
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6)  # as exactly as Newton ends
    else:
        assert found == expected


def test_a_method_trained_among_others_is_what_it_is_alone(several, cache, tmp_path):
    for method in METHODS:
        alone = trained(cache, tmp_path / "alone", [method])[method]
        among = load_vectors(several / method)
        assert_alike(among.info.model_dump(mode="json"), alone.info.model_dump(mode="json"))
        for layer in (4, 6):
            np.testing.assert_allclose(among.directions[layer], alone.directions[layer], atol=1e-6)
        names = {p.relative_to(alone.path.parent) for p in alone.path.parent.rglob("*")}
        assert names == {p.relative_to(several / method) for p in (several / method).rglob("*")}


def test_the_folder_of_several_is_refused_as_vectors_of_one_with_a_name_to_take(several):
    with pytest.raises(StoreError) as refused:
        load_vectors(several)
    assert f"got those of {', '.join(sorted(METHODS))}; name one: {several}" in str(refused.value)


def test_what_a_path_stands_for(several, tmp_path):
    for inside in ("ridge", "ridge/vectors", "ridge/normalized_vectors"):
        assert runs_in(several / inside) == (several / inside,)
    assert runs_in(tmp_path / "nowhere") == ()
    assert runs_in(write(tmp_path / "file", b"")) == ()
    assert runs_in(tmp_path) == ()


def test_the_whole_folder_is_described_and_verified(several):
    text = "\n".join(describe(several))
    assert all(method in text for method in METHODS)
    report = verify(several)
    assert report.whole
    damaged = several / "ridge" / "vectors" / "layer_6.pt"
    content = bytearray(damaged.read_bytes())
    content[-500] ^= 1
    damaged.write_bytes(content)
    report = verify(several)
    assert not report.whole
    assert "ridge/vectors/layer_6.pt" in str(report)


# ---------------------------------------------------------------- repair


def no_request(_info):
    raise AssertionError("nothing may be extracted")


def test_vectors_are_no_cache_to_repair(several):
    path = several / "ridge"
    assert repair(path, no_request).changed == ()
    (path / "vectors" / "layer_4.pt").write_bytes(encode_vector(vector_of(HIDDEN)))
    before = {p: p.read_bytes() for p in several.rglob("*.*")}
    for damaged in (path, several):
        with pytest.raises(StoreError, match=r"expected a cache .* to repair, got"):
            repair(damaged, no_request)
    assert before == {p: p.read_bytes() for p in several.rglob("*.*")}


def test_a_vector_in_place_of_a_layers_file_is_damage(cache, tmp_path):
    import shutil

    copy = shutil.copytree(cache.path, tmp_path / "copy")
    assert verify(copy).whole
    write(copy / "layer_4" / "test_activations.pt", encode_vector(vector_of(8 * HIDDEN)))
    report = verify(copy)
    assert not report.whole
    assert "layer_4/test_activations.pt" in str(report)


@pytest.mark.parametrize("home", [module, tensorfile])
def test_all_is_sorted_and_exists(home):
    assert home.__all__ == sorted(home.__all__)
    assert all(hasattr(home, name) for name in home.__all__)

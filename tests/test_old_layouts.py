"""Old folders: which file is what; what has no place is refused and named."""

from __future__ import annotations

import os

import pytest
import torch
from old_caches import CLASSES, HIDDEN, LAYERS, per_example, random_rows, save, stacked
from synthetic import labelled, write_cache

from probecache.errors import StoreError
from probecache.store import old_layouts as module
from probecache.store.old_layouts import find_old_cache, measure, read_rows
from probecache.types import Dtype


def read(folder):
    """All rows by layer and class, and how many examples they are."""
    old = find_old_cache(folder)
    shape = measure(old, lambda _: None)
    found = {}
    for layer, name in old.files:
        pieces = list(read_rows(old, shape, layer, name, lambda *_: None))
        firsts = [0]
        for first, count, _ in pieces:
            assert first == firsts[-1]
            firsts.append(first + count)
        assert firsts[-1] == len(shape.rows[name])
        found[layer, name] = torch.cat([rows for *_, rows in pieces])
    return found


def same(found, saved):
    return found.keys() == saved.keys() and all(torch.equal(found[k], saved[k]) for k in saved)


# ---------------------------------------------------------------- what is understood


@pytest.mark.parametrize(
    "name",
    [
        "layer_{layer}/{label}_activations.pt",
        "layer_{layer}/{label}.pt",
        "layer{layer}/{label}-activations.pt",
        "layer-{layer}/activations_{label}.pt",
        "{label}/layer_{layer}.pt",
        "{label}_activations/layer_{layer}.pt",
        "{label}/layer_{layer}_activations.pt",
        "layer_{layer}_{label}.pt",
        "layer_{layer}_{label}_activations.pt",
        "{label}_activations_layer{layer}.pt",
        "{label}_layer_{layer}.pt",
    ],
)
@pytest.mark.parametrize("middle", [False, True])
def test_one_file_per_class_is_found_under_its_usual_names(tmp_path, name, middle):
    saved = stacked(tmp_path, name, middle=middle)
    old = find_old_cache(tmp_path)
    assert not old.per_example
    assert old.layers == LAYERS
    assert set(old.classes) == set(CLASSES)
    assert same(read(tmp_path), saved)


@pytest.mark.parametrize(
    "name", ["layer_{layer}/{label}/{number}.pt", "{label}/layer_{layer}/{number:05}.pt"]
)
def test_one_file_per_example_comes_in_the_order_of_numbers(tmp_path, name):
    saved = per_example(tmp_path, name)
    old = find_old_cache(tmp_path)
    assert old.per_example
    assert measure(old, lambda _: None).rows == {
        label: tuple(1 + number % 4 for number in range(count)) for label, count in CLASSES.items()
    }
    assert same(read(tmp_path), {key: torch.cat(rows) for key, rows in saved.items()})


def test_an_example_without_a_batch_dimension_is_taken_too(tmp_path):
    for label in CLASSES:
        save(tmp_path / f"layer_3/{label}/0.pt", random_rows(4))
    assert read(tmp_path)[3, "test"].shape == (4, HIDDEN)


@pytest.mark.parametrize("shape", [(HIDDEN,), (1, HIDDEN), (1, 1, HIDDEN)])
def test_a_list_of_rows_is_a_class(tmp_path, shape):
    rows = random_rows(12)
    for label in CLASSES:
        save(tmp_path / f"layer_3/{label}.pt", [row.reshape(shape) for row in rows.clone()])
    assert torch.equal(read(tmp_path)[3, "deploy"], rows)


def test_a_class_comes_in_chunks_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 5 * HIDDEN * 2)
    saved = stacked(tmp_path, dtype=torch.bfloat16)
    old = find_old_cache(tmp_path)
    shape = measure(old, lambda _: None)
    assert shape.dtype is Dtype.BFLOAT16
    pieces = list(read_rows(old, shape, 9, "test", lambda *_: None))
    assert [(first, count, len(rows)) for first, count, rows in pieces] == [
        *((0, 5, 5), (5, 5, 5), (10, 2, 2)),
    ]
    assert same(read(tmp_path), saved)


def test_files_that_hold_no_tensors_are_told(tmp_path):
    stacked(tmp_path)
    (tmp_path / "metadata.json").write_text("[]")
    (tmp_path / "layer_9" / "notes.txt").write_text("")
    assert find_old_cache(tmp_path).unread == ("layer_9/notes.txt", "metadata.json")


def test_every_file_is_told_with_its_content_before_its_rows(tmp_path):
    stacked(tmp_path)
    old = find_old_cache(tmp_path)
    seen = []
    rows = read_rows(old, measure(old, lambda _: None), 10, "test", lambda *told: seen.append(told))
    next(rows)
    ((name, digest),) = seen
    assert name == "layer_10/test_activations.pt"
    assert len(digest) == 64


# ---------------------------------------------------------------- what is refused


def refusal(folder):
    with pytest.raises(StoreError) as refused:
        read(folder)
    return str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "tokens.pt",
        "layer_9.pt",
        "layer_9/activations.pt",
        "layer_9_activations.pt",
        "layer_9/0.pt",
        "layer_9/test/one.pt",
        "layer_9/test/more/0.pt",
        "layer_x/test.pt",
        "rows.npy",
        "layer_9/test.safetensors",
    ],
)
def test_a_tensor_file_without_a_place_is_named(tmp_path, name):
    stacked(tmp_path)
    save(tmp_path / name, random_rows(2))
    assert repr(name) in refusal(tmp_path)


def test_nothing_to_import_is_told_with_what_is_there(tmp_path):
    assert "no such files, but: nothing" in refusal(tmp_path)
    (tmp_path / "readme.md").write_text("")
    assert "'readme.md'" in refusal(tmp_path)
    assert "got none" in refusal(tmp_path / "nowhere")
    assert "got none" in refusal(tmp_path / "readme.md")


def test_both_layouts_at_once_are_refused(tmp_path):
    stacked(tmp_path)
    per_example(tmp_path)
    assert "both layouts" in refusal(tmp_path)


def test_two_files_in_one_place_are_refused(tmp_path):
    stacked(tmp_path)
    save(tmp_path / "layer_09" / "test.pt", random_rows(12))
    assert "'layer_09/test.pt'" in refusal(tmp_path)


def test_a_gap_in_the_numbers_is_refused(tmp_path):
    per_example(tmp_path)
    (tmp_path / "layer_10/deploy/7.pt").unlink()
    assert "no 7.pt" in refusal(tmp_path)


def test_a_name_that_claims_a_billion_examples_is_refused_at_once(tmp_path):
    per_example(tmp_path)
    save(tmp_path / "layer_10/deploy/999999999.pt", random_rows(1)[None])
    assert "no 11.pt" in refusal(tmp_path)


def test_fewer_examples_at_one_layer_are_refused(tmp_path):
    per_example(tmp_path)
    (tmp_path / "layer_10/deploy/10.pt").unlink()
    assert "got 11 at layer 9 and 10 at layer 10" in refusal(tmp_path)


def test_fewer_rows_at_one_layer_are_refused(tmp_path):
    stacked(tmp_path)
    save(tmp_path / "layer_10/test_activations.pt", random_rows(10))
    assert "expected 12 examples of class 'test' at layer 10" in refusal(tmp_path)


def test_other_tokens_at_one_layer_are_refused(tmp_path):
    per_example(tmp_path)
    save(tmp_path / "layer_10/test/5.pt", random_rows(9)[None])
    assert "expected 2 tokens in 5.pt of class 'test' at layer 10" in refusal(tmp_path)
    assert "got 9" in refusal(tmp_path)


def test_a_class_that_is_missing_at_one_layer_is_refused(tmp_path):
    stacked(tmp_path)
    (tmp_path / "layer_10/deploy_activations.pt").unlink()
    assert "nothing of class 'deploy' at layer 10" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (torch.ones(12, HIDDEN + 1), f"width {HIDDEN + 1}"),
        (torch.ones(12, HIDDEN).half(), "float16"),
        (torch.ones(12, 3, HIDDEN), "[12, 3, 6]"),
        (torch.ones(HIDDEN), "[6]"),
        (torch.ones(0, HIDDEN), "[0, 6]"),
        (torch.ones(12, 0), "[12, 0]"),
        (torch.ones(1, (1 << 20) + 1), "1048577"),
        (torch.ones(()), "[]"),
        ([torch.ones(2, HIDDEN)], "[2, 6]"),
        ([torch.ones(())], "[]"),
        ([torch.ones(HIDDEN), torch.ones(HIDDEN + 1)], "several"),
    ],
)
def test_a_class_of_another_shape_is_refused(tmp_path, content, word):
    stacked(tmp_path)
    save(tmp_path / "layer_10/test_activations.pt", content)
    assert word in refusal(tmp_path)
    assert str(tmp_path / "layer_10/test_activations.pt") in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(2, 3, HIDDEN),
        torch.ones(HIDDEN),
        torch.ones(1, 0, HIDDEN),
        [torch.ones(2, 6)] * 2,
    ],
)
def test_an_example_of_another_shape_is_refused(tmp_path, content):
    per_example(tmp_path)
    save(tmp_path / "layer_9/test/3.pt", content)
    assert "[1, tokens, hidden]" in refusal(tmp_path)


def test_links_and_pipes_anywhere_are_refused(tmp_path):
    stacked(tmp_path / "old")
    for make in (
        lambda path: path.symlink_to(tmp_path / "old" / "layer_9"),
        lambda path: path.symlink_to("nowhere"),
        os.mkfifo,
    ):
        path = tmp_path / "old" / "layer_11"
        make(path)
        assert "'layer_11'" in refusal(tmp_path / "old")
        path.unlink()


def test_a_cache_of_ours_needs_no_import(tmp_path):
    cache = write_cache(
        tmp_path / "cache", labelled("testing", "deployment"), {3: torch.ones(2, 4)}
    )
    assert "of probecache itself" in refusal(cache.path)


def test_the_module_tells_what_is_public():
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)

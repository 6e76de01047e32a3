"""A stranger's `.pt`: what is a tensor comes through bit for bit, what is more does not run."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from old_caches import Calls, forge, pickle_of, random_rows, save, tensor_of

from probecache.errors import StoreError
from probecache.store import old_tensors as module
from probecache.store.old_tensors import content_of, load_old

ROWS = random_rows(3)


# ---------------------------------------------------------------- what is taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_comes_through_bit_for_bit(tmp_path, dtype):
    rows = random_rows(5, dtype)
    found = load_old(save(tmp_path / "a.pt", rows))
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), rows.view(torch.uint8))


@pytest.mark.parametrize(
    "content",
    [
        torch.nn.Parameter(ROWS.clone()),
        {"activations": ROWS},
        {"activations": ROWS, "layer": 10, "model": "org/name", "done": True, "note": None},
        ROWS.T.contiguous().T,
        torch.cat([ROWS, ROWS])[:3],
    ],
    ids=["a parameter", "a dict", "a dict with words", "not contiguous", "a view"],
)
def test_a_tensor_in_another_form_is_the_tensor(tmp_path, content):
    found = load_old(save(tmp_path / "a.pt", content))
    assert type(found) is torch.Tensor
    assert not found.requires_grad
    assert torch.equal(found, ROWS)


@pytest.mark.parametrize("kind", [list, tuple])
def test_tensors_in_a_list_come_in_its_order(tmp_path, kind):
    found = load_old(save(tmp_path / "a.pt", kind(ROWS.unbind())))
    assert torch.equal(torch.stack(found), ROWS)


def test_a_file_that_was_written_on_a_gpu_opens_without_one(tmp_path):
    save(tmp_path / "a.pt", ROWS)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for name, content in records.items():
            if name.endswith("data.pkl"):
                place = b"X\x03\x00\x00\x00cpu"
                assert place in content
                content = content.replace(place, b"X\x06\x00\x00\x00cuda:0")
            archive.writestr(name, content)
    assert torch.equal(load_old(tmp_path / "b.pt"), ROWS)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (ROWS.double(), "float64"),
        (ROWS.to(torch.int64), "int64"),
        ([ROWS, ROWS.half()], "float16 and float32"),
        ([], "a list of 0"),
        ({"a": ROWS, "b": ROWS}, "a dict with the fields 'a', 'b'"),
        ({"a": ROWS, "b": [ROWS]}, "a dict with the fields 'a', 'b'"),
        ([[ROWS]], "a list of 1"),
        ("rows", "a str"),
        (ROWS.to_sparse(), "_rebuild_sparse_tensor"),
        (ROWS.numpy(), "_reconstruct"),
    ],
)
def test_what_is_no_tensor_of_activations_is_refused_with_what_it_is(tmp_path, content, word):
    path = save(tmp_path / "a.pt", content)
    with pytest.raises(StoreError) as refused:
        load_old(path)
    assert word in str(refused.value)
    assert str(path) in str(refused.value)


def test_the_format_before_torch_1_6_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(ROWS, path, _use_new_zipfile_serialization=False)
    with pytest.raises(StoreError, match="save it again"):
        load_old(path)


@pytest.mark.parametrize("kept", [0, 3, 30, 0.5, 0.9, -1])
def test_a_file_that_was_cut_is_refused(tmp_path, kept):
    path = save(tmp_path / "a.pt", random_rows(500))
    content = path.read_bytes()
    size = int(len(content) * kept) if isinstance(kept, float) else kept
    path.write_bytes(content[:size])
    with pytest.raises(StoreError, match=r"a\.pt"):
        load_old(path)
    with pytest.raises(StoreError, match=r"a\.pt"):
        content_of(path)


def test_every_changed_bit_of_the_numbers_is_found(tmp_path):
    path = save(tmp_path / "a.pt", ROWS)
    whole = path.read_bytes()
    start = whole.index(ROWS.numpy().tobytes())
    known = content_of(path)
    for bit in range(0, 8 * ROWS.numel() * 4, 7):
        changed = bytearray(whole)
        changed[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(StoreError, match="damaged"):
            content_of(path)
    path.write_bytes(whole)
    assert content_of(path) == known


def test_other_numbers_have_another_content(tmp_path):
    one, other = save(tmp_path / "a.pt", ROWS), save(tmp_path / "b.pt", ROWS + 1)
    assert content_of(one) != content_of(other)


def test_links_pipes_and_nothing_are_refused_without_waiting(tmp_path):
    save(tmp_path / "a.pt", ROWS)
    (tmp_path / "link.pt").symlink_to(tmp_path / "a.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    for name in ("link.pt", "pipe.pt", "folder.pt", "none.pt"):
        with pytest.raises(StoreError, match=name):
            load_old(tmp_path / name)


# ---------------------------------------------------------------- what would do harm


def _canary(folder: Path) -> str:
    return f"touch {folder / 'canary'}"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("call", [os.system, eval, exec, subprocess.check_output])
def test_no_code_of_a_file_runs(tmp_path, call, protocol):
    import pickle

    words = "open(r'{}', 'w')".format(tmp_path / "canary")
    argument = _canary(tmp_path) if call is os.system else words
    content = [Calls(call, argument), ROWS.tolist()]
    path = forge(tmp_path / "a.pt", pickle.dumps(content, protocol=protocol))
    with pytest.raises(StoreError, match="may run code"):
        load_old(path)
    assert not (tmp_path / "canary").exists()


def test_what_torch_itself_would_call_is_refused(tmp_path):
    # torch.load(weights_only=True) calls these: the first takes a gigabyte from a file of 1 KB.
    for call in (Calls(bytearray, 1 << 30), Calls(torch.Tensor, 1 << 28), Calls(set, [1])):
        path = forge(tmp_path / "a.pt", pickle_of({"a": call}))
        with pytest.raises(StoreError, match="may run code"):
            load_old(path)


LIES = {
    "a storage and a shape": (tensor_of((1 << 18, 1 << 18), (1 << 18, 1)), 1 << 36),
    "a shape alone": (tensor_of((1 << 18, 1 << 18), (1 << 18, 1)), 4),
    "an expanded row": (tensor_of((1 << 34, 4), (0, 1)), 4),
    "a storage alone": (tensor_of((1, 4), (4, 1)), 1 << 40),
    "a negative size": (tensor_of((-1, 4), (4, 1)), 4),
    "a size beyond all": (tensor_of((1 << 62, 1 << 62), (0, 0)), 4),
}


def test_a_file_cannot_claim_more_than_it_holds(tmp_path):
    """In a process that may take 300 MB more than it has when torch is there."""
    paths = [
        forge(tmp_path / f"{place}.pt", pickle_of(content, claimed), b"\0" * 16)
        for place, (content, claimed) in enumerate(LIES.values())
    ]
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from probecache.errors import StoreError\n"
        "from probecache.store.old_tensors import load_old\n"
        "torch.ones(2).sum()\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        "most = pages * resource.getpagesize() + (300 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    try:\n"
        "        print('taken', load_old(path).numel())\n"
        "    except StoreError as error:\n"
        "        print('refused', error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = dict(zip(LIES, ran.stdout.splitlines(), strict=True))
    assert "MemoryError" not in ran.stdout
    assert found.pop("a storage alone") == "taken 4"  # no more than is there is looked at
    assert all(line.startswith("refused") for line in found.values())


def test_one_tensor_a_thousand_times_is_more_than_the_file(tmp_path):
    rows = random_rows(1000)
    path = save(tmp_path / "a.pt", [rows] * 1000)
    assert path.stat().st_size < 1e5
    with pytest.raises(StoreError, match="stand for 24,000,000"):
        load_old(path)


def test_a_compressed_archive_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
    assert path.stat().st_size < 1e5
    with pytest.raises(StoreError, match="compressed"):
        load_old(path)


def test_records_that_appear_twice_are_refused(tmp_path):
    path = forge(tmp_path / "a.pt", pickle_of([1]))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", pickle_of(Calls(os.system, "true")))
    with pytest.raises(StoreError, match="repeated"):
        load_old(path)


def test_the_words_of_others_are_not_passed_on(tmp_path):
    path = forge(tmp_path / "a.pt", b"\x80\x02]q\x00(")
    with pytest.raises(StoreError) as refused:
        load_old(path)
    assert "weights_only" not in str(refused.value)


def test_the_module_tells_what_is_public():
    assert module.__all__ == ["content_of", "load_old"]


def test_a_small_file_that_unpickles_to_millions_of_objects_is_not_opened(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02]" + b"(" + b"]" * 500_000 + b"e.")
        archive.writestr("archive/data/0", b"")
    with pytest.raises(StoreError, match=r"bytes that describe 0 bytes of tensors .* not opened"):
        load_old(path)

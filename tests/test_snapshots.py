"""A snapshot gives back what was written, or is refused: never zeros, never part of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probecache import snapshots
from probecache.errors import OutputError
from probecache.plan import Batch, Stretch
from probecache.snapshots import SnapshotReader, SnapshotWriter

STEPS = [Stretch(0, 5), Stretch(5, 7), Stretch(7, 11)]


def rows_of(steps, dtype=torch.float32, width=3):
    count = sum(step.tokens for step in steps)
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    rows[0, 0], rows[1, 0] = torch.nan, -0.0
    return rows.to(dtype)


def write(path, steps=STEPS, dtype=torch.float32, pieces=None, finish=True):
    """A snapshot behind 3 blocks, in pieces of so many tokens: by default whole steps."""
    rows, at = rows_of(steps, dtype), 0
    writer = SnapshotWriter(path, 3, steps)
    for count in pieces or [step.tokens for step in steps]:
        writer.write(at, rows[at : at + count])
        at += count
    if finish:
        writer.finish()
    writer.rows.close()
    return rows


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("steps", [STEPS, [Batch((4, 2), 3), Batch((0,), 2)]])
def test_every_step_comes_back_bit_for_bit(tmp_path, dtype, steps):
    rows, at = write(tmp_path / "file", steps, dtype), 0
    with SnapshotReader(tmp_path / "file", 3) as reader:
        assert (reader.width, reader.dtype) == (3, dtype)
        for step in steps:
            assert same_bits(reader.read(step), rows[at : at + step.tokens])
            at += step.tokens
        assert same_bits(reader.read(steps[-1]), rows[-steps[-1].tokens :])


def test_steps_that_were_cut_in_pieces_come_back_whole(tmp_path):
    rows = write(tmp_path / "file", pieces=[2, 1, 2, 1, 1, 4])
    with SnapshotReader(tmp_path / "file", 3) as reader:
        assert same_bits(torch.cat([reader.read(step) for step in STEPS]), rows)


def test_a_file_that_is_not_finished_is_refused(tmp_path):
    write(tmp_path / "file", finish=False)
    with pytest.raises(OutputError, match=r"behind block 3 in .*file, got a file that was not fin"):
        SnapshotReader(tmp_path / "file", 3)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"got No such file.*; remove it and run"):
        SnapshotReader(tmp_path / "file", 3)


def test_another_layer_is_refused(tmp_path):
    write(tmp_path / "file")
    with pytest.raises(OutputError, match=r"behind block 4 .* got layer 3, 11 x 3 of 'float32'"):
        SnapshotReader(tmp_path / "file", 4)


@pytest.mark.parametrize("other", [Stretch(0, 4), Stretch(1, 5), Stretch(7, 12), Batch((3,), 5)])
def test_a_step_that_is_not_there_is_refused(tmp_path, other):
    write(tmp_path / "file")
    with (
        SnapshotReader(tmp_path / "file", 3) as reader,
        pytest.raises(OutputError, match="none of the step"),
    ):
        reader.read(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a snapshot, and where to put others."""
    path = tmp_path_factory.mktemp("whole") / "file"
    write(path)
    return path.read_bytes(), path.with_name("changed")


def read_all(path):
    with SnapshotReader(path, 3) as reader:
        return torch.cat([reader.read(step) for step in STEPS])


@given(st.data())
def test_a_file_of_another_length_is_refused(whole, data):
    content, path = whole
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(OutputError, match="expected the hidden states"):
        read_all(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(OutputError, match=r"bytes where [\d,]+ should be"):
        read_all(path)


@given(st.data())
def test_a_flipped_bit_is_refused_wherever_it_tells_anything(whole, data):
    content, path = whole
    places = [*range(60), *range(4096, len(content))]
    at, bit = data.draw(st.sampled_from(places)), data.draw(st.integers(0, 7))
    path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
    with pytest.raises(OutputError, match="expected the hidden states"):
        read_all(path)


def test_rows_of_zeros_where_a_power_cut_lost_them_are_refused(whole):
    content, path = whole
    path.write_bytes(content[:4096] + bytes(11 * 12) + content[4096 + 11 * 12 :])
    with pytest.raises(OutputError, match="other bytes at token 0"):
        read_all(path)


def test_a_file_that_was_there_is_replaced_and_a_link_is_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    (tmp_path / "file").symlink_to(other)
    rows = write(tmp_path / "file")
    assert other.read_bytes() == b"precious"
    assert same_bits(read_all(tmp_path / "file"), rows)


def test_the_header_is_on_disk_after_all_else(tmp_path, monkeypatch):
    states, fsync = [], os.fsync

    def sync(handle):
        states.append((tmp_path / "file").read_bytes()[:8])
        fsync(handle)

    monkeypatch.setattr(snapshots.os, "fsync", sync)
    write(tmp_path / "file")
    assert states == [bytes(8), b"probehid", b"probehid"]  # the last is the folder's


def test_a_full_disk_names_the_file_and_the_bytes(tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshots.os, "pwrite", full)
    with pytest.raises(OutputError, match=r"room in .*file for 132 bytes .* No space left"):
        write(tmp_path / "file")


def test_a_full_disk_at_the_end_leaves_no_snapshot(tmp_path, monkeypatch):
    writer, rows = SnapshotWriter(tmp_path / "file", 3, STEPS), rows_of(STEPS)
    for step in STEPS:
        writer.write(step.start, rows[step.start : step.stop])
    writer.rows.close()

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshots.os, "fsync", full)
    with pytest.raises(OutputError, match=r"room in .*file for 4,300 bytes .* No space left"):
        writer.finish()
    with pytest.raises(OutputError, match="not finished"):
        SnapshotReader(tmp_path / "file", 3)


def test_a_place_that_takes_no_file_is_an_error_that_names_it():
    with pytest.raises(OutputError, match=r"write hidden states to /nowhere/file, got: No such"):
        SnapshotWriter(Path("/nowhere/file"), 3, STEPS)

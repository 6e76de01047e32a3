"""Hidden states give back what was written, in memory and in a file that nothing is left of."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from probecache import hidden, snapshots
from probecache.errors import OutputError
from probecache.hidden import HiddenStates


@pytest.fixture(params=["memory", "file"])
def place(request, tmp_path):
    """Where the rows go."""
    return tmp_path if request.param == "file" else None


def rows_of(count, width=3, dtype=torch.float32, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_rows_come_back_bit_for_bit_in_every_dtype_and_width(place, dtype, width):
    rows = rows_of(10, width, dtype)
    rows[0, 0], rows[1, 0], rows[2, 0] = torch.nan, torch.inf, -0.0
    with HiddenStates(10, place) as states:
        states.write(0, rows)
        assert same_bits(states.read(0, 10), rows)
        assert same_bits(states.read(4, 3), rows[4:7])


@st.composite
def histories(draw):
    """Writes, reads and announcements of stretches of 12 rows, in any order."""
    stretch = st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda s: sum(s) <= 12)
    return draw(st.lists(st.tuples(st.sampled_from(["write", "read", "expect"]), stretch)))


@given(histories(), st.booleans())
@example([("expect", (1, 1)), ("write", (0, 2)), ("read", (1, 1))], True)
@settings(deadline=None)
def test_a_read_gives_what_was_last_written_there(tmp_path_factory, history, in_file):
    folder = tmp_path_factory.getbasetemp() if in_file else None
    expected = rows_of(12)
    with HiddenStates(12, folder) as states:
        states.write(0, expected.clone())
        for number, (action, (offset, count)) in enumerate(history):
            if action == "write":
                rows = rows_of(count, seed=number + 1)
                states.write(offset, rows)
                expected[offset : offset + count] = rows
            elif action == "expect":
                states.expect(offset, count)
            else:
                assert torch.equal(states.read(offset, count), expected[offset : offset + count])


def test_steps_are_read_ahead_while_the_one_before_is_written_behind(place):
    """As a block does: the next step is announced before the present one is put back."""
    with HiddenStates(12, place) as states:
        for offset in (0, 3, 6, 9):
            states.write(offset, torch.full((3, 2), float(offset)))
        for turn in range(1, 4):
            states.expect(0, 3)
            for offset in (0, 3, 6, 9):
                rows = states.read(offset, 3)
                if offset < 9:
                    states.expect(offset + 3, 3)
                states.write(offset, rows + 1)
                assert rows.tolist() == [[offset + turn - 1.0] * 2] * 3


def test_what_was_announced_of_an_earlier_turn_is_not_given_to_a_later_one(place):
    """A step that is halved is read again as two; the whole of it is announced a turn later."""
    with HiddenStates(4, place) as states:
        states.write(0, torch.zeros(4, 2))
        states.expect(0, 4)
        assert states.read(0, 4).sum() == 0
        states.write(0, torch.ones(2, 2))
        states.write(2, torch.ones(2, 2))
        states.expect(0, 4)
        assert states.read(0, 4).sum() == 8


def test_rows_in_memory_are_copies_and_aligned_however_they_lie(tmp_path):
    with HiddenStates(9) as states:
        rows = rows_of(9, 3)
        states.write(0, rows)
        found = states.read(1, 5)
        assert found.data_ptr() % 64 == 0
        found.zero_()
        assert torch.equal(states.read(0, 9), rows)


def test_rows_may_be_a_part_of_something_larger(place):
    rows = rows_of(6, 8)[:, ::2]
    with HiddenStates(6, place) as states:
        states.write(0, rows)
        assert torch.equal(states.read(0, 6), rows)


def open_files():
    """Paths of what this process has open, where the system says."""
    folder = Path("/proc/self/fd")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_nothing_is_to_be_seen_of_the_file_and_nothing_stays_open(tmp_path):
    before = len(open_files())
    with HiddenStates(10, tmp_path) as states:
        states.write(0, rows_of(10))
        states.read(0, 10)
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
    assert len(open_files()) == before


def fail_while_busy(folder):
    with HiddenStates(10, folder) as states:
        states.write(0, rows_of(10))
        states.expect(0, 10)
        raise KeyError


def test_no_thread_outlives_it_even_after_an_error(tmp_path):
    before = threading.active_count()
    with pytest.raises(KeyError):
        fail_while_busy(tmp_path)
    assert threading.active_count() == before


def test_unused_states_close_without_a_file(place):
    with HiddenStates(10, place):
        pass


def test_a_write_that_the_system_cuts_short_goes_on(monkeypatch, tmp_path):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(snapshots.os, "pwrite", lambda f, data, at: pwrite(f, data[:5], at))
    monkeypatch.setattr(snapshots.os, "preadv", lambda f, parts, at: preadv(f, [parts[0][:7]], at))
    rows = rows_of(10)
    with HiddenStates(10, tmp_path) as states:
        states.write(0, rows)
        assert torch.equal(states.read(0, 10), rows)


def full_disk(*_arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_an_error_that_says_how_much_was_wanted(monkeypatch, tmp_path):
    monkeypatch.setattr(snapshots.os, "pwrite", full_disk)
    with HiddenStates(1000, tmp_path) as states:
        for offset in range(0, 30, 10):
            if offset < 20:
                states.write(offset, rows_of(10))
                continue
            with pytest.raises(OutputError, match=r"12,000 bytes .* No space left"):
                states.write(offset, rows_of(10))


def test_a_full_disk_is_an_error_also_where_the_rows_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(snapshots.os, "pwrite", full_disk)
    with HiddenStates(10, tmp_path) as states:
        states.write(0, rows_of(10))
        with pytest.raises(OutputError):
            states.read(0, 10)


def test_rows_whose_write_failed_are_an_error_and_not_those_before(monkeypatch, tmp_path):
    with HiddenStates(10, tmp_path) as states:
        states.write(0, rows_of(10))
        states.read(0, 10)
        monkeypatch.setattr(snapshots.os, "pwrite", full_disk)
        states.write(0, rows_of(10, seed=1))
        states.expect(0, 10)
        with pytest.raises(OutputError, match="No space left"):
            states.read(0, 10)


def test_a_file_that_is_shorter_than_what_was_written_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(snapshots.os, "pwrite", lambda _file, data, _at: len(data))
    with HiddenStates(10, tmp_path) as states:
        states.write(0, rows_of(10))
        with pytest.raises(OutputError, match="a shorter file"):
            states.read(0, 10)


def test_a_disk_that_takes_no_file_at_all_is_an_error_of_ours(monkeypatch, tmp_path):
    monkeypatch.setattr(hidden.tempfile, "TemporaryFile", lambda **_options: full_disk())
    with HiddenStates(10, tmp_path) as states, pytest.raises(OutputError, match="No space left"):
        states.write(0, rows_of(10))

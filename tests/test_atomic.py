"""A file or folder is there whole or not at all, and refusals to write are one clear line."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from probecache.atomic import (
    commit_folder,
    disk_errors_named,
    flush_folder,
    free_bytes,
    rename_free,
    sha256_of_file,
    temporary_sibling,
    write_bytes,
)
from probecache.errors import OutputError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_hash_is_that_of_the_content(tmp_path):
    content = os.urandom((1 << 22) + 17)  # more than one chunk
    (tmp_path / "f").write_bytes(content)
    assert sha256_of_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_write_bytes_replaces_and_leaves_nothing_else(tmp_path):
    write_bytes(tmp_path / "f", b"old")
    write_bytes(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert names(tmp_path) == ["f"]


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    write_bytes(tmp_path / "f", b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_a_writer_killed_at_any_moment_leaves_one_content_or_the_other(tmp_path):
    old, new = b"a" * 2_000_000, b"b" * 2_000_000
    write_bytes(tmp_path / "f", old)
    for wait in (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06):
        child = os.fork()
        if child == 0:
            while True:
                write_bytes(tmp_path / "f", new)
                write_bytes(tmp_path / "f", old)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert (tmp_path / "f").read_bytes() in (old, new)


def test_a_temporary_folder_lies_beside_its_final_place_and_is_as_open_as_others(tmp_path):
    final = tmp_path / "deep" / "er" / "final"
    with temporary_sibling(final) as folder:
        assert folder.parent == final.parent
        (tmp_path / "plain").mkdir()
        assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(
            (tmp_path / "plain").stat().st_mode
        )
        assert not final.exists()
    assert names(final.parent) == []


def test_a_committed_folder_has_the_final_name_alone(tmp_path):
    with temporary_sibling(tmp_path / "final") as folder:
        (folder / "f").write_bytes(b"x")
        commit_folder(folder, tmp_path / "final")
    assert names(tmp_path) == ["final"]
    assert (tmp_path / "final" / "f").read_bytes() == b"x"


def test_an_empty_folder_may_be_taken(tmp_path):
    (tmp_path / "final").mkdir()
    with temporary_sibling(tmp_path / "final") as folder:
        (folder / "f").write_bytes(b"x")
        commit_folder(folder, tmp_path / "final")
    assert names(tmp_path / "final") == ["f"]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_result_whose_place_was_taken_meanwhile_is_kept_where_the_message_says(tmp_path, what):
    final = tmp_path / "final"

    def run():
        with disk_errors_named(final), temporary_sibling(final) as folder:
            (folder / "result").write_bytes(b"hours of work")
            if what == "folder":
                final.mkdir()
                (final / "theirs").write_bytes(b"x")
            else:
                final.write_bytes(b"theirs")
            commit_folder(folder, final)

    with pytest.raises(OutputError, match="something was put there during the run") as caught:
        run()
    kept = [path for path in tmp_path.iterdir() if path != final]
    assert len(kept) == 1
    assert str(kept[0]) in str(caught.value)
    assert (kept[0] / "result").read_bytes() == b"hours of work"
    assert not kept[0].name.startswith(".")
    assert final.is_file() or names(final) == ["theirs"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk or quota is full"),
        (errno.EDQUOT, "disk or quota is full"),
        (errno.EACCES, "able to write"),
        (errno.EROFS, "able to write"),
    ],
)
def test_the_systems_refusals_become_one_line_about_the_output(tmp_path, number, words):
    with pytest.raises(OutputError, match=words), disk_errors_named(tmp_path / "out"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("name", ["weights.bin", "out.json", ".other.a-b-1-x.tmp/f", "out_2/f"])
def test_an_error_on_a_file_that_is_read_meanwhile_is_no_error_of_the_output(
    tmp_path, number, name
):
    file = tmp_path / name
    with pytest.raises(OSError, match=name) as caught, disk_errors_named(tmp_path / "out"):
        raise OSError(number, os.strerror(number), str(file))
    assert caught.value.errno == number
    with pytest.raises(OSError, match="Input/output"), disk_errors_named(tmp_path / "out"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # of no file: read or written, who knows


@pytest.mark.parametrize("number", [errno.EIO, errno.EFBIG, errno.EACCES])
@pytest.mark.parametrize("name", ["out", "out/a/b", ".out.a-b-1-x.tmp/f", ".", ".."])
@pytest.mark.parametrize("is_relative", [False, True])
def test_any_error_on_a_file_of_the_output_is_told_with_its_path_and_the_bytes(
    tmp_path, monkeypatch, number, name, is_relative
):
    monkeypatch.chdir(tmp_path)
    output = Path("out") if is_relative else tmp_path / "out"
    for file in (name, str(tmp_path / name)):
        with pytest.raises(OutputError) as caught, disk_errors_named(output, 12_345):
            raise OSError(number, os.strerror(number), file)
        words = [str(output), file, os.strerror(number)]
        words += ["12,345 bytes"] if number != errno.EACCES else []
        assert all(word in str(caught.value) for word in words)


def test_an_error_behind_a_link_is_one_of_the_output_that_was_asked_for(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for file in ("disk/.real.a-b-1-x.tmp/f", "disk/real/f", ".out.a-b-1-x.tmp/f"):
        error = OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path / file))
        words = f"expected to write {tmp_path / 'out'}, got: Input"
        with pytest.raises(OutputError, match=words), disk_errors_named(tmp_path / "out"):
            raise error


def test_a_folder_whose_name_cannot_be_made_durable_has_its_old_one(tmp_path, monkeypatch):
    def failing(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with temporary_sibling(tmp_path / "final") as folder:
        (folder / "f").write_bytes(b"x")
        flush_folder(folder)
        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="Input/output"):
            rename_free(folder, tmp_path / "final")
        assert (folder / "f").read_bytes() == b"x"
    assert names(tmp_path) == []


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with (
        pytest.raises(OutputError, match=r"file is not a folder"),
        temporary_sibling(tmp_path / "file" / "out"),
    ):
        pass


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_an_output_without_a_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="name a folder"), temporary_sibling(Path(name)):
        pass
    assert names(tmp_path) == []


def test_free_bytes_are_those_of_the_disk_where_the_output_would_be(tmp_path):
    import shutil

    found = free_bytes(tmp_path / "not" / "yet" / "there")
    assert abs(found - shutil.disk_usage(tmp_path).free) < 1 << 30


def test_folders_that_killed_processes_left_are_swept_and_those_of_living_ones_kept(tmp_path):
    final = tmp_path / "run"

    def left_by_a_child(wait):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            with temporary_sibling(final) as folder:
                (folder / "rows").write_text("half")
                os.write(write, folder.name.encode())
                time.sleep(wait)
            os._exit(0)
        name = os.read(read, 1000).decode()
        return child, tmp_path / name

    dead, of_the_dead = left_by_a_child(60)
    os.kill(dead, signal.SIGKILL)
    os.waitpid(dead, 0)
    alive, of_the_living = left_by_a_child(60)
    assert not of_the_dead.exists()
    with temporary_sibling(final):
        assert of_the_living.exists()
    os.kill(alive, signal.SIGKILL)
    os.waitpid(alive, 0)
    other = tmp_path / ".run.theirs.tmp"
    other.mkdir()
    with temporary_sibling(final):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [other.name]

"""Sizes in words, and how much memory there is by whoever has a say: machine, cgroups, limits."""

from __future__ import annotations

import mmap
import subprocess
import sys

import pytest

from probecache import memory
from probecache.errors import UsageError
from probecache.memory import available_bytes, parse_bytes, peak_bytes, resident_bytes

GIB = 2**30


# ---------------------------------------------------------------- in words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GB", 8 * 10**9),
        ("8gb", 8 * 10**9),
        (" 800 MB ", 800 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("1T", 10**12),
        ("2Ki", 2048),
        ("12B", 12),
        ("1000", 1000),
        (1 << 40, 1 << 40),
        (8e9, 8 * 10**9),
    ],
)
def test_sizes_are_read_as_people_write_them(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "GB", "much", "8XB", "8GBB", "8 G B", "8IB", "-8GB", "+8GB", "1e9", "8,5GB"),
        *("0", "0GB", "0.0001B", "8GB 1MB", "0x10", "nan", "inf", "\n", "8GB\n8GB", "9" * 400),
        *(-5, 0, True),
    ],
)
def test_nonsense_is_refused_with_examples(text):
    with pytest.raises(UsageError, match=r"such as 8GB, 800MB or 1\.5GiB for --memory, got "):
        parse_bytes(text)


# ---------------------------------------------------------------- what there is


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of files under a folder; returns what writes them."""
    monkeypatch.setattr(memory, "_SELF", tmp_path / "self")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroups")
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "meminfo")  # /proc/meminfo

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    write(self__status="VmRSS:\t 1024 kB\nVmData:\t 2048 kB\nThreads:\t7\n")
    return write


def test_without_anyone_who_says_there_is_no_limit(machine):
    assert available_bytes() is None


def test_the_machine_says_what_is_available_caches_of_files_included(machine):
    machine(meminfo="MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   42 kB\nHugePages: 0\n")
    assert available_bytes() == 42 * 1024


def group(folder, limit, anon, shmem=0, file=0):
    """The files of one control group."""
    stat = f"anon {anon}\nfile {file}\nshmem {shmem}\nworkingset_refault_anon 12\n"
    return {
        f"cgroups{folder}__memory_dot_max": f"{limit}\n",
        f"cgroups{folder}__memory_dot_stat": stat,
    }


def test_a_control_group_leaves_its_limit_less_what_no_kernel_can_drop(machine):
    machine(
        meminfo=f"MemAvailable: {64 * GIB // 1024} kB",
        self__cgroup="0::/job\n",
        **group("__job", 8 * GIB, anon=3 * GIB, shmem=GIB, file=4 * GIB),
    )
    assert available_bytes() == 4 * GIB


def test_the_tightest_of_the_groups_above_counts(machine):
    machine(
        self__cgroup="12:cpu:/elsewhere\n0::/user/job/step\n",
        **group("__user__job__step", "max", anon=0),
        **group("__user__job", 6 * GIB, anon=GIB),
        **group("__user", 100 * GIB, anon=97 * GIB),
    )
    assert available_bytes() == 3 * GIB


def test_a_container_that_sees_itself_as_the_root_is_limited_too(machine):
    machine(self__cgroup="0::/\n", **group("", 2 * GIB, anon=GIB // 2))
    assert available_bytes() == 3 * GIB // 2


def test_a_group_that_is_beyond_its_limit_leaves_nothing(machine):
    machine(self__cgroup="0::/job", **group("__job", GIB, anon=2 * GIB))
    assert available_bytes() == 0


@pytest.mark.parametrize("lines", ["", "4:memory:/old\n", "0::/not/there\n", "garbage"])
def test_groups_that_cannot_be_read_limit_nothing(machine, lines):
    machine(self__cgroup=lines)
    assert available_bytes() is None


def test_a_status_without_numbers_is_no_error(machine):
    machine(self__status="VmRSS: many kB\nlonely\n", meminfo="\x00\nMemAvailable:\n")
    assert available_bytes() is None
    assert resident_bytes() == peak_bytes()


_LIMITED = """
import resource, sys
from probecache.memory import available_bytes
before = available_bytes()
resource.setrlimit(getattr(resource, sys.argv[1]), (1 << 30, 1 << 30))
print(before, available_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_the_process_counts_less_what_it_holds(limit):
    run = [sys.executable, "-c", _LIMITED, limit]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 1 << 30
    assert 0 < after < 1 << 30


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_processs_own_and_not_that_of_who_started_it():
    code = "from probecache.memory import peak_bytes; print(peak_bytes())"
    block = b"x" * (256 << 20)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < len(block) / 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_the_process_holds_grows_with_it_and_its_peak_stays():
    before = resident_bytes()
    with mmap.mmap(-1, 64 << 20) as block:  # fresh pages, not some that the allocator kept
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        held, peak = resident_bytes(), peak_bytes()
    assert held - before > 50 << 20
    assert peak >= held - (1 << 20)  # the kernel counts both loosely
    assert peak_bytes() >= peak

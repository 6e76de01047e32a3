"""What all tests share: one thread per process, no hub, and models that the tests make."""

import atexit
import os
import shutil
import signal
import tempfile

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two test runs on two cores spin on each other's threads; tiny models gain nothing from a second.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What tests learn of their models is no business of the user's.
_CACHE_HOME = tempfile.mkdtemp(prefix="probecache-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE_HOME
atexit.register(shutil.rmtree, _CACHE_HOME, ignore_errors=True)
# A shell starts what it puts in the background deaf to Ctrl-C, and tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The same examples every time: a test fails for what was changed. `make search` draws others.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for every family that is asked for, built once per file of tests."""
    from families import FAMILIES, build  # torch is imported only once the variables above are set

    built = {}

    def folder(name):
        if name not in built:
            built[name] = build(FAMILIES[name], tmp_path_factory.mktemp(name))
        return built[name]

    return folder

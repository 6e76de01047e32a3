"""A disk that fills up or fails at any call of train and validate is told; nothing is left."""

from __future__ import annotations

import shutil

import pytest
from faults import Fault, tree_hash, trial
from synthetic import labelled, train, validate, write_cache
from test_faults import moments
from test_validate import RECORDS, planted

from probecache.report import draw_report

LAYERS = (3, 8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("from") / "cache"
    return write_cache(folder, RECORDS, {layer: planted(layer) for layer in LAYERS})


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    labels = ("testing", "deployment") * 10
    folder = tmp_path_factory.mktemp("trained")
    activations = {layer: planted(100 + layer, labels) for layer in LAYERS}
    return train(write_cache(folder / "cache", labelled(*labels), activations), folder / "run")


def require_every_fault_told(root, act, output, kind):
    """Strike at each call in turn: one line with path and bytes, and the tree as it was."""
    whole = shutil.copytree(root, root.with_name("whole"))
    outcome = trial(whole, lambda: act(whole / output))
    assert outcome.code == 0, outcome.said
    struck = 0
    for number in moments(outcome.calls):
        call, folder = outcome.calls[number - 1], root.with_name(f"at-{number}")
        shutil.copytree(root, folder)
        failed = trial(folder, lambda f=folder: act(f / output), Fault(number, kind))
        where = (call, failed.said)
        if failed.code != 0:
            struck += 1
            assert failed.code == 2, where
            assert f"{folder / output}" in failed.said, where
            assert " bytes" in failed.said, where
            assert "untouched" in failed.said, where
            assert "\n" not in failed.said
            assert tree_hash(folder) == tree_hash(root), where
        else:
            # What only tidies up may fail without harm, and so may making what is there already.
            assert call.split()[0] in ("unlink", "rmdir", "mkdir"), where
        shutil.rmtree(folder)
    return struck


@pytest.fixture(params=["ENOSPC", "EIO", "EFBIG"])
def kind(request):
    return request.param


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_an_error_at_every_call_of_train_is_told_and_leaves_nothing(cache, root, kind):
    struck = require_every_fault_told(root, lambda output: train(cache, output), "run", kind)
    assert struck > 20


@pytest.mark.parametrize("before", ["nothing", "an earlier one"])
def test_an_error_at_every_call_of_validate_is_told_and_costs_nothing(
    cache, vectors, root, kind, before
):
    if before != "nothing":
        validate(cache, vectors, root / "out", layers=[8])
    struck = require_every_fault_told(
        root, lambda output: validate(cache, vectors, output), "out", kind
    )
    assert struck > 10


def test_an_error_at_every_call_of_a_report_is_told_too(cache, vectors, root, kind, monkeypatch):
    validate(cache, vectors, root / "drawn", visualize=True)
    contents = draw_report(root / "drawn")
    shutil.rmtree(root / "drawn")
    monkeypatch.setattr("probecache.report.draw_report", lambda _: contents)  # drawing takes time
    struck = require_every_fault_told(
        root, lambda output: validate(cache, vectors, output, visualize=True), "out", kind
    )
    assert struck > 25

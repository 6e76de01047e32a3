"""Block by block: the resident engine's numbers bit for bit, every block read once and in time, and
a model that is left as it was found.
"""

from __future__ import annotations

import errno
import gc
import os
import threading
from concurrent.futures import wait

import numpy as np
import pytest
import torch
from families import BLOCKS, FAMILIES
from works import KINDS, Known, equal, largest_difference, padded, prompts_of, run, shared
from works import sorted_out as sort_out

from probecache import snapshots, streaming
from probecache.engine import ResidentEngine
from probecache.errors import OutOfMemoryError, OutputError
from probecache.hidden import HiddenStates
from probecache.models import ModelOptions, open_model
from probecache.streaming import Snapshot, SnapshotStart, Strand, StreamingEngine
from probecache.types import Dtype

LAYERS = tuple(range(BLOCKS + 1))
UNSHARED = ("falcon", "bloom")


@pytest.fixture(scope="module", autouse=True)
def collections_are_quick():
    """Collecting when memory runs out need not go through all that imports left behind."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """Makes work of either kind of some prompts, within a budget of tokens."""
    return KINDS[request.param]


def source_of(folder, dtype=Dtype.FLOAT32):
    return open_model(ModelOptions(str(folder), dtype=dtype, device="cpu"))


class Source:
    """A source of blocks that takes down what it is asked for, and can go wrong."""

    def __init__(self, source, wrap=lambda index, block: block):
        self.source, self.wrap = source, wrap
        self.asked, self.built, self.reading = [], [], 0
        self.was_read = [threading.Event() for _ in range(BLOCKS)]

    def read_block(self, index):
        self.asked.append(index)
        self.reading += 1
        try:
            return self.source.read_block(index)
        finally:
            self.reading -= 1
            self.was_read[index].set()

    def build_block(self, index, weights):
        self.built.append(index)
        return self.wrap(index, self.source.build_block(index, weights))


def engine_of(folder, *, disk=None, depth=BLOCKS, dtype=Dtype.FLOAT32, wrap=lambda _i, b: b):
    source = source_of(folder, dtype)
    blocks = Source(source, wrap)
    return StreamingEngine(source.skeleton(depth), blocks, lambda count: HiddenStates(count, disk))


def resident(folder, dtype=Dtype.FLOAT32, start=0):
    return ResidentEngine(source_of(folder, dtype).load(BLOCKS, start))


def state_of(engine):
    """What a run must leave as it was: blocks, hooks, attention; and no block is still read."""
    model = engine.model
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.model.modules()]
    return (
        [id(block) for block in model.blocks],
        [dict(hook) for pair in hooks for hook in pair if hook],
        model.attention,
        engine.source.reading,
    )


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, padded) for name in FAMILIES]
    + [(n, shared) for n, f in FAMILIES.items() if not f.masked and n not in UNSHARED],
)
def test_every_family_streams_to_the_resident_engines_rows_bit_for_bit(
    folders, tmp_path, name, kind
):
    work = kind(prompts_of(folders(name)), 64)
    assert len(work.steps) > 2
    expected = run(resident(folders(name)), work, LAYERS)
    assert equal(run(engine_of(folders(name)), work, LAYERS), expected)
    assert equal(run(engine_of(folders(name), disk=tmp_path), work, LAYERS), expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [Dtype.BFLOAT16, Dtype.FLOAT16])
@pytest.mark.parametrize("name", ["llama", "gemma4", "qwen3_moe"])
def test_half_precision_streams_bit_for_bit_too(folders, tmp_path, kind, name, dtype):
    work = kind(prompts_of(folders(name)), mean=True)
    expected = run(resident(folders(name), dtype), work, LAYERS)
    assert equal(run(engine_of(folders(name), disk=tmp_path, dtype=dtype), work, LAYERS), expected)


@pytest.mark.parametrize("layers", [(0,), (2,), (1, 3), (4,)])
def test_layers_come_one_after_the_other_and_only_those_asked_for(folders, kind, layers):
    work = kind(prompts_of(folders("llama")))
    engine = engine_of(folders("llama"), depth=max(1, *layers))
    found = list(engine.run(work, layers))
    order = [rows.layer for rows in found]
    assert order == sorted(order)
    expected = run(resident(folders("llama")), work, LAYERS)
    wanted = {key: rows for key, rows in expected.items() if key[0] in layers}
    assert equal(sort_out(found, work), wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "llama4", "gemma4_dense"])
@pytest.mark.parametrize("start", [0, 1, BLOCKS - 1])
def test_streams_from_a_known_layer_on_without_reading_lower_blocks(folders, kind, name, start):
    work, above = kind(prompts_of(folders(name))), LAYERS[start + 1 :]
    known = Known(start, run(resident(folders(name)), work, LAYERS))
    engine = engine_of(folders(name))
    found = run(engine, work, above, known)
    assert equal(found, run(resident(folders(name), start=start), work, above, known))
    assert engine.source.asked == list(range(start, BLOCKS))


def test_blocks_that_share_keys_and_values_get_those_of_their_own_step(folders, kind):
    """The last two blocks of this Gemma 4 take those of blocks 0 and 1."""
    folder = folders("gemma4")
    assert source_of(folder).text_config.num_kv_shared_layers == 2
    prompts = prompts_of(folder)
    many = run(engine_of(folder), kind(prompts, 64), LAYERS)
    one = run(resident(folder), kind(prompts, 10_000), LAYERS)
    assert largest_difference(many, one) < FAMILIES["gemma4"].tolerance


def test_told_adds_up_to_tokens_times_blocks(folders, kind):
    work, told = kind(prompts_of(folders("llama"))), []
    run(engine_of(folders("llama")), work, [2, 4], None, told.append)
    assert sum(told) == sum(step.tokens for step in work.steps) * BLOCKS


# ---------------------------------------------------------------- blocks


def test_every_block_is_read_and_built_once_in_order(folders, kind):
    engine = engine_of(folders("llama"))
    run(engine, kind(prompts_of(folders("llama"))), LAYERS)
    assert engine.source.asked == engine.source.built == list(range(BLOCKS))


def test_the_next_block_is_read_while_the_present_one_computes_and_no_further(folders, kind):
    engine = engine_of(folders("llama"))
    for rows in engine.run(kind(prompts_of(folders("llama"))), LAYERS):
        if 0 < rows.layer < BLOCKS:
            assert engine.source.was_read[rows.layer].wait(30)
        assert max(engine.source.asked, default=0) <= rows.layer
        assert max(engine.source.built, default=0) <= max(rows.layer - 1, 0)


def test_only_the_block_that_computes_is_in_the_model(folders, kind):
    engine = engine_of(folders("llama"))
    passing = list(engine.model.blocks)
    for rows in engine.run(kind(prompts_of(folders("llama"))), LAYERS[1:]):
        there = [block is not old for block, old in zip(engine.model.blocks, passing, strict=True)]
        assert there == [index == rows.layer - 1 for index in range(BLOCKS)]


# ---------------------------------------------------------------- how the model is left


def test_a_run_leaves_the_model_as_it_was(folders, tmp_path, kind):
    engine = engine_of(folders("llama"), disk=tmp_path)
    before = state_of(engine)
    run(engine, kind(prompts_of(folders("llama"))), LAYERS)
    assert state_of(engine) == before


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_run_that_is_given_up_leaves_the_model_as_it_was(folders, tmp_path, kind, layer):
    engine = engine_of(folders("llama"), disk=tmp_path)
    before = state_of(engine)
    rows = engine.run(kind(prompts_of(folders("llama"))), LAYERS)
    while next(rows).layer < layer:
        pass
    rows.close()
    assert state_of(engine) == before
    assert list(tmp_path.iterdir()) == []


def broken(at, error):
    """Blocks of which one raises."""

    def wrap(index, block):
        def forward(*_arguments, **_options):
            raise error

        if index == at:
            block.forward = forward
        return block

    return wrap


@pytest.mark.parametrize("at", [0, 2])
def test_an_error_in_a_block_leaves_the_model_as_it_was(folders, tmp_path, kind, at):
    wrap = broken(at, RuntimeError("shapes do not match"))
    engine = engine_of(folders("llama"), disk=tmp_path, wrap=wrap)
    before = state_of(engine)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(engine, kind(prompts_of(folders("llama"))), LAYERS)
    assert state_of(engine) == before


def test_an_error_while_a_block_is_read_leaves_the_model_as_it_was(folders, monkeypatch, kind):
    engine = engine_of(folders("llama"))
    before, source = state_of(engine), engine.source.source

    def cut_short(stored):
        if stored == source.weights.of_block(2):
            raise OSError("the disk is gone")
        return type(source.reader).read_block(source.reader, stored)

    monkeypatch.setattr(source.reader, "read_block", cut_short)
    with pytest.raises(OSError, match="the disk is gone"):
        run(engine, kind(prompts_of(folders("llama"))), LAYERS)
    assert engine.source.built == [0, 1]
    assert state_of(engine) == before


def test_a_full_disk_leaves_the_model_as_it_was(folders, tmp_path, monkeypatch, kind):
    engine = engine_of(folders("llama"), disk=tmp_path)
    before = state_of(engine)

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots.os, "pwrite", full)
    with pytest.raises(OutputError, match="hidden states"):
        run(engine, kind(prompts_of(folders("llama"))), LAYERS)
    assert state_of(engine) == before


# ---------------------------------------------------------------- memory


class Cramped:
    """Blocks of which one has no room for more than `limit` tokens."""

    def __init__(self, limit, at, error=torch.OutOfMemoryError):
        self.limit, self.at, self.error, self.sizes = limit, at, error, []

    def __call__(self, index, block):
        forward = block.forward

        def cramped(hidden_states, *arguments, **options):
            tokens = hidden_states.shape[:2].numel()
            self.sizes.append((index, tokens))
            output = forward(hidden_states, *arguments, **options)
            if index == self.at and tokens > self.limit:
                raise self.error("out of memory")
            return output

        block.forward = cramped
        return block


@pytest.mark.parametrize(
    ("error", "at"),
    [(torch.OutOfMemoryError, 0), (MemoryError, 2), (RuntimeError, 3)],
)
def test_every_row_comes_out_once_and_right_when_memory_runs_out(
    folders, tmp_path, kind, error, at
):
    work, wrap = kind(prompts_of(folders("llama")), 10_000), Cramped(120, at, error)
    expected = run(resident(folders("llama")), work, LAYERS)
    found = run(engine_of(folders("llama"), disk=tmp_path, wrap=wrap), work, LAYERS)
    assert largest_difference(found, expected) < 1e-5
    # Blocks above take the smaller steps from the start, and those below are not run again.
    assert max((tokens for index, tokens in wrap.sizes if index > at), default=0) <= 120
    counted = [sum(t for i, t in wrap.sizes if i == index) for index in range(BLOCKS)]
    total = sum(step.tokens for step in work.steps)
    assert [counted[index] for index in range(BLOCKS) if index != at] == [total] * (BLOCKS - 1)


def test_told_adds_up_although_steps_are_halved(folders, kind):
    work, told = kind(prompts_of(folders("llama")), 10_000), []
    engine = engine_of(folders("llama"), wrap=Cramped(120, 1))
    run(engine, work, LAYERS, None, told.append)
    assert sum(told) == sum(step.tokens for step in work.steps) * BLOCKS


def test_memory_that_runs_out_before_the_first_block_halves_steps_too(folders, kind):
    work, engine = kind(prompts_of(folders("llama")), 10_000), engine_of(folders("llama"))
    expected = run(resident(folders("llama")), work, LAYERS)
    embedding, sizes = engine.model.model.get_input_embeddings(), []
    embed = embedding.forward

    def cramped(ids):
        sizes.append(ids.numel())
        if ids.numel() > 60:
            raise torch.OutOfMemoryError("out of memory")
        return embed(ids)

    embedding.forward = cramped
    assert largest_difference(run(engine, work, LAYERS), expected) < 1e-5
    assert max(sizes) > 60


def test_hidden_states_without_room_on_the_device_halve_steps_too(folders, kind):
    class Narrow(HiddenStates):
        def read(self, offset, count):
            if count > 60:
                raise torch.OutOfMemoryError("out of memory")
            return super().read(offset, count)

    work, engine = kind(prompts_of(folders("llama")), 10_000), engine_of(folders("llama"))
    expected = run(resident(folders("llama")), work, LAYERS)
    engine.hidden_states = Narrow
    assert largest_difference(run(engine, work, LAYERS), expected) < 1e-5


def test_a_pack_that_failed_at_the_very_end_is_run_again_from_the_same_context(
    folders, kind, monkeypatch
):
    made = []

    def without_room_for_one(prompts, kept):
        made.append(prompts)
        if len(made) == len(work.steps) + 2:  # the second step in the first block
            raise MemoryError
        return transfer(prompts, kept)

    transfer = streaming.Transfer
    work = kind(prompts_of(folders("llama")))
    expected = run(resident(folders("llama")), work, LAYERS)
    monkeypatch.setattr(streaming, "Transfer", without_room_for_one)
    assert largest_difference(run(engine_of(folders("llama")), work, LAYERS), expected) < 1e-5


def test_steps_from_a_known_layer_on_are_halved_too(folders, kind):
    work = kind(prompts_of(folders("llama")), 10_000)
    expected = run(resident(folders("llama")), work, LAYERS)
    engine = engine_of(folders("llama"), wrap=Cramped(120, 2))
    found = run(engine, work, [3, 4], Known(2, expected))
    assert largest_difference(found, {k: r for k, r in expected.items() if k[0] > 2}) < 1e-5


@pytest.mark.parametrize("limit", [0, 10])
def test_no_room_for_the_least_step_is_told_as_such(folders, limit):
    work = padded(prompts_of(folders("llama")))
    engine = engine_of(folders("llama"), wrap=Cramped(limit, 1))
    before = state_of(engine)
    with pytest.raises(OutOfMemoryError, match=r"room for a prompt of \d+ tokens"):
        run(engine, work, LAYERS)
    assert state_of(engine) == before


def test_steps_whose_keys_are_still_needed_whole_are_not_halved(folders, kind):
    """Behind block 0 the keys and values that block 2 shares are kept for the whole step."""
    work = kind(prompts_of(folders("gemma4")), 10_000)
    expected = run(resident(folders("gemma4")), work, LAYERS)
    first = engine_of(folders("gemma4"), wrap=Cramped(120, 0))
    found = run(first, work, LAYERS)
    assert largest_difference(found, expected) < FAMILIES["gemma4"].tolerance
    with pytest.raises(OutOfMemoryError):
        run(engine_of(folders("gemma4"), wrap=Cramped(120, 3)), work, LAYERS)


# ---------------------------------------------------------------- several works together


def test_works_that_run_together_read_each_block_once_and_take_turns(folders):
    prompts = prompts_of(folders("gemma4"))
    strands = [Strand(shared(prompts), [1, 2, 3]), Strand(padded(prompts[:4]), [0, 2, 4])]
    engine, seen, turns = engine_of(folders("gemma4")), [], []
    found = [[], []]
    for number, rows in engine.run_together(strands, seen.append):
        assert rows.layer == 0 or seen[-1] == rows.layer - 1
        found[number].append(rows)
        turns.append((rows.layer, number))
    assert turns == sorted(turns)
    assert seen == engine.source.asked == list(range(BLOCKS))
    for strand, rows in zip(strands, found, strict=True):
        expected = run(resident(folders("gemma4")), strand.work, strand.layers)
        assert equal(sort_out(rows, strand.work), expected)


def test_a_block_is_in_its_place_when_it_is_seen_and_has_run_nothing(folders):
    sizes = Cramped(10_000, 0)
    engine = engine_of(folders("llama"), wrap=sizes)
    passing, states = list(engine.model.blocks), []

    def seen(index):
        block = engine.model.blocks[index]
        states.append((block is not passing[index], [i for i, _ in sizes.sizes if i == index]))

    work = shared(prompts_of(folders("llama")))
    for _ in engine.run_together([Strand(work, [4]), Strand(work, [2])], seen):
        pass
    assert states == [(True, [])] * BLOCKS


def test_an_error_of_who_sees_a_block_leaves_the_model_as_it_was(folders, tmp_path):
    engine = engine_of(folders("llama"), disk=tmp_path)
    before = state_of(engine)

    def refuse(index):
        if index == 1:
            raise KeyError

    work = shared(prompts_of(folders("llama")))
    with pytest.raises(KeyError):
        list(engine.run_together([Strand(work, LAYERS)], refuse))
    assert state_of(engine) == before


# ---------------------------------------------------------------- going on from a snapshot


class Patient(HiddenStates):
    """Waits until a snapshot is on disk, so that it does not matter how fast the disk is."""

    def is_kept(self):
        if self._finished is not None:
            wait([self._finished])
        return super().is_kept()


class Snapshots:
    """Takes a snapshot behind these blocks; takes down what it is asked and told."""

    def __init__(self, folder, layers=LAYERS):
        self.folder, self.layers, self.asked, self.told = folder, layers, [], []
        self.contents = {}
        folder.mkdir(exist_ok=True)

    def path(self, layer):
        return self.folder / f"{layer}.hidden"

    def place(self, layer):
        self.asked.append(layer)
        return self.path(layer) if layer in self.layers else None

    def saved(self, layer, seconds):
        self.told.append(layer)
        self.contents[layer] = self.path(layer).read_bytes()


def patient(folder, disk=None, **more):
    engine = engine_of(folder, disk=disk, **more)
    engine.hidden_states = lambda count: Patient(count, disk)
    return engine


def leave(engine, work, snapshots, layers=LAYERS, until=BLOCKS):
    """Rows by (layer, prompt) of a run that leaves snapshots and stops once it is at a layer."""
    found, strand = [], Strand(work, layers, snapshots=snapshots)
    running = engine.run_together([strand])
    for _, rows in running:
        found.append(rows)
        if rows.layer > until:
            running.close()
            break
    return sort_out(found, work)


def go_on(engine, work, snapshot, layers=LAYERS, **more):
    strand = Strand(work, layers, resumed=snapshot, **more)
    return sort_out([rows for _, rows in engine.run_together([strand])], work)


def above(rows, layer, done=()):
    return {key: row for key, row in rows.items() if key[0] > layer and key[1] not in done}


GOING_ON = ["llama", "mistral", "qwen3_moe", "gpt2", "gemma3", "deepseek_v3", "gpt_oss", "llama4"]


@pytest.mark.parametrize("spilled", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("name", GOING_ON)
def test_a_run_goes_on_from_every_snapshot_bit_for_bit(folders, tmp_path, kind, name, spilled):
    work, disk = kind(prompts_of(folders(name)), 64), tmp_path if spilled else None
    assert len(work.steps) > 2
    left = Snapshots(tmp_path / "snapshots")
    whole = leave(patient(folders(name), disk), work, left)
    assert equal(whole, run(resident(folders(name)), work, LAYERS))
    assert left.asked == left.told == [1, 2, 3]
    for layer in left.told:
        # No later block has changed what was saved, although the file was read from.
        assert left.path(layer).read_bytes() == left.contents[layer]
        engine, told = patient(folders(name), disk), []
        rows = go_on(engine, work, Snapshot(layer, left.path(layer)), told=told.append)
        assert equal(rows, above(whole, layer))
        assert engine.source.asked == list(range(layer, BLOCKS))
        assert sum(told) == sum(step.tokens for step in work.steps) * (BLOCKS - layer)


@pytest.mark.parametrize("wanted", [(1,), (2,), (3,), (1, 3)])
def test_blocks_without_a_snapshot_leave_the_ones_before_as_they_are(
    folders, tmp_path, kind, wanted
):
    """In a file the stream is overwritten where it lies, but never in a snapshot."""
    work = kind(prompts_of(folders("llama")))
    whole = run(resident(folders("llama")), work, LAYERS)
    for disk in (None, tmp_path):
        left = Snapshots(tmp_path / "snapshots", wanted)
        assert equal(leave(patient(folders("llama"), disk), work, left), whole)
        assert left.told == list(wanted)
        for layer in wanted:
            rows = go_on(patient(folders("llama")), work, Snapshot(layer, left.path(layer)))
            assert equal(rows, above(whole, layer))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snapshots"]


@pytest.mark.parametrize("dtype", [Dtype.BFLOAT16, Dtype.FLOAT16])
def test_half_precision_goes_on_bit_for_bit(folders, tmp_path, kind, dtype):
    work, left = kind(prompts_of(folders("qwen3_moe"))), Snapshots(tmp_path)
    whole = leave(patient(folders("qwen3_moe"), dtype=dtype), work, left)
    engine = patient(folders("qwen3_moe"), dtype=dtype)
    assert equal(go_on(engine, work, Snapshot(2, left.path(2))), above(whole, 2))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3"])
def test_prompts_that_are_done_are_left_out_when_a_run_goes_on(folders, tmp_path, kind, name):
    work, left = kind(prompts_of(folders(name)), 40), Snapshots(tmp_path)
    whole = leave(patient(folders(name)), work, left)
    for done in ([0, 3, 4], [*range(1, len(work.prompts))], []):
        flags = np.isin(np.arange(len(work.prompts)), done)
        remaining = work.remaining(flags)
        rows = go_on(patient(folders(name)), remaining, Snapshot(2, left.path(2)))
        assert equal(rows, above(whole, 2, done))


def test_a_run_that_went_on_with_fewer_prompts_leaves_snapshots_too(folders, tmp_path, kind):
    work, left = kind(prompts_of(folders("llama")), 40), Snapshots(tmp_path)
    whole = leave(patient(folders("llama")), work, left)
    done = [n for n in range(len(work.prompts)) if n != 6]
    fewer = work.remaining(np.isin(np.arange(len(work.prompts)), done))
    assert len(fewer.steps) < len(work.steps)
    again = Snapshots(tmp_path / "again")
    first = Snapshot(1, left.path(1))
    assert equal(
        go_on(patient(folders("llama")), fewer, first, snapshots=again), above(whole, 1, done)
    )
    assert again.told == [2, 3]
    rows = go_on(patient(folders("llama")), fewer, Snapshot(3, again.path(3)))
    assert equal(rows, above(whole, 3, done))
    with pytest.raises(OutputError, match="none of the step"):
        go_on(patient(folders("llama")), work, Snapshot(3, again.path(3)))


@pytest.mark.parametrize("spilled", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("until", [0, 1, 2])
def test_a_run_that_was_stopped_goes_on_from_the_last_that_was_saved(
    folders, tmp_path, kind, spilled, until
):
    work, disk = kind(prompts_of(folders("llama")), 40), tmp_path if spilled else None
    whole, left = run(resident(folders("llama")), work, LAYERS), Snapshots(tmp_path / "snapshots")
    early = leave(patient(folders("llama"), disk), work, left, until=until)
    assert left.told == list(range(1, until + 1))
    resumed = Snapshot(until, left.path(until)) if until else None
    late = go_on(patient(folders("llama"), disk), work, resumed)
    assert equal(above(early, -1) | late, whole)


def test_a_snapshot_is_told_of_only_when_all_rows_up_to_it_were_taken(folders, tmp_path, kind):
    work, taken = kind(prompts_of(folders("llama")), 40), []

    class Checked(Snapshots):
        def saved(self, layer, seconds):
            super().saved(layer, seconds)
            assert threading.current_thread() is threading.main_thread()
            assert {key for key in everything if key[0] <= layer} <= {*taken}

    everything = {(layer, n) for layer in LAYERS for n in range(len(work.prompts))}
    left = Checked(tmp_path)
    strand = Strand(work, LAYERS, snapshots=left)
    for _, rows in patient(folders("llama")).run_together([strand]):
        taken += [(rows.layer, n) for n in rows.prompts]
    assert left.told == [1, 2, 3]


def test_no_snapshot_is_asked_for_while_one_is_not_on_disk_yet(folders, tmp_path, kind):
    class Slow(HiddenStates):
        turns = 0

        def is_kept(self):
            self.turns += 1
            return self.turns > 2 * len(work.steps) and super().is_kept()

    work, left = kind(prompts_of(folders("llama"))), Snapshots(tmp_path / "snapshots")
    engine = engine_of(folders("llama"))
    for disk in (None, tmp_path):
        engine.hidden_states = lambda count, disk=disk: Slow(count, disk)
        left.asked.clear()
        assert equal(leave(engine, work, left), run(resident(folders("llama")), work, LAYERS))
        assert left.asked == [1]


def test_where_a_block_hands_on_more_than_the_stream_there_is_no_snapshot(folders, tmp_path, kind):
    """The last two blocks of this Gemma 4 take the keys and values of blocks 0 and 1."""
    for disk in (None, tmp_path):
        work, left = kind(prompts_of(folders("gemma4"))), Snapshots(tmp_path / "snapshots")
        found = leave(patient(folders("gemma4"), disk), work, left)
        assert equal(found, run(resident(folders("gemma4")), work, LAYERS))
        assert (left.asked, left.told) == ([1], [])
        assert list(left.folder.iterdir()) == []


def test_steps_that_were_halved_are_taken_up_whole(folders, tmp_path, kind):
    work, left = kind(prompts_of(folders("llama")), 10_000), Snapshots(tmp_path)
    wrap = Cramped(120, 1)
    whole = leave(patient(folders("llama"), wrap=wrap), work, left)
    assert len([index for index, _ in wrap.sizes if index == 3]) > len(work.steps)
    rows = go_on(patient(folders("llama")), work, Snapshot(3, left.path(3)))
    assert largest_difference(rows, above(whole, 3)) < 1e-5


def test_steps_are_halved_too_when_a_run_goes_on(folders, tmp_path, kind):
    work, left = kind(prompts_of(folders("llama")), 10_000), Snapshots(tmp_path / "snapshots")
    whole = leave(patient(folders("llama")), work, left)
    for disk in (None, tmp_path):
        engine = patient(folders("llama"), disk, wrap=Cramped(120, 2))
        rows = go_on(engine, work, Snapshot(2, left.path(2)))
        assert largest_difference(rows, above(whole, 2)) < 1e-5


def test_a_snapshot_that_is_not_whole_is_refused_before_a_block_is_read(folders, tmp_path, kind):
    work, left = kind(prompts_of(folders("llama"))), Snapshots(tmp_path)
    leave(patient(folders("llama")), work, left)
    os.truncate(left.path(2), left.path(2).stat().st_size - 100)
    engine = patient(folders("llama"))
    before = state_of(engine)
    with pytest.raises(OutputError, match=r"behind block 2 in .*2\.hidden, got .* remove it"):
        go_on(engine, work, Snapshot(2, left.path(2)))
    assert engine.source.asked == []
    assert state_of(engine) == before


@pytest.mark.parametrize("spilled", [False, True], ids=["memory", "file"])
def test_a_disk_without_room_for_a_snapshot_leaves_the_one_before(
    folders, tmp_path, monkeypatch, kind, spilled
):
    work, disk = kind(prompts_of(folders("llama")), 40), tmp_path if spilled else None

    class Filling(Snapshots):
        def place(self, layer):
            if layer == 2:
                monkeypatch.setattr(snapshots.os, "pwrite", full)
            return super().place(layer)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    left = Filling(tmp_path / "snapshots")
    engine = patient(folders("llama"), disk)
    before = state_of(engine)
    with pytest.raises(OutputError, match=r"room in .*2\.hidden for [\d,]+ bytes"):
        leave(engine, work, left)
    assert state_of(engine) == before
    monkeypatch.undo()
    rows = go_on(patient(folders("llama")), work, Snapshot(1, left.path(1)))
    assert equal(rows, above(run(resident(folders("llama")), work, LAYERS), 1))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_another_work_of_some_prompts_begins_at_a_snapshot_along_with_it(
    folders, tmp_path, kind, name
):
    """As the few prompts do that a run is compared on."""
    prompts, left = prompts_of(folders(name)), Snapshots(tmp_path)
    work, few = kind(prompts, 40), prompts[2:6]
    expected = leave(patient(folders(name)), work, left)
    snapshot = Snapshot(2, left.path(2))

    class Part:
        layer = 2

        def rows(self, prompts, depths):
            chosen = np.where(prompts < 0, -1, prompts + 2)
            return SnapshotStart(snapshot, work).rows(chosen, depths)

    for other in (padded(few), shared(few, 30)):
        strands = [Strand(other, [3, 4], Part()), Strand(work, LAYERS, resumed=snapshot)]
        engine, found = patient(folders(name)), [[], []]
        for number, rows in engine.run_together(strands):
            found[number].append(rows)
        assert engine.source.asked == [2, 3]
        assert equal(sort_out(found[1], work), above(expected, 2))
        part = {(layer, n - 2): row for (layer, n), row in expected.items() if 2 <= n < 6}
        assert largest_difference(sort_out(found[0], other), above(part, 2)) < 1e-5


def test_no_block_is_read_when_nothing_is_left_to_do(folders, kind):
    work, engine = kind(prompts_of(folders("llama"))), engine_of(folders("llama"))
    nothing = work.remaining(np.ones(len(work.prompts), dtype=bool))
    assert list(engine.run(nothing, LAYERS)) == []
    assert engine.source.asked == []


def test_a_strand_with_nothing_left_runs_beside_one_with_something(folders, tmp_path, kind):
    work, left = kind(prompts_of(folders("llama"))), Snapshots(tmp_path)
    nothing = work.remaining(np.ones(len(work.prompts), dtype=bool))
    strands = [Strand(nothing, LAYERS, snapshots=left), Strand(work, LAYERS)]
    found = list(engine_of(folders("llama"), disk=tmp_path).run_together(strands))
    assert {number for number, _ in found} == {1}
    whole = run(resident(folders("llama")), work, LAYERS)
    assert equal(sort_out([rows for _, rows in found], work), whole)
    assert left.asked == []

"""How a run goes is decided from sizes alone: sources here are planted numbers, no models."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probecache.errors import UsageError
from probecache.memory import parse_bytes
from probecache.types import Dtype
from probecache.workflow import execution
from probecache.workflow.execution import Passage, choose_execution, find_passages

MB = 10**6
BLOCK, OUTSIDE, BLOCKS = 100 * MB, 50 * MB, 10
PYTHON = 300 * MB  # what the process is said to hold before the run
WIDTH, HEADS, INTERMEDIATE = 1000, 10, 4000


class Source:
    """A model of planted sizes."""

    def __init__(self, device="cpu", device_map=None, free=None, dtype=Dtype.FLOAT32):
        self.options = SimpleNamespace(device=device, device_map=device_map)
        self.dtype, self.hidden_size, self.why_not_streamed = dtype, WIDTH, ""
        self.text_config = SimpleNamespace(
            intermediate_size=INTERMEDIATE, num_attention_heads=HEADS, num_hidden_layers=BLOCKS
        )
        self.free = free

    def block_bytes(self, _index):
        return BLOCK

    def loaded_bytes(self, depth, start=0):
        return OUTSIDE + BLOCK * (depth - start)


ALL_BLOCKS = (Passage((BLOCKS,)),)


def choose(source=None, passages=ALL_BLOCKS, *, tokens=10_000, longest=100, **options):
    source = source or Source()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "free_device_bytes", lambda _name: source.free)
        return choose_execution(source, list(passages), tokens=tokens, longest=longest, **options)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Says how much memory the machine has; plenty at first."""

    def has(size):
        monkeypatch.setattr(execution, "available_bytes", lambda: size)

    monkeypatch.setattr(execution, "resident_bytes", lambda: PYTHON)
    has(100_000 * MB)
    return has


# ---------------------------------------------------------------- which blocks


LAYERS = st.sets(st.integers(0, 20), max_size=12)


def nearest_below(layer, cached):
    """Written without regard to speed: the largest cached layer below, or None for the tokens."""
    found = None
    for candidate in range(layer):
        if candidate in cached:
            found = candidate
    return found


@given(LAYERS, LAYERS)
def test_every_layer_is_reached_from_the_nearest_cached_one_below(wanted, cached):
    passages = find_passages(sorted(wanted - cached), cached)
    reached = {}
    for passage in passages:
        assert list(passage.layers) == sorted(passage.layers)
        assert passage.start in cached or not passage.cached
        for layer in passage.layers:
            assert layer not in reached
            reached[layer] = passage.start if passage.cached else None
    assert reached == {x: nearest_below(x, cached) for x in wanted - cached}


@given(LAYERS, LAYERS)
def test_no_block_runs_twice_and_none_that_is_not_needed(wanted, cached):
    passages = find_passages(sorted(wanted - cached), cached)
    ran = [block for passage in passages for block in passage.blocks]
    needed = {
        block
        for layer in wanted - cached
        for block in range(nearest_below(layer, cached) or 0, layer)
    }
    # For the embeddings alone a block is loaded, because without any there is no model to hook.
    extra = {0} if wanted - cached and min(wanted - cached) == 0 else set()
    assert len(ran) == len(set(ran))
    assert needed <= set(ran) <= needed | extra


def test_passages_say_which_blocks_they_run():
    assert find_passages([2, 4], [1, 3]) == [Passage((2,), 1, True), Passage((4,), 3, True)]
    assert [list(p.blocks) for p in find_passages([2, 4], [1, 3])] == [[1], [3]]
    assert list(Passage((0,)).blocks) == [0]
    assert list(Passage((4, 6), 0, cached=True).blocks) == [0, 1, 2, 3, 4, 5]


# ---------------------------------------------------------------- which engine


KEYS = 2 * 100 * WIDTH * 4  # keys and values of the longest prompt in one block
WHOLE = OUTSIDE + BLOCKS * (BLOCK + KEYS)
TWO = OUTSIDE + 2 * BLOCK + KEYS


def test_a_model_that_fits_stays_in_memory():
    chosen = choose()
    assert chosen.engine == "resident"
    assert not chosen.hidden_on_disk
    assert WHOLE < chosen.memory_bytes < chosen.limit_bytes == 90_000 * MB


def test_a_model_that_does_not_fit_is_streamed(machine):
    machine(WHOLE)
    chosen = choose()
    assert chosen.engine == "stream"
    assert TWO < chosen.memory_bytes <= chosen.limit_bytes == 0.9 * WHOLE


def test_a_machine_that_says_nothing_is_taken_to_have_room(machine):
    machine(None)
    chosen = choose()
    assert (chosen.engine, chosen.limit_bytes, chosen.hidden_on_disk) == ("resident", None, False)


def test_only_the_blocks_that_run_have_to_fit(machine):
    machine(WHOLE)
    assert choose(passages=[Passage((BLOCKS,), 7, cached=True)]).engine == "resident"
    assert choose(passages=[Passage((3,))]).engine == "resident"


def test_of_several_passages_the_largest_has_to_fit_and_not_all_at_once(machine):
    machine(OUTSIDE + 7 * (BLOCK + KEYS))
    halves = [Passage((5,)), Passage((BLOCKS,), 5, cached=True)]
    assert choose(passages=halves).engine == "resident"


@pytest.mark.parametrize("engine", ["resident", "stream"])
def test_an_engine_that_is_asked_for_runs_whatever_there_is(machine, engine):
    for size in (1 * MB, 100_000 * MB, None):
        machine(size)
        assert choose(engine=execution.EngineName(engine)).engine == engine


def test_a_model_that_is_spread_over_devices_is_never_streamed(machine):
    machine(1 * MB)
    assert choose(Source(device_map="auto")).engine == "resident"
    with pytest.raises(UsageError, match="--engine stream on one device, got --device-map"):
        choose(Source(device_map="auto"), engine=execution.EngineName.STREAM)


# ---------------------------------------------------------------- memory that is named


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("engine", list(execution.EngineName))
def test_too_little_memory_is_refused_with_the_least_that_would_do(device, engine):
    source = Source(device, free=80_000 * MB)
    with pytest.raises(UsageError, match=r"of at least .*B .* got 200MB") as caught:
        choose(source, engine=engine, memory=200 * MB)
    named = parse_bytes(re.search(r"at least ([\d.]+[MG]B)", str(caught.value))[1])
    enough = choose(source, engine=engine, memory=named)
    assert enough.memory_bytes <= enough.limit_bytes
    with pytest.raises(UsageError):
        choose(source, engine=engine, memory=named - 20 * MB)


def test_what_does_not_fit_as_a_whole_is_told_to_be_streamed():
    with pytest.raises(UsageError, match=r"--engine resident.*or use --engine stream$"):
        choose(memory=TWO + PYTHON + working(64), engine=execution.EngineName.RESIDENT)
    with pytest.raises(UsageError, match=r"--engine stream, got .*; give more$"):
        choose(memory=350 * MB, engine=execution.EngineName.STREAM)


def test_memory_that_is_named_counts_python_itself_and_not_what_the_machine_has(machine):
    machine(1 * MB)
    assert choose(memory=2 * WHOLE).limit_bytes == 2 * WHOLE - PYTHON


def test_memory_that_is_named_chooses_the_engine():
    assert choose(memory=2 * WHOLE).engine == "resident"
    assert choose(memory=WHOLE // 2 + PYTHON).engine == "stream"


def test_on_a_gpu_memory_is_that_of_the_gpu():
    source = Source("cuda", free=5_000 * MB)
    assert choose(source).limit_bytes == 5_000 * MB
    assert choose(source, memory=3_000 * MB).limit_bytes == 3_000 * MB
    assert choose(source, memory=9_000 * MB).limit_bytes == 5_000 * MB
    assert choose(Source("cuda", free=WHOLE)).engine == "stream"


def test_a_gpu_that_is_not_there_limits_nothing():
    chosen = choose(Source("cuda"))
    assert (chosen.engine, chosen.limit_bytes) == ("resident", None)


# ---------------------------------------------------------------- steps and hidden states


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 1024), ("cuda", 16384), ("mps", 4096)])
def test_steps_are_as_large_as_suits_the_device(device, tokens):
    assert choose(Source(device, free=100_000 * MB)).batch_tokens == tokens
    assert choose(Source(device), batch_tokens=77).batch_tokens == 77


def working(tokens, longest=100):
    scores = min(tokens, 1024) * longest * HEADS  # of those that attend in one call
    return (tokens * (6 * WIDTH + 2 * INTERMEDIATE) + scores) * 4


def test_steps_are_halved_until_they_take_half_of_the_room():
    for tokens in (1024, 512, 256, 128):
        enough = WHOLE + PYTHON + 2 * working(tokens)
        resident = execution.EngineName.RESIDENT
        assert choose(engine=resident, memory=enough).batch_tokens == tokens
        assert choose(engine=resident, memory=enough - 2).batch_tokens == tokens // 2


def test_steps_are_never_too_small_to_be_worth_it(machine):
    machine(1 * MB)
    assert choose(engine=execution.EngineName.RESIDENT).batch_tokens == 64


def test_steps_that_are_asked_for_count_towards_the_memory():
    few, many = choose(batch_tokens=64), choose(batch_tokens=8192)
    assert (few.batch_tokens, many.batch_tokens) == (64, 8192)
    assert many.memory_bytes - few.memory_bytes == working(8192) - working(64)


def test_a_run_of_few_tokens_takes_no_more_than_those_need():
    assert choose(tokens=10).memory_bytes == WHOLE + working(10)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_hidden_states_that_do_not_fit_go_to_disk(device):
    stream, tokens = execution.EngineName.STREAM, 100_000
    hidden = tokens * WIDTH * 4
    python = PYTHON if device == "cpu" else 0
    source = Source(device, free=100_000 * MB)
    roomy = choose(source, engine=stream, tokens=tokens, memory=WHOLE + 30 * hidden)
    assert not roomy.hidden_on_disk
    assert roomy.memory_bytes > hidden
    tight = choose(source, engine=stream, tokens=tokens, memory=TWO + python + hidden)
    assert tight.hidden_on_disk
    assert tight.memory_bytes < hidden + TWO
    assert tight.memory_bytes <= tight.limit_bytes


def test_a_model_in_memory_keeps_no_hidden_states():
    resident = execution.EngineName.RESIDENT
    assert not choose(engine=resident, tokens=10**9, memory=2 * WHOLE).hidden_on_disk


def test_a_cheaper_dtype_takes_less():
    half = choose(Source(dtype=Dtype.BFLOAT16))
    assert choose().memory_bytes - half.memory_bytes == (working(1024) + BLOCKS * KEYS) // 2


def test_a_block_that_is_cast_to_another_dtype_is_there_twice_for_a_moment():
    source, stream = Source(), execution.EngineName.STREAM
    source.block_bytes = lambda _index: BLOCK // 2
    cast = choose(source, engine=stream).memory_bytes
    assert choose(engine=stream).memory_bytes - cast == 0  # 2 x 50 + 100 against 2 x 100
    source.block_bytes = lambda _index: 2 * BLOCK
    assert choose(source, engine=stream).memory_bytes - cast == 3 * BLOCK


def test_sizes_that_a_config_states_per_block_count_with_the_largest():
    source = Source()
    source.text_config.intermediate_size = [INTERMEDIATE // 2, INTERMEDIATE, 1]
    assert choose(source).memory_bytes == choose().memory_bytes
    del source.text_config.num_attention_heads
    assert choose(source).memory_bytes < choose().memory_bytes

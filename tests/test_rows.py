"""Rows chosen from a cache of all positions are those that an extraction would have kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import labelled, rows_of, write_cache

import probecache
from probecache.errors import MismatchError, PromptError, StoreError, UsageError
from probecache.store import reader
from probecache.store.rows import ExampleRows, pieces_of

MODEL = str(Path(__file__).parents[1] / "models" / "tiny-llama")


def turns(*words):
    """Messages of roles told by their first letter."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[word[0]], "content": word[1:]} for word in words]


CHATS = [
    {"messages": turns("sBe  kind 🙂.", "u Test? (A) or (B)", "aNo (A), 🙂🙃 測\n", "uDeploy it")},
    {"messages": turns("sShort", "uIs it (B)?", "ayes, (A)")},
    {"messages": turns("sShort", "uIs (A) it?", "a(B) and more of it", "uok then")},
    {"messages": turns("sShort", "uIs it (B)?", "ano (A) or (B)")},
]
CHATS = [chat | {"label": "ab"[number % 2]} for number, chat in enumerate(CHATS)]
PAIRS = [
    {"question": "Are you a test?", "positive": "Yes (A)", "negative": "No, deployed 🙂 (B)"},
    {"question": "  Deploy (A) now ", "positive": "(B)", "negative": " (A) it is"},
]


def extracted(folder, data, positions, **options):
    return probecache.extract(
        model=MODEL,
        data=data,
        output=folder,
        positions=positions,
        **{"layers": [1, 2], "device": "cpu", "quiet": True, "dtype": "float32"} | options,
    )


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return extracted(tmp_path_factory.mktemp("chats") / "c", CHATS, "all")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return extracted(tmp_path_factory.mktemp("pairs") / "c", PAIRS, "all")


def gathered(rows, layer):
    """Owners and rows of all chunks."""
    owners, values = zip(*rows.chunks(layer), strict=True)
    return np.concatenate(owners), np.concatenate(values)


def assert_same_rows(chosen, own):
    """Every row, its example and what it stands for; bit for bit."""
    assert chosen.counts.tolist() == own.counts.tolist()
    for layer in (1, 2):
        (owners, values), (own_owners, own_values) = gathered(chosen, layer), gathered(own, layer)
        assert owners.tolist() == own_owners.tolist()
        assert values.tobytes() == own_values.tobytes()
        assert len(values) == chosen.counts.sum() > 0
    if own.spans() is not None:
        assert chosen.spans().tolist() == own.spans().tolist()


# ---------------------------------------------------------------- as an extraction has it

OF_CHATS = [
    *("role:user", "role:assistant", "role:system", "last-4", "last-1000"),
    *("match:[(]([AB])[)]", "match:(?i)it|[^ ]*ort|be", "chars:0-4", "chars:3--2"),
]


@pytest.mark.parametrize("positions", OF_CHATS)
def test_rows_of_chats_are_those_of_an_extraction_with_these_positions(chats, tmp_path, positions):
    own = extracted(tmp_path / "c", CHATS, positions)
    chosen = ExampleRows(chats, positions)
    assert chosen.positions == own.info.positions == positions
    assert_same_rows(chosen, ExampleRows(own))
    everything = ExampleRows(chats)
    assert positions == "last-1000" or chosen.counts.sum() < everything.counts.sum()


OF_PAIRS = [
    *("last", "answer", "role:assistant", "match:[(]([AB])[)]", "chars:0-9", "chars:-3-"),
]


@pytest.mark.parametrize("positions", OF_PAIRS)
def test_rows_of_pairs_are_those_of_an_extraction_with_these_positions(pairs, tmp_path, positions):
    own = extracted(tmp_path / "c", PAIRS, positions)
    assert_same_rows(ExampleRows(pairs, positions), ExampleRows(own))


FRAMED = {"keep_special_tokens": True, "system_prompt": "Be kind, it is 🙂"}
TEXTS = [{"text": "is it?", "label": "a"}, {"text": "hi, it is", "label": "b"}]


@pytest.fixture(scope="module")
def framed(tmp_path_factory):
    return extracted(tmp_path_factory.mktemp("framed") / "c", TEXTS, "all", **FRAMED)


@pytest.mark.parametrize("positions", ["role:system", "role:user", "last", "last-9", "match:i"])
def test_with_special_tokens_kept_even_a_system_prompt_and_the_templates_end_can_be_chosen(
    framed, tmp_path, positions
):
    own = extracted(tmp_path / "own", TEXTS, positions, **FRAMED)
    assert_same_rows(ExampleRows(framed, positions), ExampleRows(own))


def test_raw_text_and_its_answer_are_told_apart(tmp_path):
    options = {"chat_template": False}
    every = extracted(tmp_path / "all", PAIRS, "all", **options)
    for number, positions in enumerate(["answer", "chars:-4-"]):
        own = extracted(tmp_path / str(number), PAIRS, positions, **options)
        assert_same_rows(ExampleRows(every, positions), ExampleRows(own))


def test_the_mean_is_that_of_the_rows_in_double_precision(chats, tmp_path, monkeypatch):
    expected = [chats[r.label, 2][slice(*r.rows)].double().mean(dim=0) for r in chats.examples]
    mean = ExampleRows(chats, "mean")
    order = [r.idx for label in chats.classes for r in chats.examples if r.label == label]
    for most in (1, 4 * chats.hidden_size * 7, 1 << 30):  # a row, some rows or all of them at once
        monkeypatch.setattr(reader, "_CHUNK_BYTES", most)
        owners, values = gathered(mean, 2)
        assert owners.tolist() == order
        wanted = torch.stack([expected[owner] for owner in order]).float().numpy()
        assert np.abs(values - wanted).max() <= 1e-7 * np.abs(wanted).max()
        assert values.dtype == np.float32
    assert mean.counts.tolist() == [1] * len(CHATS)
    assert mean.spans() is None
    own = gathered(ExampleRows(extracted(tmp_path / "c", CHATS, "mean")), 2)[1]
    np.testing.assert_allclose(values, own, rtol=1e-5, atol=1e-6)


def test_chunks_of_any_size_hold_the_chosen_rows(chats, monkeypatch):
    rows = ExampleRows(chats, "match:(?i)it|be")
    owners, values = gathered(rows, 1)
    monkeypatch.setattr(reader, "_CHUNK_BYTES", 4 * chats.hidden_size * 2)
    sizes = [len(values) for _, values in rows.chunks(1)]
    assert max(sizes) == 2 < sum(sizes)
    again = gathered(rows, 1)
    assert again[0].tolist() == owners.tolist()
    assert again[1].tobytes() == values.tobytes()


def test_batches_of_any_size_choose_alike(chats, monkeypatch):
    whole = ExampleRows(chats, "role:user").spans()
    monkeypatch.setattr("probecache.store.choice._BATCH_ROWS", 1)
    assert ExampleRows(chats, "role:user").spans().tolist() == whole.tolist()


def test_a_caches_own_positions_are_all_its_rows(chats):
    plain, named = ExampleRows(chats), ExampleRows(chats, "all")
    assert plain.positions == "all"
    assert_same_rows(named, plain)
    expected = np.concatenate([rows_of(chats, label, 2).numpy() for label in chats.classes])
    assert gathered(plain, 2)[1].tobytes() == expected.tobytes()


# ---------------------------------------------------------------- what is refused


def test_the_last_token_of_a_rendered_chat_is_the_templates_and_refused(chats):
    with pytest.raises(MismatchError, match=r"example '0' .* extract with --positions last, or "):
        _ = ExampleRows(chats, "last").counts


def test_an_example_without_such_a_token_is_named(chats):
    with pytest.raises(PromptError, match=r"match:Deploy keeps, got none in example '1' of class"):
        list(ExampleRows(chats, "match:Deploy").chunks(1))


def test_labelled_data_has_no_answers(chats):
    with pytest.raises(UsageError, match="expected pairs for --positions answer"):
        ExampleRows(chats, "answer")


def test_an_extraction_without_such_a_token_names_the_row(tmp_path):
    with pytest.raises(PromptError, match=r"row 2: .* match:Deploy, got none that it chooses"):
        extracted(tmp_path / "c", CHATS, "match:Deploy")


def test_a_system_prompt_that_the_cache_leaves_out_is_not_chosen(tmp_path):
    cache = extracted(tmp_path / "c", PAIRS, "all", system_prompt="Be kind.")
    with pytest.raises(MismatchError, match="extract with --positions role:system, or all with"):
        ExampleRows(cache, "role:system")
    own = extracted(tmp_path / "s", PAIRS, "role:system", system_prompt="Be kind.")
    assert {tuple(row) for row in ExampleRows(own).spans()[:, [1]].tolist()} == {(-2,)}
    assert own.examples[0].n_tokens > 1


def test_an_answer_with_special_tokens_left_out_is_not_the_whole_answer(tmp_path):
    special = end_mark()
    for number, answer in enumerate([f"yes{special} no", f"yes{special}"]):
        data = [{"question": "Are you?", "positive": answer, "negative": "no"}]
        cache = extracted(tmp_path / str(number), data, "all")
        with pytest.raises(MismatchError, match="expected every token of every answer"):
            _ = ExampleRows(cache, "answer").counts


def end_mark():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL).eos_token


def test_other_positions_are_taken_from_no_cache_but_one_of_all(tmp_path):
    cache = write_cache(tmp_path / "c", labelled("a", "b"), {3: torch.ones(2, 4)})
    with pytest.raises(MismatchError, match=r"keeps last; .* extract with --positions role:user"):
        ExampleRows(cache, "role:user")
    assert ExampleRows(cache, "last").counts.tolist() == [1, 1]


def without_spans(folder):
    values = torch.arange(20.0).reshape(5, 4)
    return write_cache(folder, labelled("a", "b"), {3: values}, tokens=[2, 3], positions="all")


def test_a_cache_that_does_not_tell_what_its_tokens_stand_for_gives_their_order(tmp_path):
    cache = without_spans(tmp_path / "c")
    assert cache.spans("a") is None
    assert ExampleRows(cache).spans() is None
    owners, values = gathered(ExampleRows(cache, "last-2"), 3)
    assert (owners.tolist(), values[:, 0].tolist()) == ([0, 0, 1, 1], [0, 4, 12, 16])
    assert gathered(ExampleRows(cache, "mean"), 3)[1][:, 0].tolist() == [2, 12]
    for positions in ("last", "role:user", "match:x", "chars:0-1", "answer"):
        with pytest.raises(MismatchError, match=r"has no spans\.pt"):
            ExampleRows(cache, positions)
    assert pieces_of(cache, cache.examples[0]) == [("question 0", None)]


# ---------------------------------------------------------------- pieces


@pytest.mark.parametrize("name", ["chats", "pairs"])
def test_pieces_put_together_are_the_texts_and_hold_every_row_once(name, request):
    cache = request.getfixturevalue(name)
    for example in cache.examples:
        pieces = pieces_of(cache, example)
        assert "".join(text for text, _ in pieces) == "".join(texts_of(example))
        rows = [row for _, row in pieces if row is not None]
        assert rows == list(range(*example.rows))


def texts_of(example):
    data = [c["messages"] for c in CHATS]
    if example.answer is None:
        return [turn["content"] for turn in data[example.idx]]
    return [example.question, example.answer]


def test_pieces_are_what_the_tokens_spell(chats):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    pieces, ids = pieces_of(chats, chats.examples[3]), chats.tokens("b")
    assert len(pieces) > 10
    for text, row in pieces:
        assert text == tokenizer.decode(ids[row])


def test_pieces_of_chosen_rows_count_these(chats):
    rows = ExampleRows(chats, "match:[(]([AB])[)]")
    pieces = rows.pieces(3)
    assert [(text, n) for text, n in pieces if n is not None] == [("B", 0), ("A", 1), ("B", 2)]
    assert "".join(text for text, _ in pieces) == "".join(texts_of(chats.examples[3]))
    assert {n for _, n in ExampleRows(chats, "mean").pieces(3)} == {None}
    assert [n for _, n in ExampleRows(chats).pieces(3)] == list(range(len(pieces)))


# ---------------------------------------------------------------- strangers' files

TOKENS = [2, 3]


def with_spans(folder, spans, **identity):
    records = [
        {"messages": turns("uhello", "athere"), "label": "a"},
        {"text": "hello", "label": "b"},
    ]
    return write_cache(
        folder,
        records,
        {3: torch.arange(20.0).reshape(5, 4)},
        tokens=TOKENS,
        positions="all",
        spans=np.array(spans),
        **identity,
    )


FINE = [[0, 0, 0, 5], [3, 1, 0, 5], [1, -1, 0, 0], [2, 0, 0, 3], [3, 0, 3, 5]]
FORGED = {
    "a message beyond the last": (1, [3, 2, 0, 0]),
    "a message of another example": (3, [2, 1, 0, 3]),
    "no such mark": (2, [1, -3, 0, 0]),
    "characters beyond the text": (4, [3, 0, 3, 6]),
    "characters before the text": (3, [2, 0, -1, 3]),
    "an end before its beginning": (3, [2, 0, 3, 2]),
    "characters of the template": (2, [1, -1, 0, 1]),
    "characters of a system prompt that there is not": (2, [1, -2, 0, 1]),
    "a place beyond the input": (4, [5, 0, 3, 5]),
    "a place before the input": (0, [-1, 0, 0, 5]),
    "a place twice": (4, [2, 0, 3, 5]),
    "the largest numbers": (4, [3, 2**31 - 1, 2**31 - 1, 2**31 - 1]),
}


def test_spans_of_a_planted_cache_are_read_as_written(tmp_path):
    cache = with_spans(tmp_path / "c", FINE)
    assert ExampleRows(cache).spans().tolist() == FINE
    assert torch.load(cache.path / "spans.pt", weights_only=True).tolist() == FINE
    assert gathered(ExampleRows(cache, "role:user"), 3)[1][:, 0].tolist() == [0, 12, 16]


@pytest.mark.parametrize("fault", FORGED)
def test_spans_that_lie_in_no_text_are_refused_in_one_line(tmp_path, fault):
    row, forged = FORGED[fault]
    cache = with_spans(tmp_path / "c", [*FINE[:row], forged, *FINE[row + 1 :]])
    uses = [
        lambda: ExampleRows(cache, "role:user").counts,
        lambda: ExampleRows(cache).spans(),
        lambda: [pieces_of(cache, example) for example in cache.examples],
    ]
    for use in uses:
        with pytest.raises(StoreError, match=r"spans\.pt to hold places .* got \[") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert ExampleRows(cache).counts.tolist() == TOKENS  # nothing else of the cache needs them


def test_input_lengths_beyond_all_sense_are_no_matter(tmp_path):
    cache = with_spans(tmp_path / "c", FINE)
    entries = (cache.path / "metadata.json").read_text()
    huge = entries.replace('"input_tokens": 4', f'"input_tokens": 4{"0" * 100}')
    assert huge != entries
    (cache.path / "metadata.json").write_text(huge)
    forged = reader.Cache(cache.path, cache.info)
    assert ExampleRows(forged, "role:user").counts.tolist() == [1, 2]

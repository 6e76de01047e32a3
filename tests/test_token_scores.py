"""token_scores.json: against the tokenizer, and rows that plain torch reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import labelled, rows_of, train, validate, write_cache

import probecache
from probecache.store.rows import ExampleRows
from probecache.workflow import token_scores as module
from probecache.workflow.scoring import score_layer
from probecache.workflow.token_scores import token_scores_json

MODEL = str(Path(__file__).parents[1] / "models" / "tiny-llama")
LAYER = 3
WORDS = [
    "Solve for x",
    "Plan a dinner 🙂 for six",
    "état 測 of art",
    "my printer beeps",
    "(A) or (B)?",
]
RECORDS = [
    {
        "messages": [
            {"role": "user", "content": f"{WORDS[n % 5]} {n}"},
            {"role": "assistant", "content": f"No. {n}, {WORDS[(n * 3) % 5]}"},
        ],
        "label": ("testing", "deployment")[n % 2],
        "id": f"chat{n}",
    }
    for n in range(13)
]
DIRECTION = np.random.default_rng(0).normal(size=64).astype(np.float32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return probecache.extract(
        model=MODEL,
        data=RECORDS,
        output=tmp_path_factory.mktemp("tokens") / "c",
        positions="all",
        layers=[LAYER],
        device="cpu",
        dtype="float32",
        quiet=True,
    )


@pytest.fixture(scope="module")
def direction(cache):
    return np.resize(DIRECTION, cache.hidden_size)


def told(rows, direction, scores=None):
    tokens = score_layer(rows, LAYER, direction).tokens
    if scores is None:
        scores = tokens.statistics()["mean_score"]
    return json.loads(token_scores_json(rows, LAYER, tokens, scores)), scores


def example_named(cache, name):
    return next(n for n, r in enumerate(cache.examples) if r.id == name)


def scores_by_hand(cache, direction, example):
    record = cache.examples[example]
    rows = rows_of(cache, record.label, LAYER)[slice(*record.rows)]
    return (rows.double() @ torch.from_numpy(direction).double()).numpy()


def test_the_highest_and_the_lowest_are_told_each_from_its_end(cache, direction):
    found, scores = told(ExampleRows(cache), direction)
    order = np.argsort(scores, kind="stable")
    expected = [cache.examples[n].id for n in [*order[::-1][:5], *order[:5]]]
    assert [one["id"] for one in found["prompts"]] == expected
    assert [one["end"] for one in found["prompts"]] == ["highest"] * 5 + ["lowest"] * 5
    for one in found["prompts"]:
        example = example_named(cache, one["id"])
        assert one["score"] == scores[example]
        assert one["class"] == cache.examples[example].label
    assert found["layer"] == LAYER


@pytest.mark.parametrize("count", [2, 3, 7, 9, 10, 11])
def test_no_prompt_is_told_at_both_ends(tmp_path, count):
    records = labelled(*["testing", "deployment"] * 6)[:count]
    spans = np.array([[place, 0, place, place + 1] for place in range(2)] * count)
    where = write_cache(
        tmp_path / "c",
        records,
        {LAYER: torch.randn(2 * count, 5)},
        tokens=[2] * count,
        positions="all",
        spans=spans,
    )
    found, _ = told(ExampleRows(where), np.ones(5, dtype=np.float32))
    names = [one["id"] for one in found["prompts"]]
    assert len(set(names)) == len(names) == 2 * min(5, count // 2)


def test_pieces_put_together_are_the_texts_and_every_token_has_its_score(cache, direction):
    found, _ = told(ExampleRows(cache), direction)
    for one in found["prompts"]:
        example = example_named(cache, one["id"])
        texts = [message["content"] for message in RECORDS[example]["messages"]]
        assert "".join(piece["text"] for piece in one["pieces"]) == "".join(texts)
        scored = [piece["score"] for piece in one["pieces"] if piece["score"] is not None]
        by_hand = scores_by_hand(cache, direction, example)
        np.testing.assert_allclose(scored, by_hand, atol=1e-12)
        assert np.mean(scored) == pytest.approx(one["score"], abs=1e-9)


def test_bounds_are_those_of_all_tokens_of_the_layer(cache, direction):
    found, _ = told(ExampleRows(cache), direction)
    every = np.concatenate([scores_by_hand(cache, direction, n) for n in range(13)])
    assert (found["low"], found["high"]) == pytest.approx((every.min(), every.max()), abs=1e-12)


def test_text_that_no_chosen_row_stands_for_has_no_score(cache, direction):
    found, _ = told(ExampleRows(cache, "role:assistant"), direction)
    for one in found["prompts"]:
        user, assistant = RECORDS[example_named(cache, one["id"])]["messages"]
        pieces = [(piece["text"], piece["score"]) for piece in one["pieces"]]
        assert "".join(text for text, _ in pieces) == user["content"] + assistant["content"]
        scored = "".join(text for text, score in pieces if score is not None)
        assert scored == assistant["content"]


def test_equal_scores_are_ranked_the_same_every_time(cache, direction):
    first, _ = told(ExampleRows(cache), direction, np.zeros(13))
    again, _ = told(ExampleRows(cache), direction, np.zeros(13))
    assert first == again
    assert len({one["id"] for one in first["prompts"]}) == 10


def test_a_long_prompt_is_cut_and_the_beginning_kept(cache, direction, monkeypatch):
    monkeypatch.setattr(module, "_MOST_PIECES", 4)
    found, _ = told(ExampleRows(cache), direction)
    for one in found["prompts"]:
        assert len(one["pieces"]) == 4
        texts = "".join(m["content"] for m in RECORDS[example_named(cache, one["id"])]["messages"])
        assert texts.startswith("".join(piece["text"] for piece in one["pieces"]))


@pytest.mark.parametrize("positions", ["mean", "all"])
def test_rows_that_are_no_tokens_or_not_told_give_no_file(tmp_path, cache, direction, positions):
    if positions == "mean":
        rows = ExampleRows(cache, "mean")
    else:
        planted = torch.randn(8, len(direction))
        labels = labelled("testing", "deployment", "testing", "deployment")
        where = write_cache(
            tmp_path / "c", labels, {LAYER: planted}, tokens=[2] * 4, positions="all"
        )
        rows = ExampleRows(where)
    tokens = score_layer(rows, LAYER, direction).tokens
    assert token_scores_json(rows, LAYER, tokens, np.zeros(len(rows.counts))) is None


@pytest.mark.parametrize("aggregate", ["mean", "last", "top-2"])
def test_a_validation_ranks_by_the_score_it_quotes(cache, tmp_path, aggregate):
    from probecache.aggregate import parse_aggregate

    vectors = train(cache, tmp_path / "run")
    validate(cache, vectors, tmp_path / "v", aggregate=parse_aggregate(aggregate), control_count=0)
    found = json.loads((tmp_path / "v" / "token_scores.json").read_text("utf-8"))
    direction = vectors.directions[LAYER]
    for one in found["prompts"]:
        scores = scores_by_hand(cache, direction, example_named(cache, one["id"]))
        made = {
            "mean": scores.mean(),
            "last": scores[-1],
            "top-2": np.sort(scores)[-2:].mean(),
        }[aggregate]
        assert one["score"] == pytest.approx(made, abs=1e-9)


def test_a_validation_of_one_token_each_has_no_such_file(tmp_path):
    labels = labelled(*["testing", "deployment"] * 6)
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    cache = write_cache(tmp_path / "c", labels, {LAYER: rows})
    validate(cache, train(cache, tmp_path / "run"), tmp_path / "v", control_count=0)
    assert not (tmp_path / "v" / "token_scores.json").exists()


def test_all_is_sorted_and_exists():
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)

"""token_scores.json: the most and least scored prompts of a validation, token by token.

Guarantee: the pieces of a prompt's texts in order make up the texts; a piece without a score is
text that no scored token stands for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from probecache.store.seal import encode_json

if TYPE_CHECKING:
    from probecache.store.rows import ExampleRows
    from probecache.workflow.scoring import TokenScores

__all__ = ["token_scores_json"]

_MOST_PROMPTS = 5
_MOST_PIECES = 2000  # of a prompt: nobody reads more, and the report holds them all


def token_scores_json(
    rows: ExampleRows, layer: int, tokens: TokenScores, scores: NDArray[np.float64]
) -> bytes | None:
    """The file's content; None where a row is no token, or the cache does not say which.

    Args:
        rows: what was scored.
        layer: which layer.
        tokens: the scores of its tokens.
        scores: [examples], by which the prompts are ranked.
    """
    if rows.positions.one_row or rows.spans() is None:
        return None
    first = dict(zip(tokens.owners[tokens.starts].tolist(), tokens.starts.tolist(), strict=True))
    order = np.argsort(scores, kind="stable").tolist()
    count = min(_MOST_PROMPTS, len(order) // 2)
    ends = [("highest", one) for one in order[::-1][:count]]
    ends += [("lowest", one) for one in order[:count]]
    content = {
        "layer": layer,
        "low": float(tokens.scores.min()),
        "high": float(tokens.scores.max()),
        "prompts": [
            _prompt(rows, example, end, float(scores[example]), tokens.scores[first[example] :])
            for end, example in ends
        ],
    }
    return encode_json(content)


def _prompt(
    rows: ExampleRows, example: int, end: str, score: float, tokens: NDArray[np.float64]
) -> dict[str, Any]:
    record = rows.cache.examples[example]
    pieces = rows.pieces(example)[:_MOST_PIECES]
    return {
        "id": record.id,
        "class": record.label,
        "score": score,
        "end": end,
        "pieces": [
            {"text": text, "score": None if row is None else float(tokens[row])}
            for text, row in pieces
        ],
    }

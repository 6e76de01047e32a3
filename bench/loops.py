"""Extraction as people write it by hand: the best plain loop, and the documented one.

Neither uses anything of probecache but the token ids and the kept positions. Both return rows
[kept rows of all prompts, hidden] per layer, in the order of the prompts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from probecache.types import TokenizedPrompt

_SAMPLE = 0.1  # share of the batches on which a token budget is judged
Rows = dict[int, torch.Tensor]


def _room(prompts: Sequence[TokenizedPrompt], layers: Sequence[int], config: Any) -> Rows:
    count = sum(len(prompt.kept) for prompt in prompts)
    return {layer: torch.empty(count, config.hidden_size, dtype=config.dtype) for layer in layers}


def _places(prompts: Sequence[TokenizedPrompt]) -> list[slice]:
    """Where each prompt's rows go."""
    stops = np.cumsum([len(prompt.kept) for prompt in prompts]).tolist()
    return [
        slice(stop - len(prompt.kept), stop) for prompt, stop in zip(prompts, stops, strict=True)
    ]


@dataclass
class PlainLoop:
    """Sorted by length, padded batches, blocks behind the deepest layer cut off, hooks.

    Hooks keep the wanted rows alone; no KV cache, no head, SDPA, `inference_mode`.
    """

    model: Any
    layers: tuple[int, ...]
    budget: int = 0
    padded_tokens: int = field(default=0, init=False)

    @classmethod
    def load(cls, folder: Path, layers: tuple[int, ...], dtype: str) -> PlainLoop:
        """The model of a folder, cut behind its deepest wanted layer."""
        model = AutoModel.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        del model.layers[max(layers) :]
        return cls(model, layers)

    def batches(self, prompts: Sequence[TokenizedPrompt], budget: int) -> list[list[int]]:
        """Prompts of like length together, longest first, padded size within the budget."""
        found: list[list[int]] = []
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
            if not found or len(prompts[found[-1][0]]) * (len(found[-1]) + 1) > budget:
                found.append([])
            found[-1].append(index)
        return found

    def choose_budget(
        self, prompts: Sequence[TokenizedPrompt], budgets: Sequence[int]
    ) -> dict[int, float]:
        """Set the budget that promises the fewest seconds; returns what each promises.

        The better of two trials each, in turn: on a shared machine one may be disturbed.
        """
        out, places = _room(prompts, self.layers, self.model.config), _places(prompts)
        promised = dict.fromkeys(budgets, math.inf)
        self._forward(prompts, self.batches(prompts, budgets[0])[0], places, out)
        for _ in range(2):
            for budget in budgets:
                seconds = self._promise(prompts, self.batches(prompts, budget), places, out)
                promised[budget] = min(promised[budget], seconds)
        self.budget = min(budgets, key=lambda budget: promised[budget])
        return promised

    def _promise(
        self,
        prompts: Sequence[TokenizedPrompt],
        batches: list[list[int]],
        places: list[slice],
        out: Rows,
    ) -> float:
        """Seconds that these batches will take, judged by a tenth of them, long and short."""
        sizes = [len(batch) * len(prompts[batch[0]]) for batch in batches]
        count = max(1, round(_SAMPLE * len(batches)))
        chosen = sorted(set(np.linspace(0, len(batches) - 1, count).astype(int).tolist()))
        started = time.perf_counter()
        for place in chosen:
            self._forward(prompts, batches[place], places, out)
        seconds = time.perf_counter() - started
        return seconds * sum(sizes) / sum(sizes[place] for place in chosen)

    def run(self, prompts: Sequence[TokenizedPrompt]) -> Rows:
        """All rows."""
        out, places = _room(prompts, self.layers, self.model.config), _places(prompts)
        batches = self.batches(prompts, self.budget)
        self.padded_tokens = sum(len(batch) * len(prompts[batch[0]]) for batch in batches)
        for batch in batches:
            self._forward(prompts, batch, places, out)
        return out

    @torch.inference_mode()
    def _forward(
        self,
        prompts: Sequence[TokenizedPrompt],
        batch: list[int],
        places: list[slice],
        out: Rows,
    ) -> None:
        longest = len(prompts[batch[0]])
        ids = torch.full((len(batch), longest), 4)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, : len(prompts[index])] = torch.from_numpy(prompts[index].ids)
            mask[row, : len(prompts[index])] = 1
        source = torch.from_numpy(
            np.concatenate([r * longest + prompts[index].kept for r, index in enumerate(batch)])
        ).long()
        target = torch.cat(
            [torch.arange(places[index].start, places[index].stop) for index in batch]
        )

        def keep(layer: int, hidden: torch.Tensor) -> None:
            out[layer][target] = hidden.flatten(0, 1)[source]

        hooks = [self._hook(layer, keep) for layer in self.layers]
        self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        for hook in hooks:
            hook.remove()

    def _hook(self, layer: int, keep: Any) -> Any:
        if layer == 0:
            return self.model.embed_tokens.register_forward_hook(lambda _m, _i, out: keep(0, out))
        return self.model.layers[layer - 1].register_forward_hook(
            lambda _m, _i, out: keep(layer, out if isinstance(out, torch.Tensor) else out[0])
        )


@dataclass
class DocumentedLoop:
    """`model(**batch, output_hidden_states=True)` in data order, whole model with its head.

    Layers of the last block are beyond it: transformers norms the last hidden state.
    """

    model: Any
    tokenizer: Any
    layers: tuple[int, ...]
    batch: int

    @classmethod
    def load(cls, folder: Path, layers: tuple[int, ...], dtype: str, batch: int) -> DocumentedLoop:
        """Model and tokenizer of a folder."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        return cls(model, tokenizer, layers, batch)

    @torch.no_grad()
    def run(self, prompts: Sequence[TokenizedPrompt]) -> Rows:
        """All rows. The ids are probecache's, padded to a batch by the tokenizer."""
        out, places = _room(prompts, self.layers, self.model.config), _places(prompts)
        for start in range(0, len(prompts), self.batch):
            indices = range(start, min(start + self.batch, len(prompts)))
            ids = {"input_ids": [prompts[index].ids.tolist() for index in indices]}
            batch = self.tokenizer.pad(ids, return_tensors="pt")
            outputs = self.model(**batch, output_hidden_states=True)
            for layer in self.layers:
                for row, index in enumerate(indices):
                    kept = torch.from_numpy(prompts[index].kept).long()
                    out[layer][places[index]] = outputs.hidden_states[layer][row, kept]
        return out

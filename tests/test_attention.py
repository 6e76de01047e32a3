"""Attention over packs: the same numbers as each prompt alone, whatever rule a layer sees by, and a
model that is left as it was found.

Packs go through the whole model here, one after the other, without any engine.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import BLOCKS, FAMILIES, WINDOW, build, relative_difference

from probecache.attention import PackPass, attend_to_ancestors
from probecache.loaded import hidden_of
from probecache.models import ModelOptions, open_model
from probecache.plan import plan_stretches
from probecache.prefixes import PrefixTree
from probecache.types import Dtype, TokenizedPrompt

CAUSAL = [name for name, family in FAMILIES.items() if not family.masked]
UNSHARED = ["falcon", "bloom"]  # both add to the scores what they make of a mask themselves
SHARED = [name for name in CAUSAL if name not in UNSHARED]
CHUNK = 8  # of llama4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    built = {}

    def model(name, dtype=Dtype.FLOAT32):
        if name not in built:
            built[name] = build(FAMILIES[name], tmp_path_factory.mktemp(name))
        source = open_model(ModelOptions(str(built[name]), dtype=dtype, device="cpu"))
        return source.load(BLOCKS)

    return model


def long_prompts():
    """Four prompts of up to 90 tokens that branch late, so that windows and chunks lie behind."""
    drawn = np.random.default_rng(0)
    stem = drawn.integers(3, 260, 60)
    tails = [drawn.integers(3, 260, count) for count in (30, 12, 1)]
    all_ids = [np.concatenate([stem, tail]) for tail in tails]
    all_ids.append(np.concatenate([stem[:25], tails[0]]))
    return [TokenizedPrompt(ids.astype("i4"), np.arange(len(ids), dtype="i4")) for ids in all_ids]


def through_packs(loaded, prompts, budget, tile=16):
    """Output of the last block, [tokens, hidden] per prompt, and how often each pack attended."""
    tree, context, calls = PrefixTree(prompts), {}, []
    path, found, caught = torch.empty(0, 0), {}, []
    hook = loaded.blocks[-1].register_forward_hook(lambda _m, _i, out: caught.append(out))
    with torch.inference_mode(), attend_to_ancestors([loaded.model]):
        for step in plan_stretches(tree.bounds, tree.shared, budget):
            pack = tree.pack(step.start, step.stop, tile)
            running = PackPass(pack, context)
            with running.running():
                loaded.forward(
                    input_ids=torch.from_numpy(pack.ids)[None],
                    position_ids=torch.from_numpy(pack.depths)[None],
                    attention_mask=torch.ones(1, len(pack.ids), dtype=torch.long),
                )
            own = hidden_of(caught.pop())[0]
            rows = torch.cat([path, own]) if pack.context else own
            found |= {n: rows[at] for n, at in zip(pack.prompts, pack.rows, strict=True)}
            path, context = rows[pack.carried], running.carried
            calls.append(running.calls)
    hook.remove()
    return found, calls


def alone(loaded, prompt):
    ids = torch.from_numpy(prompt.ids.astype("i8"))[None]
    with torch.inference_mode():
        return loaded.plain_hidden_states(ids)[-1]


def configs_of(model):
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return list(found.values())


def implementations(model):
    return [config._attn_implementation for config in configs_of(model)]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", SHARED)
def test_long_prompts_over_several_packs_equal_each_alone(models, name):
    loaded, prompts = models(name), long_prompts()
    found, calls = through_packs(loaded, prompts, 35)
    for index, prompt in enumerate(prompts):
        plain = alone(loaded, prompt)
        assert relative_difference(found[index], plain) < FAMILIES[name].tolerance
    assert calls == [BLOCKS] * len(calls)
    assert len(calls) > 3


@pytest.mark.parametrize("name", ["mistral", "llama4", "gpt_oss", "gemma2", "gpt2"])
@pytest.mark.parametrize(("budget", "tile"), [(1, 1), (5, 3), (64, 7), (1000, 1000)])
def test_any_packs_and_tiles_give_the_same_numbers(models, name, budget, tile):
    loaded, prompts = models(name), long_prompts()
    found, _ = through_packs(loaded, prompts, budget, tile)
    for index, prompt in enumerate(prompts):
        plain = alone(loaded, prompt)
        assert relative_difference(found[index], plain) < FAMILIES[name].tolerance


@pytest.mark.parametrize("dtype", [Dtype.BFLOAT16, Dtype.FLOAT16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_half_precision_masks_no_more_and_no_less(models, name, dtype):
    loaded, prompts = models(name, dtype), long_prompts()
    found, _ = through_packs(loaded, prompts, 35)
    for index, prompt in enumerate(prompts):
        plain = alone(loaded, prompt)
        rows = (found[index].double() - plain.double()).norm(dim=1) / plain.double().norm(dim=1)
        assert float(rows.median()) < 0.05


def changed_at(place, prompts):
    """Other prompts, that have another token at one place."""
    return [
        TokenizedPrompt(np.where(np.arange(len(p)) == place, 4, p.ids).astype("i4"), p.kept)
        for p in prompts
    ]


def test_what_lies_beyond_every_window_has_no_part_in_a_row(models):
    loaded, prompts = models("mistral"), long_prompts()
    here, _ = through_packs(loaded, prompts, 35)
    there, _ = through_packs(loaded, changed_at(2, prompts), 35)
    reach = 2 + BLOCKS * (WINDOW - 1)
    assert torch.equal(here[0][reach + 1 :], there[0][reach + 1 :])
    assert (here[0][2 : reach + 1] != there[0][2 : reach + 1]).any(dim=1).all()


def test_where_layers_alternate_the_full_ones_reach_back_over_all_packs(models):
    for name in ("gemma2", "gpt_oss", "cohere2", "llama4"):
        loaded, prompts = models(name), long_prompts()
        assert loaded.model.config.layer_types[-1] == "full_attention"
        here, _ = through_packs(loaded, prompts, 35)
        there, _ = through_packs(loaded, changed_at(2, prompts), 35)
        # Further on than the windows below reach; one token in so many may hide in the rounding.
        changed = (here[0][2:] != there[0][2:]).any(dim=1)
        assert float(changed.double().mean()) > 0.95


def test_chunks_begin_anew_at_depths_in_a_prompt_and_not_in_a_pack(models):
    """All blocks of this model but the last attend within chunks: so the first block alone."""
    loaded = models("llama4")
    caught = []
    prompts = long_prompts()[:1]
    tree = PrefixTree(prompts)
    hook = loaded.blocks[0].register_forward_hook(lambda _m, _i, out: caught.append(out))
    others = PrefixTree(changed_at(CHUNK - 1, prompts))
    for one in (tree, others):
        context = {}
        with torch.inference_mode(), attend_to_ancestors([loaded.model]):
            for start, stop in ((0, 5), (5, 21)):
                pack = one.pack(start, stop, 16)
                running = PackPass(pack, context)
                with running.running():
                    loaded.forward(
                        input_ids=torch.from_numpy(pack.ids)[None],
                        position_ids=torch.from_numpy(pack.depths)[None],
                        attention_mask=torch.ones(1, len(pack.ids), dtype=torch.long),
                    )
                context = running.carried
    hook.remove()
    here, there = (torch.cat([hidden_of(x)[0] for x in caught[at : at + 2]]) for at in (0, 2))
    differ = (here != there).any(dim=1).nonzero().flatten().tolist()
    assert differ == [CHUNK - 1]


# ---------------------------------------------------------------- models that do not come through


@pytest.mark.parametrize("name", UNSHARED)
def test_a_model_that_makes_its_own_of_a_mask_is_told_apart(models, name):
    with pytest.raises(TypeError, match="_TreeMask"):
        through_packs(models(name), long_prompts(), 35)


def test_a_block_that_does_not_attend_here_is_missed_in_the_count(models):
    loaded = models("llama")
    attention = loaded.blocks[1].self_attn
    attention.forward = lambda hidden_states, **_options: (hidden_states, None)
    _, calls = through_packs(loaded, long_prompts(), 1000)
    assert calls == [BLOCKS - 1]


def test_attention_without_the_trees_mask_is_an_error(models):
    loaded = models("llama")
    pack = PrefixTree(long_prompts()).pack(0, 5, 16)
    hook = loaded.blocks[0].register_forward_pre_hook(
        lambda _m, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
    )
    with (
        attend_to_ancestors([loaded.model]),
        PackPass(pack, {}).running(),
        pytest.raises(TypeError, match="a mask of type NoneType"),
    ):
        loaded.forward(input_ids=torch.from_numpy(pack.ids)[None])
    hook.remove()


def test_a_mask_that_a_model_cuts_down_is_an_error_unless_all_of_it_stays(models):
    loaded = models("llama")
    pack = PrefixTree(long_prompts()).pack(0, 5, 16)
    masks = []
    hook = loaded.blocks[0].register_forward_pre_hook(
        lambda _m, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with attend_to_ancestors([loaded.model]), PackPass(pack, {}).running(), torch.no_grad():
        loaded.forward(
            input_ids=torch.from_numpy(pack.ids)[None],
            attention_mask=torch.ones(1, len(pack.ids), dtype=torch.long),
        )
    hook.remove()
    mask = masks[0]
    assert mask[:, :, :, :] is mask
    with pytest.raises(TypeError, match="a mask cut to"):
        mask[:, :, :3, :]


def test_keys_and_values_that_a_model_made_are_never_written_to():
    """It may keep them for later blocks, as Gemma 4 does."""
    texts = [[1, 5, 6, 7, 8], [1, 9, 10, 11], [1, 12, 13]]
    kept = np.arange(1, dtype="i4")
    tree = PrefixTree([TokenizedPrompt(np.array(ids, "i4"), kept) for ids in texts])

    def attention(_module, query, *_rest):
        return query.transpose(1, 2), None

    context, made = {}, []
    mask = SimpleNamespace(on=lambda *_: [None])
    for start, stop in ((0, 5), (5, 8), (8, 10)):
        pack = tree.pack(start, stop, 16)
        own = [torch.randn(1, 2, stop - start, 4) for _ in range(3)]
        made += [(one, one.clone()) for one in own]
        running = PackPass(pack, context)
        running.attend(attention, None, *own, mask)
        assert all(torch.equal(now, then) for now, then in made)
        context = running.carried


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_images", "gemma4"])
def test_configs_are_as_they_were_afterwards(models, name):
    model = models(name).model
    before = implementations(model)
    with attend_to_ancestors([model]):
        inside = implementations(model)
        assert all(name.startswith("prefix_tree_") for name in inside)
        assert [name.removeprefix("prefix_tree_") for name in inside] == before
    assert implementations(model) == before


def test_configs_are_as_they_were_after_an_error(models):
    model = models("gemma3_images").model
    before = implementations(model)
    with pytest.raises(KeyError), attend_to_ancestors([model]):
        raise KeyError
    assert implementations(model) == before


def test_a_config_within_a_config_is_changed_along(models):
    model = models("gemma3_images").model
    assert len(configs_of(model)) > 1
    inner = model.config.get_text_config()
    with attend_to_ancestors([model]):
        assert inner._attn_implementation.startswith("prefix_tree_")


def test_entering_twice_is_entering_once(models):
    model = models("llama").model
    before = implementations(model)
    with attend_to_ancestors([model]):
        inside = implementations(model)
        with attend_to_ancestors([model, *model.children()]):
            assert implementations(model) == inside
        assert implementations(model) == inside
    assert implementations(model) == before


def test_a_pass_that_failed_is_no_longer_the_running_one(models):
    loaded, prompts = models("llama"), long_prompts()
    pack = PrefixTree(prompts[3:]).pack(0, 5, 16)
    with pytest.raises(KeyError), PackPass(pack, {}).running():
        raise KeyError
    with attend_to_ancestors([loaded.model]), pytest.raises(LookupError):
        loaded.forward(input_ids=torch.from_numpy(pack.ids)[None])

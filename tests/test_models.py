"""Which weights are read, what names them, and what is refused; independent of the engine.

Checkpoints are changed here with the safetensors library alone, and what was read off the disk is
asked of the kernel.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from families import BLOCKS, FAMILIES, RECORDS, build, tokenizer
from safetensors.torch import load_file, save_file

import probecache
from probecache.errors import ModelError, UsageError
from probecache.models import ModelOptions, open_model

LAYERS = tuple(range(BLOCKS + 1))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build(FAMILIES["llama"], tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = build(FAMILIES["llama"], tmp_path_factory.mktemp("sharded"), shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def source_of(folder, **options):
    return open_model(ModelOptions(str(folder), device="cpu", **options))


def change(folder, change_tensor):
    """Rewrite a checkpoint; change_tensor(name, tensor) gives a new tensor, or None to drop it."""
    for file in folder.glob("*.safetensors"):
        tensors = {name: change_tensor(name, t) for name, t in load_file(file).items()}
        kept = {name: t.contiguous() for name, t in tensors.items() if t is not None}
        save_file(kept, file, metadata={"format": "pt"})


def nudge(folder, wanted):
    """Change one element of the one tensor called `wanted`."""
    seen = []

    def one_element(name, tensor):
        if name == wanted:
            seen.append(name)
            tensor.view(-1)[-1] += 1
        return tensor

    change(folder, one_element)
    assert seen == [wanted]


def edit_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def extracted(folder, output, **options):
    settings = {"layers": "all", "positions": "all", "quiet": True, "device": "cpu"}
    return probecache.extract(
        model=str(folder), data=RECORDS, output=output, **{**settings, **options}
    )


# ---------------------------------------------------------------- only what is needed is read


@pytest.mark.parametrize("name", FAMILIES)
def test_the_planned_bytes_are_those_of_the_tensors_that_are_loaded(name, tmp_path):
    source = source_of(build(FAMILIES[name], tmp_path / name))
    for depth in (0, 1, BLOCKS - 1, BLOCKS):
        loaded = source.load(depth).model
        expected = sum(
            stored.nbytes
            for name, stored in loaded.state_dict().items()
            if "pooler" not in name  # not in the checkpoint of a masked LM; never used
        )
        assert source.weight_bytes(depth) == expected
        assert source.loaded_bytes(depth) == expected


def test_weights_of_deeper_blocks_and_of_the_head_may_be_anything(sharded, tmp_path):
    before = extracted(sharded, tmp_path / "before", layers=[0, 1, 2])
    ruined = copied(sharded, tmp_path)
    deeper = ("model.layers.2.", "model.layers.3.", "lm_head.")
    change(ruined, lambda n, t: torch.full_like(t, torch.nan) if n.startswith(deeper) else t)
    after = extracted(ruined, tmp_path / "after", layers=[0, 1, 2])
    for label in before.classes:
        for layer in before.layers:
            assert torch.equal(before[label, layer], after[label, layer])
            assert torch.isfinite(after[label, layer]).all()


def test_weights_of_deeper_blocks_and_of_the_head_may_be_gone(llama, tmp_path):
    cut = copied(llama, tmp_path)
    deeper = ("model.layers.2.", "model.layers.3.", "lm_head.")
    change(cut, lambda n, t: None if n.startswith(deeper) else t)
    assert extracted(cut, tmp_path / "cache", layers=[2]).layers == (2,)


def resident_bytes(path):
    """Bytes of a file that the kernel holds in its page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        address = ctypes.addressof(start := ctypes.c_char.from_buffer(mapped))
        failed = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages)
        del start
        if failed:
            pytest.skip("the kernel does not tell which pages it holds")
        return int((np.frombuffer(pages, dtype=np.uint8) & 1).sum()) * mmap.PAGESIZE


def drop_from_page_cache(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux page cache")
def test_shards_without_needed_weights_are_never_read_from_disk(tmp_path):
    family = FAMILIES["llama"]
    large = {**family.settings, "hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    folder = build(
        type(family)("large", family.kind, {**large, "num_hidden_layers": 8}),
        tmp_path / "large",
        shard="3MB",
    )
    # Within a file the kernel reads ahead as far as it likes; never into another.
    words = ("embed_tokens", "layers.0.", "layers.1.", "model.norm")
    shards = {
        file: sum(t.nbytes for name, t in load_file(file).items() if any(w in name for w in words))
        for file in folder.glob("*.safetensors")
    }
    for file in shards:
        drop_from_page_cache(file)
    if sum(map(resident_bytes, shards)) > 1 << 20:
        pytest.skip("this file system keeps its pages")
    extracted(folder, tmp_path / "cache", layers=[2])
    assert sum(needed > 0 for needed in shards.values()) < len(shards) / 2
    for file, needed in shards.items():
        assert resident_bytes(file) > 0.9 * needed if needed else resident_bytes(file) == 0


# ---------------------------------------------------------------- what names the weights


def test_a_moved_folder_keeps_its_fingerprints(llama, tmp_path):
    assert source_of(copied(llama, tmp_path)).weight_samples(LAYERS) == source_of(
        llama
    ).weight_samples(LAYERS)


def test_resharding_keeps_the_fingerprints(llama, sharded):
    found = source_of(sharded).weight_samples(LAYERS)
    assert found == source_of(llama).weight_samples(LAYERS)


def test_fingerprints_of_one_layer_do_not_depend_on_which_others_are_asked_for(llama):
    every = source_of(llama).weight_samples(LAYERS)
    assert source_of(llama).weight_samples((0, 2)) == {0: every[0], 2: every[2]}
    assert len(set(every.values())) == len(LAYERS)


def changed_layers(folder, tmp_path, tensor):
    changed = copied(folder, tmp_path)
    nudge(changed, tensor)
    before = source_of(folder).weight_samples(LAYERS)
    after = source_of(changed).weight_samples(LAYERS)
    return [layer for layer in LAYERS if before[layer] != after[layer]]


@pytest.mark.parametrize("block", range(BLOCKS))
def test_one_changed_weight_changes_the_layers_behind_its_block_alone(llama, tmp_path, block):
    tensor = f"model.layers.{block}.mlp.up_proj.weight"
    assert changed_layers(llama, tmp_path, tensor) == list(range(block + 1, BLOCKS + 1))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "model.embed_tokens.weight"),
        ("gpt2", "transformer.wpe.weight"),
        ("bloom", "transformer.word_embeddings_layernorm.weight"),
        ("bert", "bert.embeddings.LayerNorm.weight"),
        ("modernbert", "model.embeddings.norm.weight"),
    ],
)
def test_a_changed_embedding_or_its_norm_changes_every_layer(name, tensor, tmp_path):
    folder = build(FAMILIES[name], tmp_path / name)
    assert changed_layers(folder, tmp_path, tensor) == list(LAYERS)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "model.norm.weight"),
        ("llama", "lm_head.weight"),
        ("gemma3_images", "language_model.model.norm.weight"),
        ("gpt2", "transformer.ln_f.weight"),
        ("gpt_neox", "gpt_neox.final_layer_norm.weight"),
        ("opt", "model.decoder.final_layer_norm.weight"),
        ("modernbert", "model.final_norm.weight"),
    ],
)
def test_the_final_norm_and_the_head_name_no_layer(name, tensor, tmp_path):
    folder = build(FAMILIES[name], tmp_path / name)
    if tensor not in names_of(folder):
        pytest.fail(f"{name} has no {tensor}, but {sorted(names_of(folder))}")
    assert changed_layers(folder, tmp_path, tensor) == []


def names_of(folder):
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def test_the_file_that_is_fingerprinted_is_the_file_that_is_loaded(sharded, tmp_path):
    # Where both lie in a folder, transformers takes the single file and leaves the index.
    both = copied(sharded, tmp_path)
    other = build(FAMILIES["llama"], tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", both)
    loaded = source_of(both).load(1).model.state_dict()["embed_tokens.weight"]
    assert torch.equal(loaded, load_file(other / "model.safetensors")["model.embed_tokens.weight"])
    assert source_of(both).weight_samples(LAYERS) == source_of(other).weight_samples(LAYERS)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "lost", ["model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"]
)
def test_a_missing_weight_is_refused_and_never_drawn_at_random(llama, tmp_path, lost):
    holed = copied(llama, tmp_path)
    change(holed, lambda name, tensor: None if name == lost else tensor)
    with pytest.raises(ModelError, match=r"every weight .* 1 are missing"):
        extracted(holed, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("bend", "words"),
    [
        (lambda tensor: tensor[:-1], r"0\.mlp\.up_proj.* \(48, 32\) .* another shape, \(47, 32\)"),
        (lambda tensor: tensor.T, r"1 are missing or of another shape.*0\.mlp\.up_proj"),
    ],
    ids=["cut", "turned"],
)
def test_a_weight_of_another_shape_is_refused(llama, tmp_path, bend, words):
    bent = copied(llama, tmp_path)
    wanted = "model.layers.0.mlp.up_proj.weight"
    change(bent, lambda name, tensor: bend(tensor).contiguous() if name == wanted else tensor)
    with pytest.raises(ModelError, match=words):
        extracted(bent, tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_hidden_layers", BLOCKS + 3, f"expected block {BLOCKS} in .* counts {BLOCKS + 3} "),
        *((name, 10**12, "embed_tokens.*another shape") for name in ("hidden_size", "vocab_size")),
        ("intermediate_size", 10**12, r"mlp\.down_proj.*another shape"),
    ],
)
def test_a_plan_refuses_a_config_that_the_weights_do_not_bear_out(
    llama, tmp_path, name, value, words
):
    bent = copied(llama, tmp_path)
    config = json.loads((bent / "config.json").read_text())
    (bent / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ModelError, match=words):
        probecache.plan_extraction(model=str(bent), data=RECORDS)


def test_a_checkpoint_of_more_blocks_than_its_config_counts_is_read_as_it_says(llama, tmp_path):
    """As those are that predict further tokens by blocks of their own."""
    short = copied(llama, tmp_path)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"num_hidden_layers": BLOCKS - 1}))
    assert extracted(short, tmp_path / "cache").layers == tuple(range(BLOCKS))


@pytest.mark.parametrize("blocks", [0, -1, "two", None])
def test_a_config_without_a_number_of_blocks_is_refused(llama, tmp_path, blocks):
    bent = copied(llama, tmp_path)
    config = json.loads((bent / "config.json").read_text())
    (bent / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    with pytest.raises(ModelError, match="num_hidden_layers"):
        extracted(bent, tmp_path / "cache")


def test_pickled_weights_are_refused(llama, tmp_path):
    pickled = copied(llama, tmp_path)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled weights \(pytorch_model.bin\)"):
        extracted(pickled, tmp_path / "cache")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c"])
def test_a_path_to_nothing_is_refused(name, tmp_path):
    with pytest.raises(ModelError, match="nothing there"):
        extracted(name, tmp_path / "cache")


def test_a_file_in_place_of_a_folder_is_refused(llama, tmp_path):
    with pytest.raises(ModelError, match="a file"):
        extracted(llama / "config.json", tmp_path / "cache")


def test_a_folder_without_a_config_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="expected a Hugging Face model"):
        extracted(tmp_path / "empty", tmp_path / "cache")


def test_an_encoder_decoder_is_refused(tmp_path):
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer(FAMILIES["llama"]).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="encoder-decoder t5"):
        extracted(tmp_path / "t5", tmp_path / "cache")


def test_a_model_without_a_tokenizer_is_refused(llama, tmp_path):
    mute = copied(llama, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (mute / name).unlink()
    with pytest.raises(ModelError, match="expected a tokenizer"):
        extracted(mute, tmp_path / "cache")


HEADERS = {
    "longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "not JSON": (4).to_bytes(8, "little") + b"\xff\xfe{}",
    "nested beyond reason": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a list": (2).to_bytes(8, "little") + b"[]",
    "cut short": b"\x01\x02",
    "nothing": b"",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_damaged_header_is_refused(llama, tmp_path, header):
    damaged = copied(llama, tmp_path)
    (damaged / "model.safetensors").write_bytes(HEADERS[header])
    with pytest.raises(ModelError, match="expected a safetensors file"):
        extracted(damaged, tmp_path / "cache")


ENTRIES = {
    "beyond the end": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 50]},
    "before the start": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
    "of no size": {"dtype": "F32", "shape": ["four"], "data_offsets": [0, 16]},
    "of less than no size": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
    "of another size": {"dtype": "F32", "shape": [400], "data_offsets": [0, 16]},
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_header_that_lies_about_a_tensor_is_refused(llama, tmp_path, entry):
    damaged = copied(llama, tmp_path)
    header = json.dumps({"model.embed_tokens.weight": ENTRIES[entry]}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(16)
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="expected a safetensors file"):
        extracted(damaged, tmp_path / "cache")


def test_a_file_cut_short_is_refused(llama, tmp_path):
    damaged = copied(llama, tmp_path)
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="outside the file"):
        extracted(damaged, tmp_path / "cache")


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "..", 7])
def test_an_index_that_points_outside_the_folder_is_refused(sharded, tmp_path, name):
    damaged = copied(sharded, tmp_path)
    index = damaged / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.embed_tokens.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError):
        source_of(damaged).weight_bytes(1)
    with pytest.raises(ModelError):
        extracted(damaged, tmp_path / "cache")


def test_a_missing_shard_is_refused_by_its_name(sharded, tmp_path):
    damaged = copied(sharded, tmp_path)
    lost = sorted(damaged.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=lost.name):
        extracted(damaged, tmp_path / "cache")


def test_code_in_a_model_folder_is_never_run(llama, tmp_path):
    hostile = copied(llama, tmp_path)
    mark = tmp_path / "was here"
    (hostile / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    edit_config(
        hostile,
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    )
    with pytest.raises(ModelError):
        extracted(hostile, tmp_path / "cache")
    assert not mark.exists()


def test_a_config_that_names_another_weight_file_is_refused(llama, tmp_path):
    # transformers would read that file while model.safetensors is what was fingerprinted.
    other = build(FAMILIES["llama"], tmp_path / "other", seed=1)
    mixed = copied(llama, tmp_path)
    shutil.copy(other / "model.safetensors", mixed / "else.safetensors")
    edit_config(mixed, transformers_weights="else.safetensors")
    with pytest.raises(ModelError, match="transformers_weights"):
        extracted(mixed, tmp_path / "cache")


def test_a_model_folder_with_an_adapter_inside_is_refused(llama, tmp_path):
    # transformers would load the adapter too, and the identity would not tell.
    mixed = copied(llama, tmp_path)
    (mixed / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="--adapter"):
        extracted(mixed, tmp_path / "cache")


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(llama, tmp_path):
    bent = copied(llama, tmp_path)
    config = json.loads((bent / "config.json").read_text())
    (bent / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    with pytest.raises(
        ModelError, match=r"token ids below 50, .* its tokenizer is another model's"
    ):
        extracted(bent, tmp_path / "cache")


# ---------------------------------------------------------------- devices


def test_a_device_and_a_device_map_exclude_one_another(llama, tmp_path):
    with pytest.raises(UsageError, match="either --device or --device-map"):
        extracted(llama, tmp_path / "cache", device="cpu", device_map="auto")


def test_an_absent_device_is_refused(llama, tmp_path):
    with pytest.raises(ModelError, match="expected the device"):
        extracted(llama, tmp_path / "cache", device="cuda:7")


def test_spreading_over_devices_gives_the_same_rows(llama, tmp_path):
    plain = extracted(llama, tmp_path / "plain")
    spread = extracted(llama, tmp_path / "spread", device=None, device_map="auto")
    for label in plain.classes:
        for layer in plain.layers:
            torch.testing.assert_close(spread[label, layer], plain[label, layer])


def test_a_single_device_needs_no_accelerate(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.integrations.accelerate.is_accelerate_available", lambda *_: False
    )
    assert extracted(llama, tmp_path / "cache").layers == LAYERS
    with pytest.raises(ModelError, match="accelerate"):
        extracted(llama, tmp_path / "other", device=None, device_map="auto")

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanoinfra.config import RopeScaling
from nanoinfra.data.train_tokenizer import BPETokenizer
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.model.weights.hugging_face.load_and_save import (
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX_FILE,
    load_hf_model,
    open_hf_weights,
    save_hf_model,
)
from tests.model.parts import assert_a_rank_reads_its_part, assert_parts_make_the_whole, counting, parts
from tests.model.test_decoder import config
from tests.model.twins import READ, difference, scrambled, theirs, tokens

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tied folders as transformers saves them, one a family."""
    root = tmp_path_factory.mktemp("hf")
    for family in READ:
        theirs(family).save_pretrained(root / family)
    return root


@pytest.mark.parametrize("family", READ)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_a_loaded_folder_are_transformers_own(tmp_path, family, tied):
    """33 tokens: past the windows of 9 and 11."""
    other = theirs(family, tied)
    other.save_pretrained(tmp_path)
    for core in ("naive", "sdpa"):
        model = load_hf_model(tmp_path, attention=core)
        assert model.config.tied == tied and model.config.family == family
        assert difference(model, other) <= 1e-4


@pytest.mark.parametrize("family", READ)
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_we_save(tmp_path, family, tied):
    model = scrambled(Decoder(config(family, tied)))
    save_hf_model(model, tmp_path)
    other, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert difference(model, other.eval()) <= 1e-4
    assert other.config.bos_token_id is None and other.config.eos_token_id is None
    back = load_hf_model(tmp_path)
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("family", ["gpt2", "phi3", "bloom"])
def test_shards_and_their_index_go_both_ways(tmp_path, family):
    other = theirs(family)
    other.save_pretrained(tmp_path / "theirs", max_shard_size="12KB")
    assert (tmp_path / "theirs" / SAFETENSORS_INDEX_FILE).is_file()
    assert not (tmp_path / "theirs" / SAFETENSORS_FILE).exists()
    model = load_hf_model(tmp_path / "theirs")
    assert difference(model, other) <= 1e-4
    save_hf_model(model, tmp_path / "ours", shard_bytes=12_000)
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert difference(model, AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()) <= 1e-4
    sizes = [[t.nbytes for t in load_file(tmp_path / "ours" / file).values()] for file in files]
    assert all(sum(size) <= 12_000 or len(size) == 1 for size in sizes)


@pytest.mark.parametrize("family, t", [("gpt2", 5), ("llama", 3), ("phi3", 6), ("qwen3", 6), ("bloom", 3)])
@pytest.mark.parametrize("shards", [False, True])
def test_parts_of_all_ranks_make_the_whole(tmp_path, family, t, shards):
    """97 or 101 rows of the vocabulary and 44 or 50 hidden units over 3, 5 or 6 ranks; KV heads twice."""
    theirs(family, tied=False).save_pretrained(tmp_path, max_shard_size="12KB" if shards else "1GB")
    assert_parts_make_the_whole(open_hf_weights(tmp_path), load_hf_model(tmp_path), t)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "opt", "bloom"])
def test_a_rank_reads_its_part_of_the_files(tmp_path, monkeypatch, family):
    counts = []
    monkeypatch.setattr("nanoinfra.model.weights.safetensors_files.safe_open", counting(counts))
    save_hf_model(scrambled(Decoder(config(family, tied=False))), tmp_path)
    weights = open_hf_weights(tmp_path)
    assert not counts                                            # shapes come from the header
    assert_a_rank_reads_its_part(weights, counts)


def test_what_is_wrong_is_said_on_opening_but_a_tied_heads_numbers_where_they_are_read(tmp_path, saved):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][100] += 1
    for how in ("missing", "surplus", "shape"):
        broken(tmp_path / how, saved / "llama", TENSORS[how][0])
        with pytest.raises(ValueError, match=TENSORS[how][1]):
            open_hf_weights(tmp_path / how)
    broken(tmp_path / "head", saved / "llama", change)
    weights = open_hf_weights(tmp_path / "head")
    first, second = (parts(weights.config, 2, rank)["embed.weight"] for rank in (0, 1))
    assert weights.read_parameter("embed.weight", first).shape == (51, 36)
    with pytest.raises(ValueError, match="head: config.json ties the head .* lm_head.weight differs"):
        weights.read_parameter("embed.weight", second)


def test_opts_two_rows_of_positions_are_dropped_and_written_as_zeros(tmp_path, saved):
    name = "model.decoder.embed_positions.weight"
    stored = load_file(saved / "opt" / FILE)[name]               # (2 + T, C)
    model = load_hf_model(saved / "opt")
    assert torch.equal(model.positions.weight, stored[2:]) and stored[:2].abs().min() > 0
    save_hf_model(model, tmp_path)
    want = torch.cat([torch.zeros(2, 30), stored[2:]])
    assert torch.equal(load_file(tmp_path / FILE)[name], want)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_float64_is_float64_throughout(tmp_path, family):
    """(transformers takes RoPE's angles and BLOOM's softmax in float32, whatever the dtype.)"""
    other = theirs(family).double()
    other.save_pretrained(tmp_path)
    assert difference(load_hf_model(tmp_path, torch.float64), other) <= 1e-10


def test_bfloat16_goes_out_as_bfloat16_and_in_as_asked(tmp_path):
    model = init_weights(Decoder(config("llama")), seed=0).bfloat16()
    save_hf_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / FILE, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    for dtype in (torch.bfloat16, torch.float64):
        back = load_hf_model(tmp_path, dtype)
        assert all(p.dtype == dtype for p in back.parameters())
        assert torch.equal(back.embed.weight, model.embed.weight.to(dtype))


def test_what_hugging_face_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gpt2 cannot hold kv_heads=2: .*; try kv_heads=6"):
        save_hf_model(Decoder(replace(config("llama"), family="gpt2")), tmp_path / "m")
    for family, change, message in (("opt", {"eps": 1e-6}, "opt cannot hold eps=1e-06: .* try eps=1e-05"),
                                    ("bloom", {"hidden": 50}, "cannot hold hidden=50: .* try hidden=120"),
                                    ("bloom", {"kv_heads": 3}, "cannot hold kv_heads=3: .*; try kv_heads=6"),
                                    ("qwen3", {"mlp_bias": True}, "cannot hold mlp_bias=True"),
                                    ("phi3", {"rope_scaling": RopeScaling("linear", 2.0)},
                                     "phi3 cannot hold rope_scaling=.* as None"),
                                    ("llama", {"window": 8}, "llama cannot hold window=8")):
        with pytest.raises(ValueError, match=message):
            save_hf_model(Decoder(replace(config(family), **change)), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_tokenizer_goes_along(tmp_path):
    BPETokenizer.train(["one two three two one"] * 9, vocab_size=260).save(tmp_path / "tokenizer")
    save_hf_model(init_weights(Decoder(config("llama")), 0), tmp_path / "model", tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    eos = json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"]
    assert tokenizer.decode(tokenizer.encode("two one")) == "two one" and eos == tokenizer.eos_token_id


def test_a_loaded_model_does_not_lean_on_its_file(tmp_path, saved):
    shutil.copytree(saved / "gpt2", tmp_path / "m")
    model = load_hf_model(tmp_path / "m")
    want = model(tokens(97))
    path = tmp_path / "m" / FILE
    path.write_bytes(bytes(path.stat().st_size))                 # as a save over it would
    assert torch.equal(model(tokens(97)), want)


def test_older_blooms_use_other_names_and_no_prefix(tmp_path, saved):
    def change(tensors):
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(bare)
    broken(tmp_path, saved / "bloom", change)
    path = tmp_path / "config.json"
    new = json.loads(path.read_text())
    old = {"hidden_size": "n_embed", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    path.write_text(json.dumps({old.get(key, key): new[key] for key in new} | {"seq_length": 64}))
    model = load_hf_model(tmp_path)
    assert model.config.context == 64 and load_hf_model(saved / "bloom").config.context == 2048
    assert difference(model, theirs("bloom")) <= 1e-4


def test_known_buffers_bare_names_and_an_equal_tied_head_are_no_surplus(tmp_path, saved):
    def change(tensors):
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(bare)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 37, 37)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    broken(tmp_path, saved / "gpt2", tensors=change)
    assert difference(load_hf_model(tmp_path), theirs("gpt2")) <= 1e-4


def broken(folder, good, tensors=None, config=None):
    """A copy of the folder `good` with its tensors or configuration changed by the functions given."""
    shutil.copytree(good, folder, dirs_exist_ok=True)
    if tensors:
        kept = load_file(folder / FILE)
        tensors(kept)
        save_file(kept, folder / FILE, {"format": "pt"})
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))


NORM = "model.layers.1.input_layernorm.weight"
TENSORS = {
    "missing": (lambda t: t.pop(NORM), "lacks layers.1.input_layernorm.weight"),
    "surplus": (lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(36)}),
                "beside what the model needs, layers.1.self_attn.q_proj.bias"),
    "shape": (lambda t: t.update({NORM: torch.ones(35)}),
              r"layers.1.input_layernorm.weight makes blocks.1.norm1.weight of .*\(35,\), .* \(36,\)"),
    "head": (lambda t: t.update({"lm_head.weight": torch.zeros(101, 36)}), "lm_head.weight differs"),
    "layer": (lambda t: t.update({NORM.replace("1", "3"): torch.ones(36)}), "beside what .*, layers.3.input"),
    "scalar": (lambda t: t.update({NORM: torch.ones(())}), r"makes blocks.1.norm1.weight of shape \(\),"),
    "quantised": (lambda t: t.update({NORM: torch.ones(36, dtype=torch.int8)}), "stored as I8, but"),
    "float8": (lambda t: t.update({NORM: torch.ones(36).to(torch.float8_e4m3fn)}), "stored as F8_E4M3"),
}
@pytest.mark.parametrize("change, message", TENSORS.values(), ids=TENSORS)
def test_wrong_tensors_are_named(tmp_path, saved, change, message):
    broken(tmp_path, saved / "llama", tensors=change)
    with pytest.raises(ValueError, match=message):
        load_hf_model(tmp_path)


def test_unreadable_folders_are_named(tmp_path, saved):
    with pytest.raises(ValueError, match="holds no config.json"):
        load_hf_model(tmp_path)
    shutil.copytree(saved / "gpt2", tmp_path / "pickled")
    (tmp_path / "pickled" / FILE).rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="neither model.safetensors nor .* pickles, which are not read"):
        load_hf_model(tmp_path / "pickled")
    shutil.copytree(saved / "gpt2", tmp_path / "cut")
    (tmp_path / "cut" / FILE).write_bytes((saved / "gpt2" / FILE).read_bytes()[:-9])
    with pytest.raises(ValueError, match="model.safetensors cannot be read as safetensors"):
        load_hf_model(tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load_hf_model(tmp_path / "cut")


def test_a_missing_shard_is_named(tmp_path):
    theirs("llama").save_pretrained(tmp_path, max_shard_size="12KB")
    name = sorted(path.name for path in tmp_path.glob("*.safetensors"))[1]
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"lists {name}, which is not in the folder"):
        load_hf_model(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    save_hf_model(Decoder(config("llama")), tmp_path, shard_bytes=20_000)
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    save_file(load_file(first) | load_file(second), second, {"format": "pt"})
    with pytest.raises(ValueError, match="which an earlier file of the folder holds too"):
        load_hf_model(tmp_path)


def test_a_model_that_is_cut_over_ranks_is_not_saved_as_a_whole(tmp_path):
    model = Decoder(config("llama"))
    model.blocks[1].attn.q.weight = torch.nn.Parameter(model.blocks[1].attn.q.weight[:24].detach())
    with pytest.raises(ValueError, match=r"blocks.1.attn.q.weight has the shape \[24, 30\], but \[48, 30\]"):
        save_hf_model(model, tmp_path)

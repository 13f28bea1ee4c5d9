import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanoinfra.data.tokenizer import Tokenizer
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.hf import INDEX, SINGLE, load_hf, save_hf
from nanoinfra.model.init import init_weights
from tests.model.test_decoder import config
from tests.model.twins import FAMILIES, difference, scrambled, theirs, tokens

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tied folders as transformers saves them, one a family."""
    root = tmp_path_factory.mktemp("hf")
    for family in FAMILIES:
        theirs(family).save_pretrained(root / family)
    return root


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("core", ["naive", "sdpa"])
def test_logits_of_a_loaded_folder_are_transformers_own(tmp_path, family, tied, core):
    other = theirs(family, tied)
    other.save_pretrained(tmp_path)
    model = load_hf(tmp_path, attention=core)
    assert model.config.tied == tied and model.config.family == family
    assert difference(model, other) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_we_save(tmp_path, family, tied):
    model = scrambled(Decoder(config(family, tied)))
    save_hf(model, tmp_path)
    other, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert difference(model, other.eval()) <= 1e-4
    assert other.config.bos_token_id is None and other.config.eos_token_id is None
    back = load_hf(tmp_path)
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_and_their_index_go_both_ways(tmp_path, family):
    other = theirs(family)
    other.save_pretrained(tmp_path / "theirs", max_shard_size="12KB")
    assert (tmp_path / "theirs" / INDEX).is_file() and not (tmp_path / "theirs" / SINGLE).exists()
    model = load_hf(tmp_path / "theirs")
    assert difference(model, other) <= 1e-4
    save_hf(model, tmp_path / "ours", shard_bytes=12_000)
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert difference(model, AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()) <= 1e-4
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "ours" / file).values()) for file in files]
    assert max(sizes) <= max(12_000, model.embed.weight.nbytes)


def test_bfloat16_goes_out_as_bfloat16_and_in_as_asked(tmp_path):
    model = init_weights(Decoder(config("llama")), seed=0).bfloat16()
    save_hf(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / FILE, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    for dtype in (torch.bfloat16, torch.float64):
        back = load_hf(tmp_path, dtype)
        assert all(p.dtype == dtype for p in back.parameters())
        assert torch.equal(back.embed.weight, model.embed.weight.to(dtype))


def test_a_gpt2_that_hugging_face_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="6 heads and 2 KV heads of 8 do not each make 30"):
        save_hf(Decoder(replace(config("llama"), family="gpt2")), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_tokenizer_goes_along(tmp_path):
    Tokenizer.train(["one two three two one"] * 9, vocab=260).save(tmp_path / "tokenizer")
    save_hf(init_weights(Decoder(config("llama")), 0), tmp_path / "model", tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    eos = json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"]
    assert tokenizer.decode(tokenizer.encode("two one")) == "two one" and eos == tokenizer.eos_token_id


def test_a_loaded_model_does_not_lean_on_its_file(tmp_path, saved):
    shutil.copytree(saved / "gpt2", tmp_path / "m")
    model = load_hf(tmp_path / "m")
    want = model(tokens(97))
    path = tmp_path / "m" / FILE
    path.write_bytes(bytes(path.stat().st_size))                 # as a save over it would
    assert torch.equal(model(tokens(97)), want)


def test_known_buffers_bare_names_and_an_equal_tied_head_are_no_surplus(tmp_path, saved):
    def change(tensors):
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(bare)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 37, 37)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    broken(tmp_path, saved / "gpt2", tensors=change)
    assert difference(load_hf(tmp_path), theirs("gpt2")) <= 1e-4


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
}
CONFIGS = {
    "family": ({"model_type": "mamba"}, "model_type 'mamba' is unknown; known are gpt2, llama, qwen3"),
    "activation": ({"hidden_act": "relu"}, "hidden_act is 'relu', but this decoder has only 'silu'"),
    "bias": ({"attention_bias": True}, "attention_bias is True"),
    "rope": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "scaled .'llama3'"),
    "old rope": ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "scaled .'linear'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    "silent": ({"rms_norm_eps": None}, "does not say rms_norm_eps"),
    "layers": ({"num_hidden_layers": 2}, "beside what the model needs, .*layers.2.* and 4 more"),
    "untied": ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
    "heads": ({"num_key_value_heads": 4}, "6 query heads cannot share 4 KV heads"),
}


@pytest.mark.parametrize("change, message", TENSORS.values(), ids=TENSORS)
def test_wrong_tensors_are_named(tmp_path, saved, change, message):
    broken(tmp_path, saved / "llama", tensors=change)
    with pytest.raises(ValueError, match=message):
        load_hf(tmp_path)


@pytest.mark.parametrize("change, message", CONFIGS.values(), ids=CONFIGS)
def test_wrong_configurations_are_named(tmp_path, saved, change, message):
    broken(tmp_path, saved / "llama", config=change)
    with pytest.raises(ValueError, match=message):
        load_hf(tmp_path)


def test_older_files_keep_theta_beside_the_rest(tmp_path, saved):
    broken(tmp_path, saved / "llama", config={"rope_parameters": None, "rope_theta": 500.0})
    assert load_hf(tmp_path).config.theta == 500.0


def test_unreadable_folders_are_named(tmp_path, saved):
    with pytest.raises(ValueError, match="holds no config.json"):
        load_hf(tmp_path)
    shutil.copytree(saved / "gpt2", tmp_path / "pickled")
    (tmp_path / "pickled" / FILE).rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="neither model.safetensors nor .* pickles and not read"):
        load_hf(tmp_path / "pickled")
    shutil.copytree(saved / "gpt2", tmp_path / "cut")
    (tmp_path / "cut" / FILE).write_bytes((saved / "gpt2" / FILE).read_bytes()[:-9])
    with pytest.raises(ValueError, match="model.safetensors cannot be read as safetensors"):
        load_hf(tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load_hf(tmp_path / "cut")


def test_a_missing_shard_is_named(tmp_path):
    theirs("llama").save_pretrained(tmp_path, max_shard_size="12KB")
    name = sorted(path.name for path in tmp_path.glob("*.safetensors"))[1]
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"lists {name}, which is not in the folder"):
        load_hf(tmp_path)

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nanoinfra.model.gguf import halves_from_pairs, load_gguf
from tests.model.twins import difference, theirs, tokens

HEADER = {"context_length": 37, "embedding_length": 36, "block_count": 3, "feed_forward_length": 50,
          "attention.head_count": 6, "attention.layer_norm_rms_epsilon": 2e-5, "rope.freq_base": 500.0}
GPT2 = {"context_length": 37, "embedding_length": 30, "block_count": 3, "feed_forward_length": 44,
        "attention.head_count": 5, "attention.layer_norm_epsilon": 3e-5}
HEADERS = {"gpt2": GPT2, "llama": HEADER | {"attention.head_count_kv": 3},
           "qwen3": HEADER | {"attention.head_count_kv": 2, "attention.key_length": 14}}
LLAMA = {"model.": "", "embed_tokens": "token_embd", "lm_head": "output", "layers": "blk",
         "self_attn.o_proj": "attn_output", "self_attn.": "attn_", "post_attention_layernorm": "ffn_norm",
         "input_layernorm": "attn_norm", "mlp.": "ffn_", "_proj": ""}
RENAMED = {"llama": LLAMA, "qwen3": LLAMA,
           "gpt2": {"transformer.": "", "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm",
                    "lm_head": "output", "h.": "blk.", "attn.c_attn": "attn_qkv",
                    "attn.c_proj": "attn_output",
                    "ln_1": "attn_norm", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}}


def permute(x, heads):
    """What llama.cpp's converter does to q and k of LLaMA."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def converted(family, other):
    """The tensors of transformers' model `other` under llama.cpp's names and in its layout."""
    for name, x in other.named_parameters():
        x = x.detach().T if family == "gpt2" and ".c_" in name and x.dim() == 2 else x.detach()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            x = permute(x, 6 if "q_proj" in name else 3)
        for a, b in RENAMED[family].items():
            name = name.replace(a, b)
        yield "output_norm.weight" if name == "norm.weight" else name, x


def write(path, family, other, fields=None, drop=(), extra=None):
    """`other` as llama.cpp's converter would write it, with a tokenizer of bare names."""
    writer = gguf.GGUFWriter(path, family)
    kinds = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
    for key, value in (HEADERS[family] | (fields or {})).items():
        kinds[type(value)](f"{family}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(other.config.vocab_size)])
    for name, x in {**dict(converted(family, other)), **(extra or {})}.items():
        if name not in drop:
            writer.add_tensor(name, np.ascontiguousarray(x.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", HEADERS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_transformers_own(tmp_path, family, tied):
    other = theirs(family, tied)
    model, _, template = load_gguf(write(tmp_path / "m.gguf", family, other))
    assert model.config.tied == tied and model.config.family == family and template is None
    assert model.config.eps == (3e-5 if family == "gpt2" else 2e-5)      # not its float32 neighbour
    assert difference(model, other) <= 1e-4


def test_unpermuting_undoes_llama_cpps_permutation():
    x = torch.arange(3 * 8 * 5.0).view(24, 5)
    assert not torch.equal(permute(x, 3), x)
    assert torch.equal(halves_from_pairs(permute(x, 3), 8), x)


def test_wrong_files_are_named(tmp_path):
    other, path = theirs("llama"), tmp_path / "m.gguf"

    def refused(message, **how):
        with pytest.raises(ValueError, match=message):
            load_gguf(write(path, "llama", other, **how))

    refused("m.gguf: it lacks blk.1.ffn_up.weight", drop=("blk.1.ffn_up.weight",))
    refused("has, beside what the model needs, rope_freqs.weight", extra={"rope_freqs.weight": torch.ones(3)})
    refused("blk.0.ffn_gate.weight makes blocks.0.mlp.gate.weight of", fields={"feed_forward_length": 51})
    refused("llama.rope.scaling.type = 'yarn'", fields={"rope.scaling.type": "yarn"})
    refused("llama.rope.dimension_count RoPE turns part", fields={"rope.dimension_count": 4})
    with pytest.raises(ValueError, match="there is no file .*none.gguf"):
        load_gguf(tmp_path / "none.gguf")
    path.write_bytes(b"GGUX" + bytes(40))
    with pytest.raises(ValueError, match="m.gguf cannot be read as GGUF"):
        load_gguf(path)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'mamba' is unknown; known are gpt2, llama, qwen3"):
        load_gguf(path)


def test_the_hub_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"GGUF files need the package gguf; pip install 'nanoinfra\[hub\]'"):
        load_gguf(tmp_path / "m.gguf")


@torch.no_grad()
def test_the_real_smollm2_gives_recorded_logits(smollm2):
    """Recorded from transformers 5.23 reading the same file in float32, as the proof below does live."""
    got = smollm2[0](tokens(49152, (1, 24)))[0]
    ids, top = got[-1].topk(5).indices, [23.958044, 23.671757, 23.631388, 23.475292, 23.465054]
    want = [29, 24, 446, 338, 30, 30, 30, 30, 395, 89, 299, 30, 367, 81, 670,
            395, 332, 198, 198, 282, 198, 254, 4605, 198]
    assert got.argmax(-1).tolist() == want
    assert ids.tolist() == [198, 282, 28, 30, 216]
    torch.testing.assert_close(got[-1, ids], torch.tensor(top), rtol=1e-4, atol=0)


@pytest.mark.prove
@torch.no_grad()
def test_the_real_smollm2_is_transformers_own(smollm2, smollm2_file):
    """Q4_1 and Q8_0 weights, GQA 9/3, permuted q and k, 30 layers."""
    other = AutoModelForCausalLM.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name,
                                                 dtype=torch.float32).eval()
    x = tokens(49152, (1, 24))
    want, got = other(x).logits, smollm2[0](x)
    assert (got - want).norm() <= 1e-4 * want.norm() and (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert torch.equal(got.argmax(-1), want.argmax(-1))

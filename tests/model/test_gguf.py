import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nanoinfra.formulas.params import parameters
from nanoinfra.model.gguf import halves_from_pairs, load_gguf, open_gguf
from tests.model.parts import assert_a_rank_reads_its_part, assert_parts_make_the_whole, parts
from tests.model.twins import difference, scrambled, theirs, tokens

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
            c = other.config
            x = permute(x, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
        for a, b in RENAMED[family].items():
            name = name.replace(a, b)
        yield "output_norm.weight" if name == "norm.weight" else name, x


def write(path, family, other, fields=None, drop=(), extra=None, kind=gguf.GGMLQuantizationType.F32):
    """`other` as llama.cpp's converter would write it, matrices as `kind`, with a tokenizer of bare names."""
    writer = gguf.GGUFWriter(path, family)
    kinds = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
    for key, value in (HEADERS[family] | (fields or {})).items():
        kinds[type(value)](f"{family}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(other.config.vocab_size)])
    for name, x in {**dict(converted(family, other)), **(extra or {})}.items():
        if name not in drop:
            stored = kind if x.dim() > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(x.contiguous().numpy(), stored), raw_dtype=stored)
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


@pytest.mark.parametrize("family, t", [("gpt2", 5), ("llama", 3), ("llama", 6), ("qwen3", 2)])
def test_parts_of_all_ranks_make_the_whole(tmp_path, family, t):
    path = write(tmp_path / "m.gguf", family, theirs(family, tied=False))
    assert_parts_make_the_whole(open_gguf(path), load_gguf(path)[0], t)


def quantised(path, kind):
    """A LLaMA of 4 heads of 16 whose rows are 2 or 3 blocks of 32 weights."""
    shape = LlamaConfig(vocab_size=101, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, intermediate_size=96)
    other = scrambled(AutoModelForCausalLM.from_config(shape))
    sizes = {"embedding_length": 64, "block_count": 2, "feed_forward_length": 96, "attention.head_count": 4,
             "attention.head_count_kv": 2}
    return write(path, "llama", other, sizes, kind=gguf.GGMLQuantizationType[kind]), other


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
@pytest.mark.parametrize("t", [2, 4])
def test_quantised_parts_make_the_whole_where_blocks_are_cut(tmp_path, kind, t):
    """16 columns of o and 24 of down a rank, at t = 4."""
    path, other = quantised(tmp_path / "m.gguf", kind)
    model = load_gguf(path)[0]
    assert_parts_make_the_whole(open_gguf(path), model, t)
    got, want = model.blocks[1].mlp.down.weight, other.model.layers[1].mlp.down_proj.weight
    assert 0 < (got - want).abs().max() < (0.05 if kind == "Q4_1" else 0.005)


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_any_part_will_do_of_pairs_and_of_blocks(tmp_path, kind):
    weights, name = open_gguf(quantised(tmp_path / "m.gguf", kind)[0]), "blocks.1.attn.q.weight"
    whole = weights.read(name)
    for rows, columns in ((7, 35), (5, 9)), ((16, 17), (31, 33)), ((5, 5), (0, 64)), ((0, 64), (64, 64)):
        box = (slice(*rows), slice(*columns))                    # of 64 rows in heads of 16; blocks of 32
        assert torch.equal(weights.read(name, box), whole[box])


def test_a_rank_reads_its_part_of_the_file(tmp_path, monkeypatch):
    counts, dequantize = [], gguf.dequantize

    def counted(data, kind):
        counts.append(data.nbytes // 4 if kind == 0 else data.nbytes)                 # 0 is float32
        return dequantize(data, kind)

    monkeypatch.setattr(gguf, "dequantize", counted)
    weights = open_gguf(write(tmp_path / "m.gguf", "qwen3", theirs("qwen3")))
    assert_a_rank_reads_its_part(weights, counts)
    weights = open_gguf(quantised(tmp_path / "q.gguf", "Q8_0")[0])
    counts.clear()
    for name, box in parts(weights.config, 2, 1).items():
        weights.read(name, box)
    assert sum(counts) < 0.6 * parameters(weights.config) * 34 / 32          # bytes of a block, weights in it


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

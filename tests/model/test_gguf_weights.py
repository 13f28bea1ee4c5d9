import math

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.model.weights.gguf.load_gguf import deinterleave_rope_rows, load_gguf_model, open_gguf_weights
from tests.model.gguf_files import MODELS, add, close, write_model
from tests.model.parts import assert_a_rank_reads_its_part, assert_parts_make_the_whole, parts
from tests.model.twins import difference, scrambled, tokens

HEADER = {"context_length": 64, "embedding_length": 36, "block_count": 3, "feed_forward_length": 50,
          "attention.head_count": 6, "attention.head_count_kv": 3, "attention.layer_norm_rms_epsilon": 2e-5,
          "rope.freq_base": 500.0}
GPT2 = {"context_length": 64, "embedding_length": 30, "block_count": 3, "feed_forward_length": 44,
        "attention.head_count": 5, "attention.layer_norm_epsilon": 3e-5}
HEADERS = {"gpt2": GPT2, "llama": HEADER, "qwen2": HEADER,
           "phi3": HEADER | {"attention.sliding_window": 11, "rope.dimension_count": 6},
           "qwen3": HEADER | {"attention.head_count_kv": 2, "attention.key_length": 14}}
SIZES = {"vocab_size": 101, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6,
         "num_key_value_heads": 3, "intermediate_size": 50, "max_position_embeddings": 64,
         "rms_norm_eps": 2e-5}
CONFIGS = {"llama": SIZES, "qwen2": SIZES,
           "phi3": SIZES | {"sliding_window": 11, "pad_token_id": None},
           "qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 14},
           "gpt2": {"vocab_size": 97, "n_embd": 30, "n_layer": 3, "n_head": 5, "n_positions": 64,
                    "n_inner": 44, "layer_norm_epsilon": 3e-5}}
LLAMA = {"model.": "", "embed_tokens": "token_embd", "lm_head": "output", "layers": "blk",
         "self_attn.o_proj": "attn_output", "self_attn.": "attn_", "post_attention_layernorm": "ffn_norm",
         "input_layernorm": "attn_norm", "mlp.gate_up_proj": "ffn_up", "mlp.": "ffn_", "_proj": ""}
RENAMED = dict.fromkeys(("llama", "qwen2", "qwen3", "phi3"), LLAMA) | {
    "gpt2": {"transformer.": "", "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm",
             "lm_head": "output", "h.": "blk.", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
             "ln_1": "attn_norm", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}}


def theirs(family, tied=True, rope=None, **changes):
    """transformers' model of `family`, every weight, bias and norm drawn at random."""
    changes["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0} | (rope or {})
    if family == "gpt2":
        del changes["rope_parameters"]
    config = AutoConfig.for_model(family, **CONFIGS[family] | changes, tie_word_embeddings=tied)
    return scrambled(AutoModelForCausalLM.from_config(config)).eval()


def permute(x, heads):
    """What llama.cpp's converter does to q and k of LLaMA."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def converted(family, other):
    """The tensors of transformers' model `other` under llama.cpp's names and in its layout."""
    for name, x in other.named_parameters():
        x = x.detach().T if family == "gpt2" and ".c_" in name and x.dim() == 2 else x.detach()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):      # their biases too
            c = other.config
            x = permute(x, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
        for a, b in RENAMED[family].items():
            name = name.replace(a, b)
        yield "output_norm.weight" if name == "norm.weight" else name, x


def write(path, family, other, fields=None, drop=(), extra=None, kind=gguf.GGMLQuantizationType.F32):
    """`other` as llama.cpp's converter would write it, matrices as `kind`, the tokenizer of bare names."""
    writer = gguf.GGUFWriter(path, family)
    add(writer, {f"{family}.{key}": value for key, value in (HEADERS[family] | (fields or {})).items()})
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(other.config.vocab_size)])
    for name, x in {**dict(converted(family, other)), **(extra or {})}.items():
        if name not in drop:
            stored = kind if x.dim() > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(x.contiguous().numpy(), stored), raw_dtype=stored)
    return close(writer, path)


@pytest.mark.parametrize("family", HEADERS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_transformers_own(tmp_path, family, tied):
    other = theirs(family, tied)
    model, _, template = load_gguf_model(write(tmp_path / "m.gguf", family, other))
    assert model.config.tied == tied and model.config.family == family and template is None
    assert model.config.eps == (3e-5 if family == "gpt2" else 2e-5)      # not its float32 neighbour
    assert difference(model, other) <= 1e-4


SCALED = {                                   # transformers' rope_parameters, and what the converter writes
    "linear": ({"rope_type": "linear", "factor": 4.0},
               {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
             {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
              "rope.scaling.original_context_length": 16}),
    "llama3": ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0}, {})}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rope_is_transformers_own(tmp_path, kind):
    """Llama 3.1's scaling lies in the file as numbers that the converter took from the formula."""
    rope, fields = SCALED[kind]
    other, extra = theirs("llama", rope=rope), {}
    if kind == "llama3":
        plain = 500.0 ** -(torch.arange(0, 6, 2) / 6)
        extra["rope_freqs.weight"] = plain / ROPE_INIT_FUNCTIONS["llama3"](other.config, "cpu")[0]
    model = load_gguf_model(write(tmp_path / "m.gguf", "llama", other, fields=fields, extra=extra))[0]
    assert difference(model, other) <= 1e-4 < difference(model, theirs("llama"))


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True},
                                    {"attention_bias": True, "mlp_bias": True}], ids=str)
def test_llama_with_biases_is_transformers_own(tmp_path, biases):
    other = theirs("llama", **biases)
    assert difference(load_gguf_model(write(tmp_path / "m.gguf", "llama", other))[0], other) <= 1e-4


def test_llama_with_biases_of_q_k_v_alone_is_qwen2(tmp_path):
    path = write_model(tmp_path / "m.gguf", *MODELS["llama, biases of q k v"][:1],
                       **MODELS["llama, biases of q k v"][1])
    assert open_gguf_weights(path).config.family == "qwen2"
    with pytest.raises(ValueError, match="has, beside what the model needs, blk.0.attn_q.bias"):
        open_gguf_weights(write_model(path, "llama", biases=("q",)))


@pytest.mark.parametrize("family, t", [("gpt2", 5), ("llama", 3), ("llama", 6), ("qwen2", 3), ("qwen3", 2),
                                       ("phi3", 3)])
def test_parts_of_all_ranks_make_the_whole(tmp_path, family, t):
    bias = {"attention_bias": True} if family == "llama" else {}          # q's and k's are in pairs too
    path = write(tmp_path / "m.gguf", family, theirs(family, tied=False, **bias))
    assert_parts_make_the_whole(open_gguf_weights(path), load_gguf_model(path)[0], t)


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
    model = load_gguf_model(path)[0]
    assert_parts_make_the_whole(open_gguf_weights(path), model, t)
    got, want = model.blocks[1].mlp.down.weight, other.model.layers[1].mlp.down_proj.weight
    assert 0 < (got - want).abs().max() < (0.05 if kind == "Q4_1" else 0.005)


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_any_part_will_do_of_pairs_and_of_blocks(tmp_path, kind):
    weights, name = open_gguf_weights(quantised(tmp_path / "m.gguf", kind)[0]), "blocks.1.attn.q.weight"
    whole = weights.read_parameter(name)
    for rows, columns in ((7, 35), (5, 9)), ((16, 17), (31, 33)), ((5, 5), (0, 64)), ((0, 64), (64, 64)):
        box = (slice(*rows), slice(*columns))                    # of 64 rows in heads of 16; blocks of 32
        assert torch.equal(weights.read_parameter(name, box), whole[box])


def test_a_rank_reads_its_part_of_the_file(tmp_path, monkeypatch):
    counts, dequantize = [], gguf.dequantize

    def counted(data, kind):
        counts.append(data.nbytes // 4 if kind == 0 else data.nbytes)                 # 0 is float32
        return dequantize(data, kind)

    monkeypatch.setattr(gguf, "dequantize", counted)
    weights = open_gguf_weights(write(tmp_path / "m.gguf", "qwen3", theirs("qwen3")))
    assert_a_rank_reads_its_part(weights, counts)
    weights = open_gguf_weights(quantised(tmp_path / "q.gguf", "Q8_0")[0])
    counts.clear()
    for name, box in parts(weights.config, 2, 1).items():
        weights.read_parameter(name, box)
    assert sum(counts) < 0.6 * parameter_count(weights.config) * 34 / 32    # bytes of a block, its weights


def test_unpermuting_undoes_llama_cpps_permutation():
    x = torch.arange(3 * 8 * 5.0).view(24, 5)
    assert not torch.equal(permute(x, 3), x)
    assert torch.equal(deinterleave_rope_rows(permute(x, 3), 8), x)


def test_wrong_files_are_named(tmp_path):
    other, path = theirs("llama"), tmp_path / "m.gguf"

    def refused(message, **how):
        with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
            load_gguf_model(write(path, "llama", other, **how))

    refused("it lacks blk.1.ffn_up.weight", drop=("blk.1.ffn_up.weight",))
    refused("has, beside what the model needs, rope_factors_long.weight",
            extra={"rope_factors_long.weight": torch.ones(3)})
    refused("blk.0.ffn_gate.weight makes blocks.0.mlp.gate.weight of", fields={"feed_forward_length": 51})
    refused("rope_freqs.weight is not a number above 0 for each of 3",
            extra={"rope_freqs.weight": torch.ones(4)})
    refused("rope_freqs.weight is not a number", extra={"rope_freqs.weight": torch.tensor([1, 0.0, 1])})
    refused("rope_freqs.weight has the shape", extra={"rope_freqs.weight": torch.ones(3, 1)})
    refused("no yarn with rope_freqs.weight", extra={"rope_freqs.weight": torch.ones(3)},
            fields={"rope.scaling.type": "yarn"})
    refused("has 3 tensors, too few for 4000000000 layers", fields={"block_count": 4_000_000_000},
            drop={name for name, _ in converted("llama", other)} - {"token_embd.weight", "output_norm.weight",
                                                                    "blk.0.ffn_up.weight"})
    with pytest.raises(ValueError, match=r"attn_qkv.weight makes blocks.0.attn.q.weight of shape \(24, 36\)"):
        load_gguf_model(write(path, "phi3", theirs("phi3", num_key_value_heads=2)))


@pytest.mark.parametrize("fields, message", [
    ({"rope.scaling.type": "longrope"}, "llama.rope.scaling.type = longrope"),
    ({"rope.dimension_count": 4}, "llama.rope.dimension_count RoPE turns 4 of a head's 6"),
    ({"attention.value_length": 8}, "llama.attention.value_length values have 8"),
    ({"expert_count": 8}, "does not have what llama.expert_count = 8 asks for"),
    ({"attention.sliding_window": 16}, "what llama.attention.sliding_window = 16"),
    ({"logit_scale": 0.5}, "what llama.logit_scale = 0.5"),
    ({"attention.clamp_kqv": 8.0}, "what llama.attention.clamp_kqv = 8"),
    ({"attention.causal": False}, "what llama.attention.causal = False"),
    ({"rope.scaling.yarn_beta_fast": 16.0}, "what llama.rope.scaling.yarn_beta_fast = 16"),
    ({"never_heard_of": 0}, "what llama.never_heard_of = 0"),
    ({"never_heard_of": "yes"}, "what llama.never_heard_of = yes"),
    ({"block_count": "3"}, "llama.block_count is '3', not a whole number"),
    ({"block_count": 3.0}, "llama.block_count is '3.0', not a whole number"),
    ({"attention.head_count": 0}, "llama.attention.head_count is 0; try 1 or more"),
    ({"attention.head_count_kv": 4}, "6 query heads cannot share 4 KV heads"),
    ({"attention.head_count": 2 ** 32 - 1, "attention.head_count_kv": 2}, "cannot share 2 KV heads"),
    ({"attention.head_count_kv": [3, 3, 1]}, "by llama.attention.head_count_kv layers differ"),
    ({"rope.freq_base": math.nan}, "rope.freq_base is nan, not a finite number above 0"),
    ({"attention.layer_norm_rms_epsilon": 0.0}, "rms_epsilon is 0.0, not a finite number above 0"),
    ({"rope.scaling.factor": -2.0}, "rope.scaling.factor is -2.0, not"),
    ({"rope.scaling.type": "yarn", "rope.freq_base": 1.0}, "no yarn .* with a RoPE base of 1"),
], ids=str)
def test_keys_that_change_the_maths_or_make_no_sense_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        open_gguf_weights(write_model(tmp_path / "m.gguf", "llama", fields=SHAPE, said=fields))


SHAPE = {"embedding_length": 36, "attention.head_count": 6, "attention.head_count_kv": 3}


def test_keys_that_change_nothing_are_passed_over(tmp_path):
    want = open_gguf_weights(write_model(tmp_path / "m.gguf", "llama")).config
    got = open_gguf_weights(write_model(tmp_path / "m.gguf", "llama", said={
        "expert_count": 0, "attention.causal": True, "attention.sliding_window": 0, "vocab_size": 64,
        "rope.scaling.finetuned": False, "attention.head_count_kv": [2, 2]})).config
    assert got == want
    for key in ("context_length", "embedding_length", "block_count", "attention.layer_norm_rms_epsilon"):
        path = tmp_path / "m.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_token_list(["a"])
        for each, value in HEADER.items():
            if each != key:
                (writer.add_float32 if type(value) is float else writer.add_uint32)(f"llama.{each}", value)
        writer.add_tensor("token_embd.weight", np.zeros((1, 36), np.float32))
        with pytest.raises(ValueError, match=f"the key llama.{key} is missing"):
            open_gguf_weights(close(writer, path))


def test_the_hub_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    path = write_model(tmp_path / "m.gguf", "llama")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"GGUF files need the package gguf; pip install 'nanoinfra\[hub\]'"):
        load_gguf_model(path)


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

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.formulas.saved_activations import (
    ATTENTION_MATRIX_TERMS,
    embedding_and_head_bytes_by_term,
    layer_activation_bytes_by_term,
    recompute_working_bytes,
    saved_activation_bytes,
)
from nanoinfra.formulas.tensor_parallel import SEQUENCE_PARALLEL_MODES
from nanoinfra.lab.instruments.saved_activations import SavedActivations
from nanoinfra.memory.recompute import apply_activation_checkpointing
from nanoinfra.model.decoder import Decoder, DecoderBlock
from nanoinfra.parallel.tensor_parallel_decoder import TensorParallel
from nanoinfra.parallel.vocab_parallel import VocabParallelCrossEntropy
from nanoinfra.train.loss import linear_cross_entropy
from tests.families import KINDS

HOW = [("naive", "none"), ("sdpa", "none"), ("naive", "selective"), ("naive", "full"), ("sdpa", "full")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def saved_bytes(model, batch, seq):
    """Bytes of the storages that autograd keeps from tokens to loss, each once, without the parameters'."""
    return saved_bytes_by_phase(model, batch, seq)[0]


def saved_bytes_by_phase(model, batch, seq, backward=False):
    """The same, and what backward keeps on top, of all its second forwards."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}                                         # holds the tensors, so that no address comes twice

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    def held():
        return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in parameters)

    tokens = torch.zeros(batch, seq, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = linear_cross_entropy(model.hidden_states(tokens), model.head.weight, tokens, batch * seq)
        assert loss.requires_grad
        forward = held()
        loss.backward() if backward else None
    return forward, held() - forward


@settings(max_examples=150, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), seq=st.integers(1, 20), dtype=st.sampled_from(DTYPES),
       how=st.sampled_from(HOW))
def test_activations_are_what_autograd_keeps(configs, data, batch, seq, dtype, how):
    config, (attention, recompute) = data.draw(configs), how
    got = saved_bytes(apply_activation_checkpointing(Decoder(config, attention).to(dtype), recompute), batch,
                      seq)
    assert got == saved_activation_bytes(config, batch, seq, dtype.itemsize, attention, recompute)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), seq=st.integers(2, 20), dtype=st.sampled_from(DTYPES),
       how=st.sampled_from(HOW))
def test_backward_works_with_one_layer_at_a_time(configs, data, batch, seq, dtype, how):
    config, (attention, recompute) = data.draw(configs), how
    model = apply_activation_checkpointing(Decoder(config, attention).to(dtype), recompute)
    _, got = saved_bytes_by_phase(model, batch, seq, backward=True)
    each = [replace(config, window=config.sliding_window_of_layer(layer)) for layer in range(config.layers)]
    want = sum(recompute_working_bytes(layer, batch, seq, dtype.itemsize, attention,
                                       recompute) for layer in each)
    copies = config.layers * layer_activation_bytes_by_term(config, batch, seq, dtype.itemsize)["qkv"]
    assert want <= got <= want + (copies if recompute == "selective" else 0)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_recompute_keeps_is_gone_while_one_layer_works(family, dtype):
    """The working set is freed before the next layer runs: at no moment are there two."""
    config = ModelConfig(61, 24, 4, 6, 3, 10, 40, 16, family=family)
    model, alive, peaks = apply_activation_checkpointing(Decoder(config, "naive").to(dtype), "full"), [], []
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        alive.append(weakref.ref(tensor))
        storages = [t.untyped_storage() for ref in alive if (t := ref()) is not None]
        at = {storage.data_ptr(): storage.nbytes() for storage in storages}
        peaks.append(sum(n for where, n in at.items() if where not in parameters))
        return tensor
    tokens = torch.zeros(2, 11, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = linear_cross_entropy(model.hidden_states(tokens), model.head.weight, tokens, 22)
        kept = peaks[-1]
        loss.backward()
    assert kept < max(peaks) <= kept + recompute_working_bytes(config, 2, 11, dtype.itemsize, "naive")


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("attention", ["naive", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_the_sum_of_its_terms(family, attention, dtype):
    config = ModelConfig(61, 24, 2, 6, 3, 10, 40, 16, family=family)
    one, two = (saved_bytes(Decoder(replace(config, layers=n), attention).to(dtype), 3, 11) for n in (1, 2))
    assert two - one == sum(layer_activation_bytes_by_term(config, 3, 11, dtype.itemsize, attention).values())


def test_gpt2_in_16_bits_is_korthikanti_2022_without_dropout():
    config, B, T = config_for_size("small"), 3, 512
    C, H = config.width, config.heads
    got = layer_activation_bytes_by_term(config, B, T, 2, "naive")
    squares = {term: got.pop(term) for term in ATTENTION_MATRIX_TERMS}
    statistics = got.pop("norm_stats")
    assert sum(got.values()) == (34 - 2) * B * T * C             # theirs less two dropout masks of a byte
    assert squares["weights"] == (5 - 1 - 2) * B * H * T * T     # theirs less dropout's mask and output
    assert squares["softmax"] == 4 * B * H * T * T               # ours: softmax in float32
    assert statistics == 8 * B * T


def test_recompute_is_korthikanti_2022_table_2():
    """Full: 2 sbh a layer. Selective: what would be kept without the squares."""
    config, B, T = config_for_size("small"), 3, 512
    plain, selective, full = (layer_activation_bytes_by_term(config, B, T, 2, "naive", how)
                              for how in ("none", "selective", "full"))
    assert full == {"block_input": 2 * B * T * config.width}
    matrices = sum(plain[term] for term in ATTENTION_MATRIX_TERMS)
    assert sum(plain.values()) - sum(selective.values()) == matrices
    assert sum(selective.values()) == 32 * B * T * config.width + 8 * B * T


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), seq=st.integers(1, 20), dtype=st.sampled_from(DTYPES),
       how=st.sampled_from(HOW), sp=st.sampled_from(SEQUENCE_PARALLEL_MODES))
def test_a_rank_of_t_keeps_its_share(shared_configs, first_of, data, batch, seq, dtype, how, sp):
    (config, t), (attention, recompute) = data.draw(shared_configs), how
    with first_of(t) as mesh:
        kept = run(config, mesh, batch, seq, dtype, attention, recompute, sp)[0]
    assert kept == saved_activation_bytes(config, batch, seq, dtype.itemsize, attention, recompute, t, sp)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("sp", SEQUENCE_PARALLEL_MODES)
def test_a_rank_of_t_works_with_one_layer_at_a_time(first_of, family, sp):
    config = ModelConfig(61, 24, 4, 6, 3, 10, 40, 16, family=family)
    with first_of(3) as mesh:
        kept, peak = run(config, mesh, 2, 11, torch.bfloat16, "naive", "full", sp, backward=True)
    ends = embedding_and_head_bytes_by_term(config, 2, 11, 2, 3, sp)
    norms = sum(n for term,
                n in ends.items() if term.startswith("norm")) // (1 + config.architecture.embed_norm)
    gone = ends["logits"] + ends["head_input"] + norms                    # before the last layer runs again
    assert peak == kept - gone + recompute_working_bytes(config, 2, 11, 2, "naive", "full", 3, sp)


def run(config, mesh, batch, seq, dtype, attention, recompute, sp, backward=False):
    """Bytes that rank 0 keeps for backward; and the most at any moment, with backward's own."""
    model = Decoder(config, attention).to(dtype)
    TensorParallel(model, mesh, sp)
    loss = VocabParallelCrossEntropy(apply_activation_checkpointing(model, recompute).head)
    tokens = torch.zeros(batch, seq, dtype=torch.long)
    with SavedActivations(model.parameters()) as kept:
        out = loss(model.hidden_states(tokens), tokens).sum()
        forward = kept.saved_bytes()
        out.backward() if backward else None
    return forward, kept.peak_bytes


@pytest.mark.parametrize("t", [1, 2, 4, 8])
def test_shares_of_gpt2_in_16_bits_are_korthikanti_2022_without_dropout(t):
    """Table 2 has 10 + 24/t and 34/t: two masks of a byte more, in the region that sp cuts."""
    config, B, T = ModelConfig(51200, 768, 12, 16, 16, 48, 3072, 1024, family="gpt2"), 3, 512
    BTC = B * T * config.width
    for sp, want in (("none", 8 + 24 / t), ("keep", 4 + 28 / t), ("gather", 32 / t)):
        terms = layer_activation_bytes_by_term(config, B, T, 2, "naive", "selective", t, sp)
        assert terms.pop("norm_stats") == 8 * B * T // (1 if sp == "none" else t)
        assert sum(terms.values()) == want * BTC
        full = layer_activation_bytes_by_term(config, B, T, 2, "naive", "full", t, sp)
        assert full == {"block_input": 2 * BTC // (1 if sp == "none" else t)}
        squares = layer_activation_bytes_by_term(config, B, T, 2, "naive", "none", t, sp)
        assert squares["softmax"] + squares["weights"] == 6 * B * config.heads * T * T // t


def test_what_stays_whole_and_what_is_cut():
    """SmolLM2's heads on 3 and 9 ranks, more than there are KV heads; T and V that t does not divide."""
    config = ModelConfig(100, 18, 1, 9, 3, 2, 26, 64)
    whole, third, ninth = (layer_activation_bytes_by_term(config, 2, 10, 4, "naive", tp=t) for t in (1, 3, 9))
    for term in ("norm_input", "norm_stats", "norm_scaled", "qkv_input", "mlp_input", "mask"):
        assert whole[term] == third[term] == ninth[term]
    assert (third["softmax"], ninth["softmax"]) == (whole["softmax"] // 3, whole["softmax"] // 9)
    assert [terms["qkv"] // (2 * 10 * 2 * 4) for terms in (whole, third, ninth)] == [15, 5, 3]
    assert [terms["mlp_hidden"] // (4 * 2 * 10 * 4) for terms in (whole, third, ninth)] == [26, 9, 3]
    assert embedding_and_head_bytes_by_term(config, 2, 10, 4, 3)["logits"] == 2 * 10 * 34 * 4
    keep, gather = (layer_activation_bytes_by_term(config, 2, 10, 4, tp=3, sp=sp) for sp in ("keep",
                                                                                             "gather"))
    assert keep["norm_input"] == gather["norm_input"] == 2 * (2 * 4 * 18 * 4)
    assert (keep["qkv_input"], gather["qkv_input"]) == (2 * 12 * 18 * 4, 2 * 4 * 18 * 4)
    assert keep["qkv"] == gather["qkv"] == third["qkv"]


def table_2(s: int, b: int, h: int, a: int, t: int = 1, sp: bool = False, recompute: str = "none") -> float:
    """The paper's bytes a layer: s tokens, b sequences, h width, a heads, t ranks; Korthikanti et al. 2022.

    34 sbh + 5 as^2b at t = 1. Theirs are 16-bit GPT-2 with dropout, masks of a byte, softmax unfused and in
    16 bits, MHA, hidden 4 h; the norms' statistics and the causal mask are left out. Full recompute has one
    row, the block's input, whole on every rank.
    """
    if recompute == "full":
        return 2 * s * b * h
    squares = 5 * a * s * s * b / t if recompute == "none" else 0
    return s * b * h * (34 / t if sp else 10 + 24 / t) + squares


@pytest.mark.parametrize("t, sp, recompute, want", [
    (1, False, "none", 7.080), (8, False, "none", 1.325), (8, True, "none", 0.885),
    (8, False, "selective", 0.654), (8, True, "selective", 0.214), (8, False, "full", 0.101)])
def test_table_2_for_22b(t, sp, recompute, want):
    """22B: 48 layers of width 6144, 64 heads, 2048 tokens; batch 4, GB of 10^9 bytes."""
    assert table_2(2048, 4, 6144, 64, t, sp, recompute) / 1e9 == pytest.approx(want, abs=0.0005)


def test_table_2_on_one_rank_is_equation_2():
    assert table_2(7, 3, 24, 4) == 34 * 7 * 3 * 24 + 5 * 4 * 7 * 7 * 3


@pytest.mark.parametrize("s, b, h, a", [(7, 3, 24, 4), (16, 1, 32, 8), (33, 2, 48, 2)])
def test_table_2_is_what_the_one_faithful_configuration_keeps(s, b, h, a):
    """GPT-2's block in 16 bits, with dropout whose masks are a byte and a softmax that is not fused."""
    config = ModelConfig(61, h, 1, a, a, h // a, 4 * h, 64, family="gpt2")
    block = DecoderBlock(config, 0, "naive").to(torch.bfloat16)
    block.attn.core = unfused
    block.attn.o = torch.nn.Sequential(block.attn.o, Dropout())
    block.mlp.down = torch.nn.Sequential(block.mlp.down, Dropout())
    with SavedActivations(block.parameters()) as kept:
        out = block(torch.randn(b, s, h, dtype=torch.bfloat16, requires_grad=True))
    assert out.requires_grad
    statistics, causal = layer_activation_bytes_by_term(config, b, s, 2, "naive")["norm_stats"], s * s
    assert kept.saved_bytes() - statistics - causal == 34 * s * b * h + 5 * a * s * s * b == table_2(s, b, h,
                                                                                                     a)


class Dropout(torch.nn.Module):
    def forward(self, x):
        return torch.native_dropout(x, 0.1, True)[0]                      # keeps a mask of a byte a number


def unfused(q, k, v, *_):
    scores = q @ k.mT / q.shape[-1] ** 0.5                                # (B, H, T, T)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return Dropout()(scores.masked_fill(future, -torch.inf).softmax(-1)) @ v


@pytest.mark.parametrize("call, complaint", [
    (lambda: layer_activation_bytes_by_term(config_for_size("test"), 1, 8, 4, "ring"),
     "attention 'ring' is not one of naive, sdpa"),
    (lambda: saved_activation_bytes(config_for_size("test"), 1, 8, 4, recompute="half"),
     "recompute 'half' is not one of"),
    (lambda: saved_activation_bytes(config_for_size("test"), 1, 8, 4, tp=2, sp="cut"),
     "sp 'cut' is not one of none, keep,"),
    (lambda: layer_activation_bytes_by_term(config_for_size("test"), 1, 8, 4, tp=3),
     "tp=3 cannot share 4 query and 2 KV heads"),
    (lambda: recompute_working_bytes(config_for_size("test"), 1, 8, 4, "sdpa", "selective"),
     "sdpa keeps none; try attention ")])
def test_unknown_names_are_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()

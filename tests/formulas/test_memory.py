import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.formulas.memory import (
    SQUARES,
    activation_bytes,
    activation_terms,
    kv_cache_bytes_per_token,
    state_bytes,
    working_bytes,
)
from nanoinfra.formulas.params import parameters
from nanoinfra.formulas.shape import FAMILIES, ModelConfig, sized
from nanoinfra.memory.recompute import apply
from nanoinfra.model.attention import naive
from nanoinfra.model.decoder import Decoder
from nanoinfra.train.loss import cross_entropy
from nanoinfra.train.optim import Optimizer

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
        loss = cross_entropy(model.hidden(tokens), model.head.weight, tokens, batch * seq)
        assert loss.requires_grad
        forward = held()
        loss.backward() if backward else None
    return forward, held() - forward


@settings(max_examples=150, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), seq=st.integers(1, 20), dtype=st.sampled_from(DTYPES),
       how=st.sampled_from(HOW))
def test_activations_are_what_autograd_keeps(configs, data, batch, seq, dtype, how):
    config, (attention, recompute) = data.draw(configs), how
    got = saved_bytes(apply(Decoder(config, attention).to(dtype), recompute), batch, seq)
    assert got == activation_bytes(config, batch, seq, dtype.itemsize, attention, recompute)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), seq=st.integers(2, 20), dtype=st.sampled_from(DTYPES),
       how=st.sampled_from(HOW))
def test_backward_works_with_one_layer_at_a_time(configs, data, batch, seq, dtype, how):
    config, (attention, recompute) = data.draw(configs), how
    model = apply(Decoder(config, attention).to(dtype), recompute)
    _, got = saved_bytes_by_phase(model, batch, seq, backward=True)
    want = config.layers * working_bytes(config, batch, seq, dtype.itemsize, attention, recompute)
    copies = config.layers * activation_terms(config, batch, seq, dtype.itemsize)["qkv"]
    assert want <= got <= want + (copies if recompute == "selective" else 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_recompute_keeps_is_gone_while_one_layer_works(family, dtype):
    """The working set is freed before the next layer runs: at no moment are there two."""
    config = ModelConfig(61, 24, 4, 6, 3, 10, 40, 16, family=family)
    model, alive, peaks = apply(Decoder(config, "naive").to(dtype), "full"), [], []
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        alive.append(weakref.ref(tensor))
        storages = [t.untyped_storage() for ref in alive if (t := ref()) is not None]
        at = {storage.data_ptr(): storage.nbytes() for storage in storages}
        peaks.append(sum(n for where, n in at.items() if where not in parameters))
        return tensor
    tokens = torch.zeros(2, 11, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = cross_entropy(model.hidden(tokens), model.head.weight, tokens, 22)
        kept = peaks[-1]
        loss.backward()
    assert kept < max(peaks) <= kept + working_bytes(config, 2, 11, dtype.itemsize, "naive")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["naive", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_the_sum_of_its_terms(family, attention, dtype):
    config = ModelConfig(61, 24, 2, 6, 3, 10, 40, 16, family=family)
    one, two = (saved_bytes(Decoder(replace(config, layers=n), attention).to(dtype), 3, 11) for n in (1, 2))
    assert two - one == sum(activation_terms(config, 3, 11, dtype.itemsize, attention).values())


def test_gpt2_in_16_bits_is_korthikanti_2022_without_dropout():
    config, B, T = sized("small"), 3, 512
    C, H = config.width, config.heads
    got = activation_terms(config, B, T, 2, "naive")
    squares = {term: got.pop(term) for term in SQUARES}
    statistics = got.pop("norm_stats")
    assert sum(got.values()) == (34 - 2) * B * T * C             # theirs less two dropout masks of a byte
    assert squares["weights"] == (5 - 1 - 2) * B * H * T * T     # theirs less dropout's mask and output
    assert squares["softmax"] == 4 * B * H * T * T               # ours: softmax in float32
    assert statistics == 8 * B * T


def test_recompute_is_korthikanti_2022_table_2():
    """Full: 2 sbh a layer. Selective: what would be kept without the squares."""
    config, B, T = sized("small"), 3, 512
    plain, selective, full = (activation_terms(config, B, T, 2, "naive", how)
                              for how in ("none", "selective", "full"))
    assert full == {"block_input": 2 * B * T * config.width}
    assert sum(plain.values()) - sum(selective.values()) == sum(plain[term] for term in SQUARES)
    assert sum(selective.values()) == 32 * B * T * config.width + 8 * B * T


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_are_the_trainers(dtype, optimizer):
    model = Decoder(sized("test")).to(dtype)
    got = held_after_a_step(model, optimizer)
    want = state_bytes(parameters(sized("test")), str(dtype).removeprefix("torch."), optimizer)
    assert got == want


def held_after_a_step(model, optimizer):
    """Bytes by kind of the tensors that a model and its optimizer own."""
    tokens = torch.zeros(1, 4, dtype=torch.long)
    cross_entropy(model.hidden(tokens), model.head.weight, tokens, 4).backward()
    opt = Optimizer(model, optimizer)
    grads = {name: p.grad for name, p in opt.params.items()}
    opt.step(grads, lr=1e-3)
    held = {"weights": total(model.parameters()), "gradients": total(grads.values())}
    masters = [m for name, m in opt.masters.items() if m is not opt.params[name]]
    held |= {"master": total(masters)} if masters else {}
    for kind in ("exp_avg", "exp_avg_sq") if optimizer == "adamw" else ():
        held[kind] = total(t for name, t in opt.state().items() if name.startswith(kind + "/"))
    return held


def total(tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("precision, grad_bytes, want", [
    ("float32", None, 16), ("float64", None, 32), ("bfloat16", 2, 16), ("bfloat16", 4, 18)])
def test_states_a_parameter_are_the_published_ones(precision, grad_bytes, want):
    assert sum(state_bytes(10, precision, "adamw", grad_bytes).values()) == 10 * want


def test_zero_needs_120_gb_for_7b5():
    """Rajbhandari et al. 2020, figure 1: the baseline."""
    assert sum(state_bytes(7_500_000_000, "float16").values()) == 120e9


class Counting:
    """A KV cache that only counts what it would hold."""
    held = 0

    def attend(self, layer, q, k, v):
        self.held += k.nbytes + v.nbytes
        return naive(q, k, v)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES[1:3]))
def test_kv_cache_holds_what_attention_hands_it(configs, data, dtype):
    config, cache = data.draw(configs), Counting()
    Decoder(config).to(dtype)(torch.zeros(2, 7, dtype=torch.long), cache=cache)
    assert cache.held == 2 * 7 * kv_cache_bytes_per_token(config, dtype.itemsize)


def test_kv_cache_of_opt_13b():
    """Kwon et al. 2023, section 3: 800 KB a token."""
    opt = ModelConfig(50272, 5120, 40, 40, 40, 128, 20480, 2048, family="gpt2")
    assert kv_cache_bytes_per_token(opt, 2) == 800 * 1024


@pytest.mark.parametrize("call, complaint", [
    (lambda: state_bytes(1, "int8"), "precision 'int8' is not one of float64, float32"),
    (lambda: state_bytes(1, optimizer="lion"), "optimizer 'lion' is not one of sgd, adamw"),
    (lambda: activation_terms(sized("test"), 1, 8, 4, "ring"), "attention 'ring' is not one of naive, sdpa"),
    (lambda: activation_bytes(sized("test"), 1, 8, 4, recompute="half"), "recompute 'half' is not one of"),
    (lambda: working_bytes(sized("test"), 1, 8, 4, "sdpa", "selective"), "sdpa keeps none; try attention ")])
def test_unknown_names_are_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()

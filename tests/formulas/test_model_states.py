import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.formulas.model_states import kv_cache_bytes_per_token, model_state_bytes
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.model.attention_cores import naive_attention
from nanoinfra.model.decoder import Decoder
from nanoinfra.train.loss import linear_cross_entropy
from nanoinfra.train.optimizer import MixedPrecisionOptimizer

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_are_the_trainers(dtype, optimizer):
    model = Decoder(config_for_size("test")).to(dtype)
    got = held_after_a_step(model, optimizer)
    want = model_state_bytes(parameter_count(config_for_size("test")), str(dtype).removeprefix("torch."),
                             optimizer)
    assert got == want


def held_after_a_step(model, optimizer):
    """Bytes by kind of the tensors that a model and its optimizer own."""
    tokens = torch.zeros(1, 4, dtype=torch.long)
    linear_cross_entropy(model.hidden_states(tokens), model.head.weight, tokens, 4).backward()
    opt = MixedPrecisionOptimizer(model, optimizer)
    grads = {name: p.grad for name, p in opt.params.items()}
    opt.step(grads, lr=1e-3)
    held = {"weights": total(model.parameters()), "gradients": total(grads.values())}
    masters = [m for name, m in opt.master_weights.items() if m is not opt.params[name]]
    held |= {"master": total(masters)} if masters else {}
    for kind in ("exp_avg", "exp_avg_sq") if optimizer == "adamw" else ():
        held[kind] = total(t for name, t in opt.state_dict().items() if name.startswith(kind + "/"))
    return held


def total(tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("precision, grad_bytes, want", [
    ("float32", None, 16), ("float64", None, 32), ("bfloat16", 2, 16), ("bfloat16", 4, 18)])
def test_states_a_parameter_are_the_published_ones(precision, grad_bytes, want):
    assert sum(model_state_bytes(10, precision, "adamw", grad_bytes).values()) == 10 * want


def test_zero_needs_120_gb_for_7b5():
    """Rajbhandari et al. 2020, figure 1: the baseline."""
    assert sum(model_state_bytes(7_500_000_000, "float16").values()) == 120e9


class Counting:
    """A KV cache that only counts what it would hold."""
    held = 0

    def attend(self, layer, q, k, v, mask=None):
        self.held += k.nbytes + v.nbytes
        return naive_attention(q, k, v, mask)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES[1:3]))
def test_kv_cache_holds_what_attention_hands_it(configs, data, dtype):
    config, cache = data.draw(configs), Counting()
    Decoder(config).to(dtype)(torch.zeros(2, 7, dtype=torch.long), cache=cache)
    assert cache.held == 2 * 7 * kv_cache_bytes_per_token(config, dtype.itemsize)


def test_kv_cache_of_opt_13b():
    """Kwon et al. 2023, section 3: 800 KB a token."""
    opt = ModelConfig(50272, 5120, 40, 40, 40, 128, 20480, 2048, family="opt")
    assert kv_cache_bytes_per_token(opt, 2) == 800 * 1024


@pytest.mark.parametrize("call, complaint", [
    (lambda: model_state_bytes(1, "int8"), "precision 'int8' is not one of float64, float32"),
    (lambda: model_state_bytes(1, optimizer="lion"), "optimizer 'lion' is not one of sgd, adamw")])
def test_unknown_names_are_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()

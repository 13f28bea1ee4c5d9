"""The passes compiled from C make what torch's operations make, in few operations, where pages lie."""
import os
import platform
import random
import shutil
from dataclasses import replace

import pytest
import torch
from nanoinfra.kernels.cpu import decode_kernels
from torch.utils._python_dispatch import TorchDispatchMode

from nanoinfra.distributed.mesh import Mesh
from nanoinfra.model.decoder import Decoder
from nanoinfra.serve.command_line_options import EngineOptions
from nanoinfra.serve.engine import cpu_decoder_block, packed_linear
from nanoinfra.serve.engine.engine import Engine
from nanoinfra.serve.engine.load_engine import load_engine, pack_weights_and_use_c_kernels
from nanoinfra.serve.engine.packed_linear import PackedLinear
from nanoinfra.serve.engine.paged_attention import PagedKVCache
from nanoinfra.serve.engine.request_and_output import Request, SamplingParams
from tests.families import VARIANTS
from tests.model.test_decoder import config
from tests.model.twins import FAMILIES, scrambled

CC = os.environ.get("CC", "cc")
pytestmark = pytest.mark.skipif(not shutil.which(CC), reason=f"there is no C compiler {CC} here")
GREEDY, LLAMAS = SamplingParams(temperature=0), ("llama", "qwen3")


SHAPE = {"head_dim": 10, "kv_heads": 3, "heads": 6, "context": 200}


def compiled(dtype):
    return decode_kernels.compile_decode_kernels(dtype, K=4, KV=1, G=1, BLOCK=4)


def prompt(seed, n):
    return random.Random(seed).choices(range(97), k=n)


def made(family, dtype, fast, **how):
    """An engine of the family's tiny model, with passes or with torch's operations."""
    engine = Engine(scrambled(Decoder(replace(config(family), **SHAPE))).to(dtype), **how)
    if fast:
        pack_weights_and_use_c_kernels(engine)
        assert type(engine.kv_cache) is cpu_decoder_block.CpuPagedKVCache
    return engine


def hiddens(engine, asked):
    """What the final norm makes in each step of a run; prompts arrive one a step, all go on to their ends."""
    found = []
    engine.model.norm.register_forward_hook(lambda norm, x, y: found.append(y[0]))
    for i, tokens in enumerate(asked):
        engine.add_request(Request(f"r{i}", tokens, GREEDY, max_tokens=6, ignore_eos=True))
        engine.step()
    said = {}
    while engine.has_unfinished_requests:
        for event in engine.step():
            said.setdefault(event.request_id, []).extend(event.token_ids)
    return found, said


@pytest.mark.parametrize("family", [*LLAMAS, *VARIANTS])
@pytest.mark.parametrize("size, budget", [(16, 512), (1, 512), (3, 11), (5, 7)])
@torch.inference_mode()
def test_steps_of_all_kinds_are_torchs(family, size, budget):
    """Prompts of one length at once, chunks with blocks before them, single tokens, all in one step."""
    asked = [prompt(seed, n) for seed, n in enumerate((9, 33, 33, 1, 60, 17, 9))]
    asked.append(asked[1][:20] + prompt(9, 5))                           # its prefix is known
    how = {"num_blocks": 700 // size, "block_size": size, "max_num_batched_tokens": budget}
    (want, told), (got, said) = (hiddens(made(family, torch.float32, fast, **how), asked)
                                 for fast in (False, True))
    assert said == told and len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", LLAMAS)
@pytest.mark.parametrize("budget", [1, 40])              # a token at a time, or the whole prompt
@torch.inference_mode()
def test_bfloat16_is_no_further_from_float32_than_torchs(family, budget):
    """Of the same weights, hidden states of a prompt."""
    def hidden(dtype, fast):
        engine = made(family, torch.bfloat16, fast and dtype == torch.bfloat16, num_blocks=40,
                      max_num_batched_tokens=budget)
        engine.model.to(dtype)
        engine.kv_cache.kv_memory = engine.kv_cache.kv_memory.to(dtype)
        return torch.cat(hiddens(engine, [prompt(0, 40)])[0][:40 // budget]).float()
    exact = hidden(torch.float32, False)
    torchs, ours = ((hidden(torch.bfloat16, fast) - exact).abs().mean() for fast in (False, True))
    assert 0 < ours < 1.1 * torchs


@torch.inference_mode()
def test_residuals_are_torchs_to_the_bit():
    """A third of these sums lie halfway between two bfloat16."""
    engine = made("llama", torch.bfloat16, True, num_blocks=40)
    draws = torch.Generator().manual_seed(0)
    x, more = (torch.randint(256, 512, (1, 50, 30), generator=draws).bfloat16() for _ in "ab")
    want = x + more
    engine.model.blocks[0].norm2(x, more)
    assert torch.equal(x, want)


@pytest.mark.parametrize("dtype", packed_linear.PACKED_LINEAR_DTYPES)
@pytest.mark.parametrize("budget", [1, 3, 512])                          # chunks that end where rows are none
@torch.inference_mode()
def test_prompts_are_scored_as_torch_scores_them(dtype, budget):
    scored = []
    for fast in (False, True):
        engine = made("llama", dtype, fast, num_blocks=40, max_num_batched_tokens=budget)
        engine.add_request(Request("r", prompt(0, 20), GREEDY, max_tokens=2, prompt_logprobs=True,
                                   logprobs=2, ignore_eos=True))
        events = []
        while engine.has_unfinished_requests:
            events += engine.step()
        scored.append([each.logprob for event in events for each in (*event.prompt_logprobs,
                                                                     *event.logprobs)][1:])
    near = 1e-4 if dtype == torch.float32 else 0.2
    assert scored[0][0] < 0 and scored[1] == pytest.approx(scored[0], abs=near)


def products(names):
    """Products that torch or its oneDNN computed."""
    return sum(names.count(name) for name in ("_linear_pointwise", "linear", "mm", "addmm"))


class Operations(TorchDispatchMode):
    """Which of torch's operations run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def operations(layers, fast):
    """Those of a step in which four sequences decode."""
    engine = Engine(scrambled(Decoder(replace(config("llama"), layers=layers))), num_blocks=40)
    if fast:
        pack_weights_and_use_c_kernels(engine)
    for i in range(4):
        engine.add_request(Request(f"r{i}", prompt(i, 20), GREEDY, max_tokens=6, ignore_eos=True))
    engine.step()
    with Operations() as found:
        engine.step()
    return found.names


def test_a_layer_takes_few_operations_and_puts_no_keys_together():
    one, three, plain = operations(1, True), operations(3, True), operations(3, False)
    assert len(three) - len(one) == 2 * 12 and products(three) == 4 * 3 + 1
    assert three.count("index_select") <= 1                              # the embedding
    assert len(plain) - len(operations(1, False)) > 2 * 60               # 82 a layer with torch 2.13


@torch.inference_mode()
def test_steps_of_any_size_find_their_products_compiled(monkeypatch):
    """By the numbers of rows that oneDNN sees: few, and each before the first request."""
    seen, product, draws = set(), PackedLinear._product, random.Random(0)
    monkeypatch.setattr(PackedLinear, "_product", lambda self, x: (seen.add(len(x.view(-1, x.shape[-1]))),
                                                                   product(self, x))[1])
    engine = made("llama", torch.float32, True, num_blocks=300, max_num_batched_tokens=150, max_num_seqs=20)
    warmed, sizes = set(seen), set()
    assert len(warmed) == 42 and max(warmed) == 160
    for i in range(60):
        engine.add_request(Request(f"r{i}", prompt(i, draws.randint(1, 60)), GREEDY,
                                   max_tokens=draws.randint(1, 9)))
        engine.step()
        sizes.add(sum(each["new"] for each in engine.stats()["batch"]))
    assert seen == warmed and len(sizes - warmed) > 10


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 100])
@torch.inference_mode()
def test_rows_that_fill_up_change_nothing(rows):
    linear, x = torch.nn.Linear(12, 20), torch.randn(rows, 12)
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(PackedLinear(linear)(x[None]), linear(x)[None], rtol=0,
                               atol=1e-5)
    torch.testing.assert_close(PackedLinear(linear)(x[0]), linear(x[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", packed_linear.PACKED_LINEAR_DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 1024, 1025, 5000])
def test_the_likeliest_is_the_first_of_the_largest(dtype, vocab):
    quick = compiled(dtype)
    logits = torch.randint(-9, -3, (40, vocab), generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[3, vocab // 2] = 2.0
    logits[4, vocab - 1] = 2.0
    assert decode_kernels.argmax_with_kernels(quick, logits) == logits.float().argmax(-1).tolist()


@pytest.mark.parametrize("dtype", packed_linear.PACKED_LINEAR_DTYPES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.inference_mode()
def test_one_who_is_alone_is_computed_by_gemv(family, dtype):
    """Its logits, those of a model of torch's operations; no product is left to torch or oneDNN."""
    plain, fast = (Engine(scrambled(Decoder(config(family))).to(dtype), num_blocks=40) for _ in "ab")
    pack_weights_and_use_c_kernels(fast)
    found = []
    for engine in (plain, fast):
        logits = []
        engine.model.head.register_forward_hook(lambda head, x, y, logits=logits: logits.append(y.float()))
        engine.add_request(Request("r", prompt(0, 20), GREEDY, max_tokens=3, ignore_eos=True))
        engine.step()
        with Operations() as operations:
            engine.step()
        found.append(logits[1])
    assert products(operations.names) == 0
    near = 0.03 if dtype == torch.bfloat16 else 1e-5
    assert (found[1] - found[0]).abs().max() < near * found[0].abs().max()


@pytest.mark.parametrize("dtype", packed_linear.PACKED_LINEAR_DTYPES)
@pytest.mark.parametrize("ins, outs, bias", [(64, 96, False), (32, 32, True), (1, 7, True), (37, 1, False),
                                             (576, 129, True)])
@torch.inference_mode()
def test_a_row_times_a_weight(ins, outs, bias, dtype):
    """Of each output one sum in float32, rounded once."""
    linear, draws = torch.nn.Linear(ins, outs, bias=bias), torch.Generator().manual_seed(0)
    for part in (linear.weight, linear.bias) if bias else (linear.weight,):
        part.copy_(torch.randn(part.shape, generator=draws))
    linear, x = linear.to(dtype), torch.randn(1, 1, ins, generator=draws).to(dtype)
    got = PackedLinear(linear, gemv=compiled(dtype).gemv)(x)
    wide = [part.double() for part in (x, linear.weight)]
    exact = torch.nn.functional.linear(*wide, linear.bias.double() if bias else None)
    sums = (wide[0].abs() @ wide[1].abs().T) * ins * 2 ** -24            # float32's roundings on the way
    rounding = exact.abs() * (2 ** -8 if dtype == torch.bfloat16 else 2 ** -23)
    assert got.shape == (1, 1, outs) and ((got - exact).abs() <= sums + rounding + 1e-30).all()


@torch.inference_mode()
def test_weights_lie_there_twice_only_where_both_orders_are_read(monkeypatch):
    linear = torch.nn.Linear(16, 24)
    gemv = compiled(torch.float32).gemv
    assert PackedLinear(linear).weight is None and PackedLinear(linear).packed is not None
    assert PackedLinear(linear, gemv=gemv).weight.data_ptr() == linear.weight.data_ptr()     # no copy of one
    monkeypatch.setattr(packed_linear, "why_onednn_cannot_pack", lambda dtype: "it does not")
    assert PackedLinear(linear).packed is None and PackedLinear(linear).weight is not None


@pytest.mark.parametrize("dtype", packed_linear.PACKED_LINEAR_DTYPES)
@torch.inference_mode()
def test_where_onednn_packs_nothing_torchs_linear_does_it_and_says_so(monkeypatch, dtype):
    """As on a CPU with AVX2 alone, in bfloat16."""
    asked = [prompt(0, 9), prompt(1, 12)]
    want = hiddens(made("llama", dtype, False, num_blocks=40), asked)[0]
    monkeypatch.setattr(packed_linear, "why_onednn_cannot_pack", lambda dtype: "it does not")
    engine = Engine(scrambled(Decoder(replace(config("llama"), **SHAPE))).to(dtype), num_blocks=40)
    assert "by torch's linear (oneDNN does not pack: it does not)" in pack_weights_and_use_c_kernels(engine)
    got = hiddens(engine, asked)[0]
    near = 2e-5 if dtype == torch.float32 else 0.1
    assert len(got) == len(want) and all((a - b).abs().max() < near for a, b in zip(got, want))


@pytest.mark.parametrize("flags, says", [("-march=x86-64", "SSE2"), ("-march=haswell", "AVX2")])
@torch.inference_mode()
def test_compiled_for_another_processor_it_computes_the_same(monkeypatch, flags, says):
    """Of what this one can run; -march=native is what all the other tests have."""
    monkeypatch.delenv("CFLAGS", raising=False)
    own = compiled(torch.float32).instruction_set().decode()
    if platform.machine() != "x86_64" or says == "AVX2" and own not in ("AVX2", "AVX-512"):
        pytest.skip(f"needs an x86-64 processor with {says}")
    monkeypatch.setenv("CFLAGS", flags)
    engine = Engine(scrambled(Decoder(replace(config("llama"), **SHAPE))), num_blocks=40)
    assert f"of one by C ({says})" in pack_weights_and_use_c_kernels(engine)
    asked = [prompt(0, 9), prompt(1, 12)]
    got, want = hiddens(engine, asked), hiddens(made("llama", torch.float32, False, num_blocks=40), asked)
    assert got[1] == want[1] and all((a - b).abs().max() < 2e-5 for a, b in zip(got[0], want[0]))


def test_where_tmpdir_is_mounted_noexec_they_are_loaded_from_the_cache(monkeypatch, tmp_path):
    load, refused = decode_kernels.ctypes.CDLL, [tmp_path / "tmp"]

    def mounted(path):
        if any(path.startswith(str(folder)) for folder in refused):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)
    monkeypatch.setattr(decode_kernels.ctypes, "CDLL", mounted)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert compiled(torch.float32).instruction_set()
    assert [*(tmp_path / "home" / ".cache" / "nanoinfra").iterdir()] == []
    refused.append(tmp_path)
    with pytest.raises(RuntimeError, match="failed to map.*home.*set TMPDIR to a folder that is not mounted"):
        compiled(torch.float32)


@pytest.mark.parametrize("compiler, why", [("none", "No such file"), ("false", "does not compile")])
@torch.inference_mode()
def test_without_a_compiler_torch_does_it_and_says_so(monkeypatch, compiler, why):
    monkeypatch.setenv("CC", compiler)
    engine = Engine(scrambled(Decoder(config("llama"))), num_blocks=40)
    plain = Engine(scrambled(Decoder(config("llama"))), num_blocks=40)
    said = pack_weights_and_use_c_kernels(engine)
    assert type(engine.kv_cache) is PagedKVCache and why in said and "of one by the same" in said
    asked = [prompt(0, 9), prompt(1, 12)]
    assert hiddens(engine, asked)[1] == hiddens(plain, asked)[1]


def test_the_server_says_on_start_who_computes(model, capfd):
    engine = load_engine(EngineOptions(str(model), kv_memory=1 << 20), Mesh())
    said = capfd.readouterr().err
    assert said.startswith("nanoinfra: products of many rows by ") and "all between by passes in C" in said
    assert f"of one by C ({engine.kv_cache.kernels.instruction_set().decode()})" in said


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(LLAMAS)))
def test_other_families_keep_torchs_operations_between_the_products(family):
    engine = Engine(scrambled(Decoder(config(family))), num_blocks=40)
    assert "all between by torch's operations" in pack_weights_and_use_c_kernels(engine)
    assert type(engine.kv_cache) is PagedKVCache and isinstance(engine.model.blocks[0].attn.out_proj,
                                                                packed_linear.PackedOutPort)


def test_processes_that_load_it_keep_their_numbers_as_they_are():
    """A library linked with -ffast-math would flush the process's small numbers to zero."""
    compiled(torch.float32)
    assert torch.tensor(1e-40).item() * 0.5 > 0 and (torch.full((8,), 1e-40) * 0.5).min().item() > 0

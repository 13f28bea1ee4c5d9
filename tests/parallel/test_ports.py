"""Techniques that plug in at the ports from outside, and what is refused before it switches itself off.

The toy is LoRA on some linears of every kind: an adapter is a child of its linear, a port applies it.
"""
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from nanoinfra.cli import main
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.formulas.tensor_parallel import SEQUENCE_PARALLEL_MODES as SP
from nanoinfra.formulas.tensor_parallel import padded_seq_len, tp_shards
from nanoinfra.model import ports
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import named_generator
from nanoinfra.model.ports import LinearPort, PlainInPort, check_ports, replace_ports, wrap_ports
from nanoinfra.model.weights.read_weights_into_decoder import decoder_on_meta_device
from nanoinfra.parallel import tensor_parallel_decoder
from nanoinfra.parallel.data_parallel import DataParallel
from nanoinfra.parallel.parallelize import ParallelChunk, ParallelConfig, parallelize_for_serving
from nanoinfra.parallel.tensor_parallel_decoder import ColumnParallelPort, RowParallelPort, TensorParallel
from nanoinfra.parallel.vocab_parallel import VocabParallelCrossEntropy
from nanoinfra.parallel.zero import ZeroDataParallel
from nanoinfra.serve.engine import packed_linear
from nanoinfra.serve.engine.cpu_decoder_block import CpuPagedKVCache
from nanoinfra.serve.engine.engine import Engine
from nanoinfra.serve.engine.load_engine import pack_weights_and_use_c_kernels
from nanoinfra.serve.engine.paged_attention import PagedKVCache
from nanoinfra.serve.generate_with_kv_cache import generate
from nanoinfra.train import metrics_and_plots
from tests.parallel.test_tensor_parallel_decoder import config, drawn
from tests.parity import assert_same_gradients

B, T, R = 3, 7, 5                            # R: the adapters' rank
ADAPTED = ("q", "v", "o", "up", "down")


class LoraInPort(LinearPort):
    applied_children = frozenset({"lora_a", "lora_b"})

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x, *linears):
        outs = self.inner(x, *linears)
        for i, linear in enumerate(linears):
            if hasattr(linear, "lora_a"):
                outs[i] = outs[i] + self.inner(linear.lora_a(x), linear.lora_b)[0]
        return outs


class LoraOutPort(LoraInPort):
    def __call__(self, y, linear):
        return self.inner(y, linear) + linear.lora_b(self.inner(y, linear.lora_a))


def add_lora(model, bounds=None):
    """Adapters of the linears in ADAPTED: this rank's part of each, which are drawn by name."""
    bounds = bounds or ranges_of(tp_shards(model.config, 1, 0))
    for name, (rows, columns) in lora_places(model.config, bounds):
        linear = model.get_submodule(name)
        outs, ins = parameter_shapes(model.config)[f"{name}.weight"]
        linear.lora_a = matrix(f"{name}.lora_a", (R, ins), (slice(None), slice(*columns)), linear)
        linear.lora_b = matrix(f"{name}.lora_b", (outs, R), (slice(*rows), slice(None)), linear)
    wrap_ports(model, lambda inner, *_: LoraInPort(inner), lambda inner, _: LoraOutPort(inner))
    return model


def matrix(name, shape, part, like):
    linear = nn.Linear(1, 1, bias=False)
    weight = torch.empty(shape).normal_(0, 0.5, generator=named_generator(0, name))[part].contiguous()
    linear.weight = nn.Parameter(weight.to(next(like.parameters(), weight).dtype))
    return linear


def ranges_of(shards):
    return {name: shard.ranges for name, shard in shards.items()}


def lora_places(cfg, bounds):
    """[(linear, (rows, columns))] of what is adapted."""
    return [(name.removesuffix(".weight"), box) for name, box in bounds.items()
            if name.removesuffix(".weight").rpartition(".")[2] in ADAPTED and len(box) == 2]


def filled(family="llama", dtype=torch.float64):
    cfg = config(family)
    model, read = Decoder(cfg, "naive").to(dtype), drawn(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(read(name, ()))
    return model


def tokens():
    return torch.randint(37, (2, B, T), generator=torch.Generator().manual_seed(1))


# The toy on both ports, over ranks

def alone(family):
    model, (x, y) = add_lora(filled(family)), tokens()
    loss = VocabParallelCrossEntropy(model.head)(model.hidden_states(x), y).sum() / (B * T)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, model(x).detach()


def shared(family, tp, sp, adapted=True):
    """(loss, {name: (box, gradient)}, {op: (calls, bytes)} of the layers, logits, ports) of one rank."""
    mesh, model, (x, y) = Mesh(tp=tp), filled(family), tokens()
    tensor = TensorParallel(model, mesh, sp)
    boxes = ranges_of(tensor.parameter_shards)
    if adapted:
        add_lora(model, boxes)
        for name, (rows, columns) in lora_places(model.config, ranges_of(tensor.parameter_shards)):
            boxes |= {f"{name}.lora_a.weight": ((0, R), columns), f"{name}.lora_b.weight": (rows, (0, R))}
    table = [(row.path, " ".join(map(str, row.chain)), row.linears) for row in check_ports(model)]
    mesh.comm_log.take_records()
    loss = VocabParallelCrossEntropy(model.head)(model.hidden_states(x), y).sum() / (B * T)
    loss.backward()
    sent = {}
    for row in mesh.comm_log.take_records():
        if row.tag == "layers":
            calls, payload = sent.get(row.op, (0, 0))
            sent[row.op] = calls + 1, payload + row.payload_bytes
    grads = tensor.all_reduce_partial_grads({name: p.grad for name, p in model.named_parameters()})
    if sp != "none":                         # a half that every rank has whole saw this rank's tokens
        for name, grad in grads.items():
            if name.endswith(("q.lora_a.weight", "v.lora_a.weight", "up.lora_a.weight", "o.lora_b.weight",
                              "down.lora_b.weight")):
                comm.all_reduce(grad, mesh.tp, "lora")
    found = {name: (boxes[name], grad) for name, grad in grads.items()}
    return loss.item(), found, sent, model(x).detach(), table


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sp", SP)
def test_an_adapter_on_both_ports_is_one_ranks_adapter(ranks, family, sp):
    want_loss, want, logits = alone(family)
    assert all(want[f"blocks.1.attn.{each}.lora_a.weight"].norm() > 1e-3 for each in "qvo")
    for rank, (loss, got, _, said, _) in enumerate(ranks(2).run(shared, family, 2, sp)):
        boxes = {name: tuple(slice(*ends) for ends in box) for name, (box, _) in got.items()}
        assert_same_gradients({name: grad for name, (_, grad) in got.items()},
                              {name: grad[boxes[name]] for name, grad in want.items()}, where=f"rank {rank}")
        assert loss == pytest.approx(want_loss, rel=1e-12)
        torch.testing.assert_close(said, logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sp", SP)
def test_it_sends_collectives_of_its_rank_and_the_rest_as_before(ranks, sp):
    """A column-parallel half has f's, a row-parallel half g's, of B T R numbers."""
    n = 2 * len(ADAPTED)                     # in two layers
    calls = {"none": {"all_reduce": n}, "keep": {"all_gather": n, "reduce_scatter": n},
             "gather": {"all_gather": n + 6, "reduce_scatter": n}}[sp]   # q, v and up of both, once more
    both = (ranks(2).run(shared, "llama", 2, sp, adapted) for adapted in (False, True))
    for (*_, plain, _, _), (*_, got, _, _) in zip(*both):
        size = B * padded_seq_len(T, 2, sp) * R * 8
        assert got == {op: (plain[op][0] + k, plain[op][1] + k * size) for op, k in calls.items()}


def test_a_report_says_who_sits_in_each_port(ranks):
    table = ranks(2).run(shared, "llama", 2, "none")[0][-1]
    assert table[:4] == [
        ("blocks.0.attn.in_proj", f"LoraInPort {ColumnParallelPort.__name__}", ("q", "k", "v")),
        ("blocks.0.attn.out_proj", f"LoraOutPort {RowParallelPort.__name__}", ("o",)),
        ("blocks.0.mlp.in_proj", f"LoraInPort {ColumnParallelPort.__name__}", ("gate", "up")),
        ("blocks.0.mlp.out_proj", f"LoraOutPort {RowParallelPort.__name__}", ("down",))] and len(table) == 8


# The toy on a served model

@pytest.mark.parametrize("pack_first", [True, False])
@torch.inference_mode()
def test_an_adapter_changes_the_logits_of_packed_linears_as_it_should(pack_first):
    (x, _), want = tokens(), add_lora(filled(dtype=torch.float32))
    model = filled(dtype=torch.float32)
    base, adapted = model(x), want(x)
    if pack_first:
        packed_linear.pack_linears(model)
        add_lora(model)
    else:                                    # the packed port takes the plain one's place, inside
        packed_linear.pack_linears(add_lora(model))
    assert {type(row.chain[-1]).__base__ for row in check_ports(model)} == {packed_linear.PackedPort}
    assert all(len(row.chain) == 2 for row in check_ports(model))
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-4)
    assert (adapted - base).abs().max() > 0.1


@torch.inference_mode()
def test_the_kernels_that_call_no_port_stay_out_of_a_wrapped_one_and_the_report_says_so():
    engine, plain = (Engine(model, num_blocks=40) for model in (add_lora(filled(dtype=torch.float32)),
                                                                filled(dtype=torch.float32)))
    want = list(generate(add_lora(filled()), [1, 2, 3], 5))
    said = pack_weights_and_use_c_kernels(engine)
    assert "by torch's operations (the decode kernels would skip LoraInPort at blocks.0.attn.in_proj)" in said
    assert type(engine.kv_cache) is PagedKVCache
    assert list(generate(engine.model, [1, 2, 3], 5)) == want
    if "passes in C" in pack_weights_and_use_c_kernels(plain):                          # with a compiler
        assert type(plain.kv_cache) is CpuPagedKVCache
        assert {str(*row.chain) for row in check_ports(plain.model)} == {"PortComputedByCpuBlock"}
        with pytest.raises(TypeError, match="0.attn.in_proj: PortComputedByCpuBlock is called by nobody"):
            add_lora(plain.model)


@torch.inference_mode()
def test_a_packed_port_applies_other_linears_plainly():
    first, second, other = (nn.Linear(4, n) for n in (3, 6, 2))
    x = torch.randn(2, 4)
    want = first(x), second(x), other(x)
    port = packed_linear.PackedInPort(first, second)
    out = packed_linear.PackedOutPort(single := nn.Linear(4, 3))
    for got in (*zip(port(x, first, second), want), (port(x, other)[0], want[2]), (out(x, other), want[2])):
        torch.testing.assert_close(*got)
    assert first.weight is second.bias is single.weight is None
    assert "not the linear whose weights PackedInPort has packed" in port.why_not_taken(other)


# What would switch itself off in silence

class Wrapped(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return 2 * self.linear(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def of_class(linear):
    linear.__class__ = Doubled


def with_forward(linear):
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)


CHANGES = {  # what doubles a linear's output: {how: (change of an attention, what is lost)}
    "a module around it": (lambda attn: setattr(attn, "q", Wrapped(attn.q)), "Wrapped's forward"),
    "a subclass": (lambda attn: of_class(attn.q), "Doubled's forward"),
    "a forward": (lambda attn: with_forward(attn.q), "the forward that was set on it"),
    "a hook": (lambda attn: attn.q.register_forward_hook(lambda _, __, y: 2 * y), "its hooks"),
    "a parametrization": (lambda attn: [parametrize.register_parametrization(attn.q, key, Twice())
                                        for key in ("weight", "bias")], "ParametrizedLinear's forward")}


@pytest.mark.parametrize("change, lost", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_linear_that_is_replaced_runs_alone_and_is_refused_where_weights_are_read(change, lost):
    model, want, (x, _) = filled("gpt2"), filled("gpt2"), tokens()
    for p in want.blocks[0].attn.q.parameters():
        p.mul_(2)
    change(model.blocks[0].attn)
    torch.testing.assert_close(model(x), want(x), rtol=0, atol=0)
    assert len(check_ports(model)) == 8
    why = f"blocks.0.attn.q: {{}} reads the weight and bias of a bare nn.Linear, and would skip {lost}; wrap"
    with pytest.raises(TypeError, match=why.format("tensor parallelism")):
        TensorParallel(model, Mesh())
    with pytest.raises(TypeError, match=why.format("packing")):
        packed_linear.pack_linears(model)
    torch.testing.assert_close(model(x), want(x), rtol=0, atol=0)        # nothing was packed


def test_a_linear_that_is_replaced_is_refused_by_a_training_chunk_and_by_a_server():
    for build in (lambda model, read: ParallelChunk(model, Mesh(), ParallelConfig(), read),
                  lambda model, read: parallelize_for_serving(model, Mesh(), read, torch.float32)):
        model = decoder_on_meta_device(config("llama"))
        model.blocks[1].mlp.down = Wrapped(model.blocks[1].mlp.down)
        with pytest.raises(TypeError, match="blocks.1.mlp.down: tensor parallelism .* skip Wrapped's"):
            build(model, drawn(config("llama")))


def test_what_is_wrapped_after_the_check_is_refused_by_the_next_one_and_when_it_is_called():
    model, (x, _) = filled(), tokens()
    TensorParallel(model, Mesh())
    model.blocks[0].mlp.down = Wrapped(model.blocks[0].mlp.down)
    with pytest.raises(TypeError, match="blocks.0.mlp.down: the row-parallel port reads"):
        check_ports(model)
    with pytest.raises(TypeError, match="the row-parallel port reads .* skip Wrapped's forward"):
        model(x)
    model = filled()
    TensorParallel(model, Mesh())
    add_lora(model)
    model.blocks[0].attn.v.lora_b = Wrapped(model.blocks[0].attn.v.lora_b)                # inside a toy too
    with pytest.raises(TypeError, match="the column-parallel port reads .* skip Wrapped's forward"):
        model(x)


def test_a_linear_other_than_the_packed_one_is_refused():
    model = filled(dtype=torch.float32)
    packed_linear.pack_linears(model)
    model.blocks[0].attn.o = nn.Linear(16, 16)
    with pytest.raises(TypeError, match="blocks.0.attn.o: it is not the linear whose weights PackedOutPort"):
        check_ports(model)
    model = filled(dtype=torch.float32)
    model.head = Wrapped(model.head)
    with pytest.raises(TypeError, match="head: packing reads .* skip Wrapped's forward"):
        packed_linear.pack_linears(model)


def test_a_child_that_no_port_applies_is_refused():
    model = filled()
    model.blocks[0].mlp.up.lora_a = nn.Linear(16, R)
    for check in (check_ports, packed_linear.pack_linears, lambda model: TensorParallel(model, Mesh())):
        with pytest.raises(TypeError, match="blocks.0.mlp.up has the child 'lora_a', which no port applies: "
                                            "PlainInPort; wrap the port"):
            check(model)
    parallel = ParallelChunk(decoder_on_meta_device(config("llama")), Mesh(), ParallelConfig(),
                             drawn(config("llama")))
    parallel.model.blocks[1].attn.k.rank_one = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="blocks.1.attn.k has the child 'rank_one'"):
        check_ports(add_lora(parallel.model))


def test_a_port_that_is_none_or_drops_another_one_is_refused():
    model = filled()
    model.blocks[0].attn.out_proj = lambda y, linear: linear(y)
    for use in (check_ports, add_lora, lambda model: TensorParallel(model, Mesh())):
        with pytest.raises(TypeError, match="blocks.0.attn.out_proj has a port <function .* make it a Line"):
            use(model)
    with pytest.raises(TypeError, match="blocks.0.attn.in_proj: PlainInPort would drop what Plain"):
        wrap_ports(filled(), lambda inner, *_: PlainInPort(), lambda inner, _: inner)


def test_a_port_that_sums_over_ranks_is_not_replaced():
    two = type("M", (), {"tp": replace(Mesh().tp, global_ranks=(0, 1)),
                         "split": lambda self, *_: (Mesh().tp, Mesh().tp)})()
    model = decoder_on_meta_device(config("llama"))
    TensorParallel(model, two)
    with pytest.raises(TypeError, match="attn.in_proj is ColumnParallelPort; a port in the place of Column"):
        packed_linear.pack_linears(model)
    model = filled(dtype=torch.float32)
    TensorParallel(model, Mesh())            # of one rank, it is plain
    packed_linear.pack_linears(model)
    with pytest.raises(TypeError, match="attn.in_proj is PackedInPort; a port in the place of PackedInPort"):
        replace_ports(model, PlainInPort, PlainInPort)


# A trainable parameter that gets no gradient

class Forgetful(ColumnParallelPort):
    """Applies k, but not for training."""

    def __call__(self, x, *linears):
        if len(linears) < 3:
            return super().__call__(x, *linears)
        query, value = super().__call__(x, linears[0], linears[2])
        with torch.no_grad():
            key, = super().__call__(x, linears[1])
        return [query, key, value]


FLAGS = ["train", "--model", "test", "--data", "random", "--steps", "2", "--seq", "8", "--micro-batch", "1",
         "--threads", "1"]


def trained(flags, port=Forgetful):
    """What became of a run whose in-port is of another kind: the exit code, or the error."""
    with mock.patch.object(tensor_parallel_decoder, "ColumnParallelPort", port):
        try:
            return main([*FLAGS, *flags])
        except RuntimeError as error:
            return str(error)


@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
def test_a_parameter_without_a_gradient_ends_the_first_step(ranks, tmp_path, zero):
    names = ", ".join(f"blocks.{i}.attn.k.weight" for i in range(4))
    flags = ["--dp", "2", "--zero", zero, "--global-batch", "3"]         # rank 1 has an empty micro-batch
    for got in ranks(2).run(trained, [*flags, "--out", str(tmp_path / "k")]):
        assert got.startswith(f"no gradient came for {names}: nothing in the model uses them; freeze them")
    assert not (tmp_path / "k" / "metrics.jsonl").exists() or not metrics_and_plots.read_metrics(
        tmp_path / "k" / "metrics.jsonl")
    assert ranks(2).run(trained, [*flags, "--out", str(tmp_path / "all")], ColumnParallelPort) == [0, 0]
    assert ranks(2).run(trained, [*flags, "--out", str(tmp_path / "frozen"), "--freeze", "*.attn.k.weight"]) \
        == [0, 0]


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x, both):
        return self.used(x) + (self.unused(x) if both else 0)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_foreign_model_may_leave_parameters_out_and_says_which(zero):
    model, axis = Sparse(), Mesh().data
    parallel = ZeroDataParallel(model, axis, zero) if zero else DataParallel(model, axis)
    for both in (False, True, False):
        parallel.zero_grad()
        for i in range(2):
            parallel.prepare_for_backward(is_last=i == 1)
            model(torch.ones(1, 2), both and i == 0).sum().backward()    # in any micro-batch is enough
        grads = parallel.finish_grad_sync()
        assert parallel.names_without_grad == (set() if both else {"unused.weight", "unused.bias"})
        assert (grads["unused.weight"].abs().max() > 0) == both


def test_layers_say_which_linears_their_ports_apply():
    for family, inputs in (("gpt2", ("up",)), ("llama", ("gate", "up"))):
        rows = check_ports(Decoder(config(family)))
        assert [row.linears for row in rows[:4]] == [("q", "k", "v"), ("o",), inputs, ("down",)]
        assert all(type(row.chain[0]) in (ports.PlainInPort, ports.PlainOutPort) for row in rows)

"""The decoder cut by tp, with and without sp, beside dp, ZeRO and recompute: one rank's gradients."""
from dataclasses import replace
from itertools import product
from math import prod

import pytest
import torch

from nanoinfra.config import MODEL_FAMILIES, ModelConfig
from nanoinfra.data.batch import Batch
from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.formulas.tensor_parallel import SEQUENCE_PARALLEL_MODES as SP
from nanoinfra.formulas.tensor_parallel import tp_shards
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import draw_initial_tensor, named_generator
from nanoinfra.model.ports import check_ports
from nanoinfra.model.weights.read_weights_into_decoder import decoder_on_meta_device
from nanoinfra.parallel.parallelize import ParallelChunk, ParallelConfig
from nanoinfra.parallel.sequence_parallel import SequenceParallelPositionEmbedding
from nanoinfra.parallel.tensor_parallel_decoder import ColumnParallelPort, RowParallelPort, TensorParallel
from nanoinfra.parallel.vocab_parallel import ParallelLMHead, VocabParallelEmbedding
from nanoinfra.train.loss import count_valid_tokens, linear_cross_entropy
from tests.families import KINDS, VARIANTS
from tests.parity import assert_same_gradients

T, SEED = 7, 3                                         # 7 tokens: neither 2 nor 4 ranks share them evenly
SMOLLM = dict(width=18, heads=9, kv_heads=3, head_dim=2, hidden=13)
CASES = [(family, tp, sp, True) for family in KINDS for tp in (2, 4) for sp in SP]
CASES += [("llama", 2, "gather", False), ("opt", 4, "none", False), ("llama-9/3", 3, "none", True),
          ("llama-9/3", 3, "gather", False), ("qwen3-9/3", 3, "keep", True),
          ("window above", 2, "gather", True), ("yarn and biases", 4, "keep", False)]
MESHES = [  # family, dp, tp, sp, zero, recompute, micro-batch: every two of them somewhere
    ("llama", 2, 2, "none", 0, "full", 1), ("gpt2", 2, 2, "gather", 0, "selective", 2),
    ("bloom", 2, 2, "keep", 1, "none", 1), ("qwen3", 2, 2, "gather", 1, "full", 2),
    ("llama", 2, 2, "gather", 2, "none", 1), ("opt", 2, 2, "none", 2, "full", 1),
    ("qwen3", 2, 2, "none", 3, "selective", 1), ("gpt2", 2, 2, "gather", 3, "full", 1),
    ("llama", 2, 2, "keep", 3, "none", 2)]


@pytest.mark.parametrize("family, tp, sp, tied", CASES)
def test_gradients_match_one_rank(ranks, family, tp, sp, tied):
    compare(ranks, family, tied, ParallelConfig(sequence_parallel=sp, dtype=torch.float64), tp=tp)


@pytest.mark.parametrize("family, dp, tp, sp, zero, recompute, micro", MESHES)
def test_gradients_match_one_rank_beside_data_parallelism(ranks, family, dp, tp, sp, zero, recompute, micro):
    plan = ParallelConfig(sp, zero, recompute, dtype=torch.float64)
    compare(ranks, family, True, plan, dp=dp, tp=tp, micro=micro)


@pytest.mark.prove
@pytest.mark.parametrize("family, tp, sp, zero", [
    *product(KINDS, (2, 4), SP, (0, 1, 2, 3)),
    *product(["llama-9/3", "qwen3-9/3"], [3], SP, (0, 1, 2, 3))])
def test_every_combination_matches_one_rank(ranks, family, tp, sp, zero):
    for tied, recompute in ((True, "none"), (False, "selective"), (True, "full")):
        compare(ranks, family, tied, ParallelConfig(sp, zero, recompute, dtype=torch.float64), dp=2, tp=tp)


@pytest.mark.parametrize("sp", SP)
def test_frozen_parameters_have_no_gradient_and_stop_none(ranks, sp):
    compare(ranks, "qwen3", True, ParallelConfig(sequence_parallel=sp, dtype=torch.float64), tp=2,
            frozen=("q_norm", "up", "embed"))
    compare(ranks, "gpt2", True, ParallelConfig(sequence_parallel=sp, dtype=torch.float64), tp=2,
            frozen=("norm1", "o", "positions"))


@pytest.mark.parametrize("family, tp, sp", [
    ("llama", 4, "none"), ("gpt2", 2, "gather"), ("bloom", 4, "keep")])
def test_every_parameter_is_its_box_and_every_module_its_kind(ranks, family, tp, sp):
    cfg = config(family)
    every = ranks(tp).run(described, family, tp, sp)
    for rank, (kinds, held, ports) in enumerate(every):
        assert held == {name: shard.size for name, shard in tp_shards(cfg, tp, rank).items()}
        assert kinds["embed"] == VocabParallelEmbedding.__name__ and kinds["head"] == ParallelLMHead.__name__
        assert {kinds[f"blocks.{i}.{name}"] for i in range(2) for name in ("attn.q", "attn.o", "mlp.down")} \
            == {"Linear"}
        assert ports == [f"blocks.{i}.{part}.{port.__name__}" for i in range(2) for part in ("attn", "mlp")
                         for port in (ColumnParallelPort, RowParallelPort)]
        assert kinds.get("positions") == {"gpt2": SequenceParallelPositionEmbedding.__name__}.get(family)
    whole = sum(1 for name, shape in parameter_shapes(cfg).items() if held[name] == shape)
    assert 0 < whole < len(held) / 1.5                 # norms and biases of rows; the rest is cut


def test_what_ranks_cannot_share_is_refused_with_what_they_can():
    def cut(tp, **sizes):
        axis = Mesh().tp
        cut_mesh = type("M", (), {"tp": replace(axis, global_ranks=tuple(range(tp)))})
        TensorParallel(decoder_on_meta_device(config("llama", **sizes)), cut_mesh)
    with pytest.raises(ValueError, match="tp=3 cannot share 4 query and 2 KV heads.*try --tp 2"):
        cut(3)
    with pytest.raises(ValueError, match="tp=8 cannot share 4 query and 2 KV heads.*try --tp 4"):
        cut(8)
    with pytest.raises(ValueError, match="none, keep, gather, not 'some'"):
        TensorParallel(decoder_on_meta_device(config("llama")), Mesh(), "some")


def test_weights_that_are_there_already_are_rank_0s(ranks):
    for rank, got in enumerate(ranks(2).run(cut_in_place)):
        for name, shard in tp_shards(config("gpt2"), 2, rank).items():
            want = drawn(config("gpt2"))(name, shard.slices_within()).double()
            torch.testing.assert_close(got[name], want, rtol=0, atol=0)


def config(family, tied=True, **sizes):
    """2 layers, an odd vocabulary, 2 KV heads for 4 query heads (4 where all are alike), hidden width 22."""
    if family.endswith("-9/3"):
        family, sizes = family.removesuffix("-9/3"), SMOLLM | sizes
    change = VARIANTS.get(family, {})
    family, sizes = change.get("family", family), {**change, **sizes}
    grouped = MODEL_FAMILIES[family].position_encoding == "rope"
    usual = dict(vocab=37, width=16, layers=2, heads=4, kv_heads=2 if grouped else 4, head_dim=4, hidden=22,
                 context=12)
    return ModelConfig(**{**usual, "tied": tied, "family": family, **sizes})


def drawn(cfg):
    """Weights that leave nothing at 0 or 1: biases and norms too are drawn."""
    every = parameter_shapes(cfg)

    def read(name, part):
        noise = torch.empty(every[name]).normal_(0, 0.3, generator=named_generator(SEED, name))
        return (draw_initial_tensor(name, every[name], cfg.layers, SEED) + noise)[part]
    return read


def samples(cfg, n=5):
    """Tokens and targets (n, T), a different number of them valid in each."""
    random = torch.Generator().manual_seed(1)
    x, y = torch.randint(cfg.vocab, (2, n, T), generator=random)
    for i in range(n):
        y[i, :i] = IGNORE_INDEX
    return x, y


def compare(ranks, family, tied, plan, dp=1, tp=1, micro=5, frozen=()):
    cfg = config(family, tied)
    want = alone(cfg, frozen)
    every = ranks(dp * tp).run(shared, cfg, plan, dp, tp, micro, frozen)
    norm = torch.stack([w.norm() for w in want.values()]).norm().item()
    seen = {name: torch.zeros_like(w) for name, w in want.items()}
    for rank, (loss, got_norm, parts) in enumerate(every):
        got = {name: want[name].clone() for name in parts}
        for name, (index, part) in parts.items():
            got[name][index], seen[name][index] = part, 1
        assert_same_gradients(got, want, where=f"rank {rank} of dp {dp} tp {tp}, {plan}")
        assert (loss, got_norm) == pytest.approx((every[0][0], norm), rel=1e-10)
    assert all(each.all() for each in seen.values())                       # the boxes are all of it


def alone(cfg, frozen):
    model, read = Decoder(cfg, "naive").double(), drawn(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(read(name, ()))
    freeze(model, frozen)
    x, y = samples(cfg)
    linear_cross_entropy(model.hidden_states(x), model.head.weight, y,
                         int((y != IGNORE_INDEX).sum())).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def freeze(model, frozen):
    for name, p in model.named_parameters():
        p.requires_grad_(name.split(".")[-2] not in frozen)


def shared(cfg, plan, dp, tp, micro, frozen):
    """(loss of all ranks, norm, {name: (slices, this rank's gradient of them)}) of one step."""
    from nanoinfra.distributed import comm
    from nanoinfra.train.optimizer import unscale_and_clip_grads
    mesh = Mesh(dp=dp, tp=tp)
    torch.manual_seed(mesh.rank)                       # a random state of its own on each rank
    model = decoder_on_meta_device(cfg, "naive")
    freeze(model, frozen)
    parallel = ParallelChunk(model, mesh, plan, drawn(cfg))
    x, y = (part[mesh.data.rank::dp] for part in samples(cfg))
    batches = list(map(Batch, x.split(micro), y.split(micro)))
    while len(batches) < -(-5 // (micro * dp)):        # a rank that has fewer samples
        batches.append(Batch(x[:1], torch.full_like(y[:1], IGNORE_INDEX)))
    [count] = count_valid_tokens(batches, mesh.data)
    parallel.data_parallel.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for i, batch in enumerate(batches):
        loss = parallel.loss_head(model.hidden_states(batch.tokens), batch.targets).sum() / count
        parallel.data_parallel.prepare_for_backward(is_last=i == len(batches) - 1)
        loss.backward()
        total += loss.detach()
    grads = parallel.finish_grad_sync()
    axes = [mesh.tp, *([mesh.data] if plan.zero_stage else [])]
    norm = unscale_and_clip_grads(dict(grads), 0, axes=axes,
                                  counted_in_norm=parallel.tensor_parallel.counted_in_norm)
    named = {}
    for name, grad in grads.items():
        shard = parallel.optimizer_shard(name)
        own = grad.reshape(-1)[:prod(shard.size)].view(shard.size)
        named[name] = shard.slices_within(), own.clone()
    return comm.all_reduce(total, mesh.data).item(), norm, named


def described(family, tp, sp):
    model = decoder_on_meta_device(config(family))
    parallel = ParallelChunk(model, Mesh(tp=tp), ParallelConfig(sequence_parallel=sp), drawn(config(family)))
    assert all(p.is_leaf and not p.is_meta for p in parallel.model.parameters())
    return ({name: type(module).__name__ for name, module in model.named_modules()},
            {name: tuple(p.shape) for name, p in model.named_parameters()},
            [f"{row.path.rpartition('.')[0]}.{row.chain[0]}" for row in check_ports(model)])


def cut_in_place():
    mesh, cfg = Mesh(tp=2), config("gpt2")
    model, read = Decoder(cfg).double(), drawn(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(read(name, ()) if mesh.rank == 0 else torch.zeros(()))
    TensorParallel(model, mesh)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())      # the whole is gone
    return {name: p.detach().clone() for name, p in model.named_parameters()}

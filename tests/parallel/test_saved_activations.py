"""What a rank keeps for backward, counted on real ranks by formulas/saved_activations.py's terms."""
import pytest
import torch

from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.saved_activations import (
    embedding_and_head_bytes_by_term,
    layer_activation_bytes_by_term,
)
from nanoinfra.lab.instruments.saved_activations import SavedActivations
from nanoinfra.parallel.parallelize import ParallelConfig
from tests.parallel.test_tensor_parallel import composed
from tests.parallel.test_tensor_parallel_decoder import config

B, T = 3, 7
PARTS = {"norm": ("norm_input", "norm_stats", "norm_scaled"),
         "attn": ("qkv_input", "qkv", "mask", "softmax", "weights", "core_output", "logsumexp", "o_input",
                  "qk_norm_input", "qk_norm_stats", "qk_norm_scaled"),
         "mlp": ("mlp_input", "mlp_hidden"), "block": ("block_input",)}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "bloom"])
@pytest.mark.parametrize("tp, sp, recompute", [
    (1, "none", "none"), (2, "none", "none"), (2, "keep", "none"), (2, "gather", "none"),
    (2, "gather", "selective"), (4, "gather", "selective"), (4, "gather", "full")])
def test_every_part_keeps_its_terms(ranks, family, tp, sp, recompute):
    cfg, how = config(family), ("naive", recompute, tp, sp)
    terms = layer_activation_bytes_by_term(cfg, B, T, 8, *how)
    ends = embedding_and_head_bytes_by_term(cfg, B, T, 8, tp, sp)
    assert {term for part in PARTS.values() for term in part} >= set(terms)
    want = {part: cfg.layers * sum(terms.get(term, 0) for term in names) for part, names in PARTS.items()}
    want["loss"] = ends["head_input"] + ends["logits"]
    if cfg.architecture.position_encoding == "rope":          # cos and sin, one pair, which each layer sees
        want["block" if recompute == "full" else "attn"] += cfg.layers * ends["positions"]
    assert ranks(tp).run(kept, family, tp, sp, recompute)[0] == want       # the rank with the largest part


def kept(family, tp, sp, recompute):
    """Bytes kept inside modules of each kind, summed over the layers."""
    parallel = composed(family, Mesh(tp=tp),
                        ParallelConfig(sequence_parallel=sp, recompute=recompute, dtype=torch.float64))
    model, weights, found = parallel.model, list(parallel.model.parameters()), {}
    kinds = [(block, "block") for block in model.blocks] if recompute == "full" else [
        pair for b in model.blocks
        for pair in ((b.norm1, "norm"), (b.norm2, "norm"), (b.attn, "attn"), (b.mlp, "mlp"))]
    for module, kind in (*kinds, (parallel.loss_head, "loss")):
        count(module, kind, weights, found)
    x = torch.ones(B, T, dtype=torch.long)
    out = parallel.loss_head(model.hidden_states(x), x).mean()
    assert out.requires_grad
    return {kind: sum(each.saved_bytes() for each in found.get(kind, ())) for kind in (*PARTS, "loss")}


def count(module, kind, weights, found):
    forward = module.forward

    def counted(*args):
        with SavedActivations(weights) as counts:
            found.setdefault(kind, []).append(counts)
            return forward(*args)
    module.forward = counted

"""Known-wrong counts of parameters and FLOPs: each has one mistake that a check must find."""
from dataclasses import replace

from lessons.l00_one_step import checks as check
from nanoinfra.lab.mutants import Mutant


def parameters(c, kv_heads=None, side=None, mlp=3, norms=2, heads=None):
    """The right one, with a place for each slip."""
    C, queries = c.width, side or c.heads * c.head_dim
    keys = (kv_heads or c.kv_heads) * c.head_dim
    block = C * (2 * queries + 2 * keys + mlp * c.hidden) + norms * C
    heads = (not c.tied) if heads is None else heads
    return c.vocab * C * (1 + heads) + c.layers * block + (C if norms else 0)


def counts_the_tied_head_twice(c):
    return parameters(c, heads=1)


def forgets_the_untied_head(c):
    return parameters(c, heads=0)


def has_as_many_kv_heads_as_heads(c):
    return parameters(c, kv_heads=c.heads)


def takes_c_for_the_heads_width(c):
    return parameters(c, side=c.width)


def has_an_mlp_of_two_matrices(c):
    return parameters(c, mlp=2)


def forgets_the_norms(c):
    return parameters(c, norms=0)


def knows_one_size(c):
    return {61: parameters(c)}.get(c.vocab, 54_592)


def train_flops(c, batch, seq, times=3, look_up=0, head=1, kv_heads=None, mlp=3, scores=2, side=None):
    """The right one, with a place for each slip."""
    C, queries, keys = c.width, c.heads * c.head_dim, (kv_heads or c.kv_heads) * c.head_dim
    weights = c.layers * C * (2 * queries + 2 * keys + mlp * c.hidden) + (head + look_up) * c.vocab * C
    attention = scores * c.layers * (side or queries) * seq
    return times * 2 * batch * seq * (weights + attention)


def forgets_the_head(c, batch, seq):
    return train_flops(c, batch, seq, head=0)


def multiplies_by_the_look_up(c, batch, seq):
    return train_flops(c, batch, seq, look_up=1)


def multiplies_with_all_kv_heads(c, batch, seq):
    return train_flops(c, batch, seq, kv_heads=c.heads)


def goes_back_once(c, batch, seq):
    return train_flops(c, batch, seq, times=2)


def takes_six_psi(c, batch, seq):
    return 6 * parameters(c) * batch * seq


def forgets_attention(c, batch, seq):
    return train_flops(c, batch, seq, scores=0)


def meets_half_of_the_keys(c, batch, seq):
    return train_flops(c, batch, seq, scores=1)


def attends_with_kv_heads(c, batch, seq):
    return train_flops(c, batch, seq, side=c.kv_heads * c.head_dim)


def attends_with_c(c, batch, seq):
    return train_flops(c, batch, seq, side=c.width)


def attends_in_one_layer(c, batch, seq):
    return train_flops(c, batch, seq, scores=2 / c.layers)


def attends_once_a_sequence(c, batch, seq):
    return train_flops(c, batch, seq, scores=2 / seq)


def sums_values_of_kv_heads(c, batch, seq):
    return train_flops(c, batch, seq, scores=1 + c.kv_heads / c.heads)


def multiplies_two_mlp_matrices(c, batch, seq):
    return train_flops(c, batch, seq, mlp=2)


def has_one_layer(c, batch, seq):
    return train_flops(replace(c, layers=1), batch, seq)


def runs_an_untied_head_twice(c, batch, seq):
    return train_flops(c, batch, seq, head=2 - c.tied)


def costs_one_sequence(c, batch, seq):
    return train_flops(c, 1, seq)


PLAIN, GROUPED, WIDE, OWN, SIZES = (criterion.name for criterion in check.parameters.criteria)
BATCH, LINEAR, SQUARE, TORCH = (criterion.name for criterion in check.train_flops.criteria)
MUTANTS = [
    Mutant("counts the tied head twice", check.parameters, counts_the_tied_head_twice, PLAIN),
    Mutant("has an MLP of two matrices", check.parameters, has_an_mlp_of_two_matrices, PLAIN),
    Mutant("forgets the norms", check.parameters, forgets_the_norms, PLAIN),
    Mutant("has as many KV heads as heads", check.parameters, has_as_many_kv_heads_as_heads, GROUPED),
    Mutant("takes C for the heads' width", check.parameters, takes_c_for_the_heads_width, WIDE),
    Mutant("forgets the untied head", check.parameters, forgets_the_untied_head, OWN),
    Mutant("knows one size", check.parameters, knows_one_size, SIZES),
    Mutant("costs one sequence", check.train_flops, costs_one_sequence, BATCH),
    Mutant("forgets the head", check.train_flops, forgets_the_head, LINEAR),
    Mutant("multiplies by the look-up", check.train_flops, multiplies_by_the_look_up, LINEAR),
    Mutant("multiplies with all KV heads", check.train_flops, multiplies_with_all_kv_heads, LINEAR),
    Mutant("goes back once", check.train_flops, goes_back_once, LINEAR),
    Mutant("takes 6 Psi and no attention", check.train_flops, takes_six_psi, LINEAR),
    Mutant("forgets attention", check.train_flops, forgets_attention, SQUARE),
    Mutant("meets half of the keys", check.train_flops, meets_half_of_the_keys, SQUARE),
    Mutant("attends with KV heads", check.train_flops, attends_with_kv_heads, SQUARE),
    Mutant("attends in one layer", check.train_flops, attends_in_one_layer, SQUARE),
    Mutant("attends once a sequence", check.train_flops, attends_once_a_sequence, LINEAR),
    Mutant("sums values of KV heads", check.train_flops, sums_values_of_kv_heads, SQUARE),
    Mutant("multiplies with two MLP matrices", check.train_flops, multiplies_two_mlp_matrices, LINEAR),
    Mutant("has one layer", check.train_flops, has_one_layer, LINEAR),
    Mutant("attends with C", check.train_flops, attends_with_c, TORCH),
    Mutant("runs an untied head twice", check.train_flops, runs_an_untied_head_twice, TORCH),
]

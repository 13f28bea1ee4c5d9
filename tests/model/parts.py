"""Reading by parts: all ranks' parts make the whole, and a rank's cost no more than its part."""
from math import prod

import torch
from safetensors import safe_open

from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.formulas.tensor_parallel import tp_shards


def parts(config, t, rank):
    """{name: box} of one rank, as slices."""
    return {name: shard.slices_within() for name, shard in tp_shards(config, t, rank).items()}


def assert_parts_make_the_whole(weights, model, t):
    """The parts of t ranks, put together, are the parameters of `model`."""
    want = dict(model.named_parameters())
    got = {name: torch.full_like(p, torch.nan, requires_grad=False) for name, p in want.items()}
    cut = 0
    for rank in range(t):
        for name, box in parts(weights.config, t, rank).items():
            part = weights.read_parameter(name, box)
            assert part.shape == got[name][box].shape
            got[name][box] = part.to(got[name].dtype)
            cut += part.shape != want[name].shape
    assert cut >= t * (6 * weights.config.layers + 1)            # q k v o up down and the embedding, at least
    assert all(torch.equal(got[name], p) for name, p in want.items())


def assert_a_rank_reads_its_part(weights, counts):
    """`counts` are the elements each access to the file gave."""
    config, counts[:] = weights.config, []
    for name, box in parts(config, 2, 0).items():
        weights.read_parameter(name, box)
    held = sum(prod(shard.size) for shard in tp_shards(config, 2, 0).values())
    assert sum(counts) == held < 0.6 * parameter_count(config)


def counting(counts):
    """A stand-in for `safe_open` that appends to `counts` the elements each slice gave."""
    class Slice:
        def __init__(self, whole):
            self.whole, self.get_shape, self.get_dtype = whole, whole.get_shape, whole.get_dtype

        def __getitem__(self, box):
            counts.append(self.whole[box].numel())
            return self.whole[box]

    class File:
        def __init__(self, *args, **options):
            self.file = safe_open(*args, **options)
            self.keys = self.file.keys

        def get_slice(self, name):
            return Slice(self.file.get_slice(name))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    return File

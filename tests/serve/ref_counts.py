"""Do a block pool's reference counts agree with the block tables of all sequences?"""
from collections.abc import Iterable, Sequence

from nanoinfra.serve.engine.block_pool import BlockPool


def check_ref_counts(pool: BlockPool, block_tables: Iterable[Sequence[int]]) -> None:
    """Raise AssertionError unless `pool` agrees with the block tables of all sequences there are."""
    held = [block for table in block_tables for block in table]
    for block, holders in enumerate(pool.ref_counts):
        assert holders == held.count(block), f"block {block}: {holders} holders, {held.count(block)} hold"
        assert (holders == 0) == (block in pool.free_blocks), f"block {block} is free and held, or neither"
    assert {block: key for key, block in pool.hash_to_block.items()} == pool.block_to_hash

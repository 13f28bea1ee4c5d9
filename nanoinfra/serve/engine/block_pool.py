"""The block pool of a paged KV cache: reference counts, free blocks and prefix caching. No torch.

A block holds the keys and values of `block_size` tokens in every layer, so a sequence wastes at most
block_size - 1 places. A full block is known by its block hash, a hash of all tokens up to the block's end:
sequences that begin with the same tokens share it. A block with ref_count 0 stays cached until it is needed;
the least recently used is evicted first, a sequence's last block before its first. PagedAttention: Kwon et
al. 2023; the hash chain is vLLM's.
"""
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import pairwise


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, numbered from 0; at first all are free and uncached.

    `ref_counts[block]` is the number of block tables that hold a block. `hash_to_block` is the prefix cache.
    Raises ValueError for a pool without blocks or for blocks without room.
    """

    def __init__(self, num_blocks: int, block_size: int):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens hold nothing; "
                             "give at least 1 of each")
        self.block_size, self.ref_counts = block_size, [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))       # the first is allocated next
        self.block_to_hash: dict[int, bytes] = {}
        self.hash_to_block: dict[bytes, int] = {}                        # the other way round

    def allocate(self) -> int:
        """Take a free block, evict what it had cached, set its ref_count to 1. IndexError if none is free."""
        if not self.free_blocks:
            raise IndexError("no block is free")
        block, _ = self.free_blocks.popitem(last=False)
        self.evict_cached_blocks([block])
        self.ref_counts[block] = 1
        return block

    def incref(self, block: int) -> None:
        """Add 1 to the ref_count of a block that is in use, or free and still cached."""
        self.free_blocks.pop(block, None)
        self.ref_counts[block] += 1

    def free(self, block_table: Sequence[int]) -> None:
        """Take 1 off the ref_count of each block of a sequence, the sequence's last block first."""
        for block in reversed(block_table):
            if self.ref_counts[block] < 1:
                raise ValueError(f"block {block} is given back and nobody holds it")
            self.ref_counts[block] -= 1
            if not self.ref_counts[block]:
                self.free_blocks[block] = None
                if block not in self.block_to_hash:
                    self.free_blocks.move_to_end(block, last=False)      # it holds nothing that is cached

    def cache_full_block(self, block: int, block_hash: bytes) -> None:
        """Put a full block into the prefix cache. A hash keeps the block that was cached first."""
        if block_hash not in self.hash_to_block and block not in self.block_to_hash:
            self.hash_to_block[block_hash] = block
            self.block_to_hash[block] = block_hash

    def find_longest_cache_hit(self, block_hashes: Iterable[bytes]) -> list[int]:
        """The cached blocks of `block_hashes`, up to the first hash that is not cached."""
        found = []
        for block_hash in block_hashes:
            if block_hash not in self.hash_to_block:
                break
            found.append(self.hash_to_block[block_hash])
        return found

    def evict_cached_blocks(self, blocks: Iterable[int]) -> None:
        """Take these blocks out of the prefix cache. Sequences that hold them keep them."""
        for block in blocks:
            self.hash_to_block.pop(self.block_to_hash.pop(block, b""), None)

    def reset_prefix_cache(self) -> None:
        """Take all blocks out of the prefix cache, for instance after a change of weights."""
        self.hash_to_block.clear()
        self.block_to_hash.clear()

    @property
    def num_used_blocks(self) -> int:
        """The number of blocks with a ref_count of 1 or more."""
        return len(self.ref_counts) - len(self.free_blocks)


def root_block_hash(adapter: str = "", weights_version: int = 0, cache_salt: str = "") -> bytes:
    """The hash before a sequence's first block. Sequences share blocks only where all three are equal."""
    return blake2b(repr((adapter, weights_version, cache_salt)).encode(), digest_size=16).digest()


def extend_block_hashes(block_hashes: list[bytes], tokens: Sequence[int], block_size: int) -> None:
    """Append the hash of every full block of `tokens` that `block_hashes` (which begins with a root) lacks.

    A block's hash is a hash of the hash before it and of the block's own tokens.
    """
    ends = range(block_size * (len(block_hashes) - 1), len(tokens) + 1, block_size)
    for begin, end in pairwise(ends):
        text = ",".join(map(str, tokens[begin:end])).encode()
        block_hashes.append(blake2b(block_hashes[-1] + text, digest_size=16).digest())

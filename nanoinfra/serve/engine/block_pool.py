"""Blocks of KV memory: who holds them, which are free, which are remembered for what they hold. No torch.

A block has room for the keys and values of `size` tokens in every layer, so a sequence wastes at most
size - 1 tokens. A full block is known by its key, a hash over all tokens up to its end: whoever comes with
the same beginning shares it. Blocks nobody holds stay known until they are needed: the longest unused goes
first, a sequence's last before its first. PagedAttention: Kwon et al. 2023; the hash chain is vLLM's.
"""
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import pairwise


class Blocks:
    """`n` blocks of `size` tokens each, numbered from 0; all free and unknown at first.

    Raises ValueError for a pool without blocks or for blocks without room.
    """

    def __init__(self, n: int, size: int):
        if n < 1 or size < 1:
            raise ValueError(f"{n} blocks of {size} tokens hold nothing; give at least 1 of each")
        self.size, self.holders = size, [0] * n
        self.free = OrderedDict.fromkeys(range(n))                       # the first is taken next
        self.key_of: dict[int, bytes] = {}
        self.known: dict[bytes, int] = {}                                # the other way round

    def take(self) -> int:
        """A block for one holder, its contents forgotten. Raises IndexError where none is free."""
        if not self.free:
            raise IndexError("no block is free")
        block, _ = self.free.popitem(last=False)
        self.evict([block])
        self.holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a block that is held, or still known."""
        self.free.pop(block, None)
        self.holders[block] += 1

    def give_back(self, table: Sequence[int]) -> None:
        """One holder less of each block of a sequence. Its last become free first."""
        for block in reversed(table):
            if self.holders[block] < 1:
                raise ValueError(f"block {block} is given back and nobody holds it")
            self.holders[block] -= 1
            if not self.holders[block]:
                self.free[block] = None
                if block not in self.key_of:
                    self.free.move_to_end(block, last=False)             # nothing is lost with it

    def learn(self, block: int, key: bytes) -> None:
        """The block is full and holds the tokens that `key` stands for. One block a key: the first stays."""
        if key not in self.known and block not in self.key_of:
            self.known[key], self.key_of[block] = block, key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks known by `keys`, up to the first that is not."""
        found = []
        for key in keys:
            if key not in self.known:
                break
            found.append(self.known[key])
        return found

    def evict(self, table: Iterable[int]) -> None:
        """Know no more what these blocks hold. Who holds them keeps them."""
        for block in table:
            self.known.pop(self.key_of.pop(block, b""), None)

    def forget(self) -> None:
        """Know no contents any more, as after a change of weights."""
        self.known.clear()
        self.key_of.clear()

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return len(self.holders) - len(self.free)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the books agree with `tables`, those of all sequences there are."""
        held = [block for table in tables for block in table]
        for block, holders in enumerate(self.holders):
            assert holders == held.count(block), f"block {block}: {holders} holders, {held.count(block)} hold"
            assert (holders == 0) == (block in self.free), f"block {block} is free and held, or neither"
        assert {block: key for key, block in self.known.items()} == self.key_of


def root(adapter: str = "", version: int = 0, salt: str = "") -> bytes:
    """What a chain of keys begins with. Only where all three agree may keys and values be shared."""
    return blake2b(repr((adapter, version, salt)).encode(), digest_size=16).digest()


def chain(keys: list[bytes], tokens: Sequence[int], size: int) -> None:
    """Extend `keys`, which begins with a root, by the key of every full block of `tokens` it lacks."""
    ends = range(size * (len(keys) - 1), len(tokens) + 1, size)
    for begin, end in pairwise(ends):
        text = ",".join(map(str, tokens[begin:end])).encode()
        keys.append(blake2b(keys[-1] + text, digest_size=16).digest())

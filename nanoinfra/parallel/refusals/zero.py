"""What ZeRO (parallel/zero.py) is not combined with. No torch is imported here."""
from collections.abc import Iterator
from types import SimpleNamespace


def refusals(flags: SimpleNamespace) -> Iterator[str]:
    """Yield why --zero does not work with the rest of `flags`, the flags of `nanoinfra train` by name."""
    if flags.pp > 1 and flags.zero > 1:
        yield (f"--zero {flags.zero} sends gradients or weights with every micro-batch, and a pipeline "
               f"needs many of them: that is not built for --pp {flags.pp}; use --zero 1, which cuts the "
               "optimizer's state")

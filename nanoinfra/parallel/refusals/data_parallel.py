"""What plain data parallelism (parallel/data_parallel.py) is not combined with. No torch is imported here."""
from collections.abc import Iterator
from types import SimpleNamespace


def refusals(flags: SimpleNamespace) -> Iterator[str]:
    """Yield why --grad-sync has no meaning in `flags`, the flags of `nanoinfra train` by name."""
    if flags.zero and flags.grad_sync != "overlap":
        yield (f"--grad-sync {flags.grad_sync} is plain data parallelism's, and "
               f"--zero {flags.zero} sends buckets as they fill; leave one of them out")

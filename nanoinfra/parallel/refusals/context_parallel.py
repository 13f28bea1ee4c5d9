"""Context parallelism (--cp) is not built yet. No torch is imported here."""
from collections.abc import Iterator
from types import SimpleNamespace


def refusals(flags: SimpleNamespace) -> Iterator[str]:
    """Yield why there is no context-parallel run of `flags`, the flags of `nanoinfra train` by name."""
    if flags.cp != 1:
        yield (f"--cp {flags.cp}: context parallelism is not built yet; use --cp 1, "
               f"--dp {flags.world_size}")

"""What sequence parallelism (parallel/sequence_parallel.py) needs besides it. No torch is imported here."""
from collections.abc import Iterator
from types import SimpleNamespace


def refusals(flags: SimpleNamespace) -> Iterator[str]:
    """Yield why --sp does not work with the rest of `flags`, the flags of `nanoinfra train` by name."""
    if flags.sp_save_gathered and not flags.sp:
        yield "--sp-save-gathered keeps what sequence parallelism gathers; give --sp too"
    if flags.sp and flags.tp == 1:
        yield ("--sp cuts the stream over the ranks of --tp, and --tp is 1; give --tp 2, or leave "
               "--sp out")

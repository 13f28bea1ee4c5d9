"""Which data evaluation on held-out text does not work with. No torch is imported here."""
from collections.abc import Iterator
from types import SimpleNamespace


def refusals(flags: SimpleNamespace) -> Iterator[str]:
    """Yield why --eval-every has nothing to score in `flags`, the flags of `nanoinfra train` by name."""
    if flags.eval_every and flags.data == "random":
        yield (f"--eval-every {flags.eval_every} scores text that is held out, and --data random "
               "has none; leave it out, or give --data stdlib, a text file or a folder")

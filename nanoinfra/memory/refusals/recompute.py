"""What recompute (memory/recompute.py) is not combined with. No torch is imported here."""
from collections.abc import Iterator
from types import SimpleNamespace


def refusals(flags: SimpleNamespace) -> Iterator[str]:
    """Yield why --recompute does not work with the rest of `flags`, those of `nanoinfra train` by name."""
    if flags.recompute == "selective" and flags.attention != "naive":
        yield (f"--recompute selective runs naive attention's scores again, and --attention "
               f"{flags.attention} keeps none; use --attention naive, or --recompute full")
    if flags.recompute == "full" and flags.schedule == "zb-h1":
        yield ("--recompute full runs a block again in backward, and --schedule zb-h1 has two of "
               "those; use --recompute none, or --schedule 1f1b")

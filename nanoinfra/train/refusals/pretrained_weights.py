"""What a run that starts from weights is not combined with. No torch is imported here."""
from collections.abc import Iterator
from types import SimpleNamespace

from nanoinfra.config import MODEL_SIZES


def refusals(flags: SimpleNamespace) -> Iterator[str]:
    """Yield why weights cannot be shaped as `flags`, the flags of `nanoinfra train` by name, ask for."""
    if flags.model not in MODEL_SIZES and (flags.vocab or flags.untied):
        yield (f"--vocab and --untied shape a model that is drawn; {flags.model} has its shape "
               "already: leave them out")

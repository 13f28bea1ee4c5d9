"""Which models tensor parallelism (parallel/tensor_parallel_decoder.py) cannot split. No torch here."""
from collections.abc import Iterator
from types import SimpleNamespace

from nanoinfra.formulas.tensor_parallel import check_tp_fits_model


def refusals(flags: SimpleNamespace) -> Iterator[str]:
    """Yield why --tp ranks cannot split the model of `flags`, the flags of `nanoinfra train` by name."""
    if flags.model_config:
        try:
            check_tp_fits_model(flags.model_config, flags.tp)
        except ValueError as error:
            yield str(error)

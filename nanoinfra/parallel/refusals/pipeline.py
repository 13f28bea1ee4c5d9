"""Which pipelines (parallel/pipeline/) are not possible. No torch is imported here."""
from collections.abc import Iterator
from types import SimpleNamespace

from nanoinfra.formulas.pipeline import split_layers_into_chunks
from nanoinfra.parallel.pipeline.schedules import check_schedule_config


def refusals(flags: SimpleNamespace) -> Iterator[str]:
    """Yield why there is no pipeline as `flags`, the flags of `nanoinfra train` by name, ask for."""
    try:
        check_schedule_config(flags.schedule, flags.pp, flags.num_micro_batches, flags.virtual_stages)
        if config := flags.model_config:
            split_layers_into_chunks(config, flags.pp * flags.virtual_stages, config.context)
    except ValueError as error:
        yield str(error)

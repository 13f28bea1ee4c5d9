"""What the optimizers (train/optimizer.py) and the learning-rate schedule do not take. No torch here."""
from collections.abc import Iterator
from types import SimpleNamespace


def refusals(flags: SimpleNamespace) -> Iterator[str]:
    """Yield why --optimizer does not take its settings in `flags`, the flags of `nanoinfra train` by name."""
    given = [name for name, value in (("--betas", flags.betas), ("--weight-decay", flags.weight_decay))
             if value is not None]
    if flags.optimizer == "sgd" and given:
        yield (f"{' and '.join(given)}: of AdamW's step, and --optimizer sgd is plain; leave it "
               "out, or use --optimizer adamw")
    if flags.betas and not all(0 <= beta < 1 for beta in flags.betas):
        yield (f"--betas {flags.betas[0]} {flags.betas[1]}: each is at least 0 and below 1; "
               "try --betas 0.9 0.95")
    if flags.min_lr is not None and flags.lr_schedule == "constant":
        yield ("--min-lr is where a cosine ends, and --lr-schedule constant does not fall; leave "
               "one of them out")
    if flags.min_lr is not None and flags.min_lr > flags.lr:
        yield f"--min-lr {flags.min_lr} is above the peak, --lr {flags.lr}; give at most that"

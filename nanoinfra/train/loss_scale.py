"""Dynamic loss scaling: keep float16 gradients above 2^-24, below which they are zero, and below 65504.

The loss is multiplied by a power of two before backward, the gradients are divided by it afterwards, before
clipping, so that only rounding changes. One that is not finite anywhere skips the step on every rank and
halves the scale; `grow_after` good steps in a row double it.  Micikevicius et al. 2018, section 3.2.
"""
LARGEST = 2.0**24


class LossScale:
    """`value` multiplies the loss; call `update` once a step, with the same answer on every rank."""

    def __init__(self, value: float = 2.0**16, grow_after: int = 2000):
        if not 1 <= value <= LARGEST or grow_after < 1:
            raise ValueError(f"a loss scale of {value:g} that grows after {grow_after} steps: it is 1 to "
                             f"{LARGEST:g}, and grows after at least 1; try 65536 and 2000")
        self.value, self.grow_after, self.good = float(value), grow_after, 0

    def update(self, overflow: bool) -> None:
        """Halve after a step that overflowed, double after `grow_after` in a row that did not.

        ValueError where nothing is left to halve: then the gradients themselves are not finite.
        """
        if overflow:
            if self.value / 2 < 1:
                raise ValueError(f"gradients are not finite at a loss scale of {self.value:g}, and it must "
                                 f"not fall below 1: the model itself overflows; try --dtype bfloat16, or a "
                                 f"smaller --lr")
            self.value, self.good = self.value / 2, 0
            return
        self.good += 1
        if self.good == self.grow_after:
            self.value, self.good = min(2 * self.value, LARGEST), 0

    def state(self) -> dict:
        """What a checkpoint keeps; JSON can hold it."""
        return {"value": self.value, "good": self.good}

    def load(self, state: dict) -> None:
        """Go on from `state()`."""
        self.value, self.good = float(state["value"]), int(state["good"])

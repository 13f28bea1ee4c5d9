"""Dynamic loss scaling for float16: gradients stay above 2^-24, below which they are zero, and below 65504.

The loss is multiplied by a power of two before backward and the gradients are divided by it before clipping,
so that only rounding changes. When a gradient is not finite on any rank, every rank skips the step and halves
the scale; `growth_interval` good steps in a row double it.  Micikevicius et al. 2018, section 3.2.
"""
_MAX_LOSS_SCALE = 2.0**24


class LossScale:
    """The loss scale: `value` multiplies the loss. Every rank calls `update` once a step, with one answer."""

    def __init__(self, value: float = 2.0**16, growth_interval: int = 2000):
        if not 1 <= value <= _MAX_LOSS_SCALE or growth_interval < 1:
            raise ValueError(f"a loss scale of {value:g} that grows after {growth_interval} steps: it is 1 "
                             f"to {_MAX_LOSS_SCALE:g}, and grows after at least 1; try 65536 and 2000")
        self.value = float(value)
        self.growth_interval = growth_interval
        self.good_steps = 0                  # in a row

    def update(self, overflow: bool) -> None:
        """Halve the scale after a step that overflowed; double it after `growth_interval` steps that did not.

        Raises ValueError when the scale would fall below 1: then the gradients themselves are not finite.
        """
        if overflow:
            if self.value / 2 < 1:
                raise ValueError(f"gradients are not finite at a loss scale of {self.value:g}, and it must "
                                 f"not fall below 1: the model itself overflows; try --dtype bfloat16, or a "
                                 f"smaller --lr")
            self.value, self.good_steps = self.value / 2, 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value, self.good_steps = min(2 * self.value, _MAX_LOSS_SCALE), 0

    def state_dict(self) -> dict:
        """The scale and its count of good steps, for a checkpoint's state.json."""
        return {"value": self.value, "good": self.good_steps}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict()` returned."""
        self.value, self.good_steps = float(state["value"]), int(state["good"])

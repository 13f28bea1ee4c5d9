"""Each kind of decoder once: families that are made of the same parts are one kind."""
from nanoinfra.formulas.shape import FAMILIES

KINDS = tuple({parts: name for name, parts in reversed(FAMILIES.items())}.values())[::-1]

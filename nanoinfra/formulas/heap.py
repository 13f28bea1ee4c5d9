"""What glibc's heap has beside the tensors in it, modelled: on a CPU the rest of what the system counts.

A block of 32 MiB or more is mapped by itself and given back when freed. A smaller one comes from the heap,
which gives nothing back from its middle: what it held at its most stays beside blocks that are mapped at
another moment, say logits, which are gone before a layer runs again. And an aligned block does not fit where
one of the same size was (glibc bug 14581, up to 2.37): a share of the heap is holes, measured with 2.36.
"""
from nanoinfra.formulas.footprint import Layout, Recipe, logits_bytes, moments
from nanoinfra.formulas.shape import ModelConfig
from nanoinfra.formulas.tensor import part

MAPPED = 32 << 20                            # DEFAULT_MMAP_THRESHOLD_MAX
HOLES = {2: 0.7, 4: 0.25, 8: 0.25}           # of what a step makes, by bytes of a number
MADE = ("activations", "work", "buffers")    # by a step, and gone after it


def heap_rest(config: ModelConfig, layout: Layout, recipe: Recipe, stage: int = 0) -> int:
    """Bytes that stay in the heap, and its holes, beside those of `footprint`."""
    mine, column = part(config, layout.tp), recipe.micro_batch * recipe.seq * recipe.itemsize
    if column * mine.hidden >= MAPPED:
        return 0
    found = moments(config, layout, recipe, stage)
    made = {name: sum(parts.get(kind, 0) for kind in MADE) for name, parts in found.items()}
    logits = logits_bytes(config, layout, recipe) if stage == layout.pp - 1 else 0
    mapped = logits if column * mine.vocab >= MAPPED else 0
    heap = max(made["loss"] - mapped, made["layer"])
    held = sum(found["loss"].values()) - made["loss"] + heap + mapped
    worst = max(sum(parts.values()) for parts in found.values())
    return max(0, held - worst) + int(HOLES[recipe.itemsize] * heap)

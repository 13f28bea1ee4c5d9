"""Whether a mesh fits the number of ranks. Checked before any rank starts, so this file needs no torch."""


def check_mesh_size(world_size: int, pp: int, dp: int, cp: int, tp: int) -> None:
    """Raise ValueError, with a mesh that would fit, unless pp x dp x cp x tp is `world_size`."""
    if min(pp, dp, cp, tp) < 1:
        raise ValueError(f"every axis needs at least 1 rank, got pp={pp} dp={dp} cp={cp} tp={tp}; "
                         f"leave unused axes at 1")
    if pp * dp * cp * tp != world_size:
        rest = pp * cp * tp
        fits = world_size % rest == 0
        hint = f"--dp {world_size // rest}" if fits else f"{rest * max(1, world_size // rest)} ranks"
        raise ValueError(f"pp={pp} x dp={dp} x cp={cp} x tp={tp} = {pp * dp * cp * tp} does not fit "
                         f"{world_size} ranks; try {hint}")

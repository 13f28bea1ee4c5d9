"""Does a mesh fit the ranks? Asked before any rank starts, so this file needs no torch."""


def check_fits(world: int, pp: int, dp: int, cp: int, tp: int) -> None:
    """Raise ValueError, with a mesh that would fit, unless pp x dp x cp x tp is `world`."""
    if min(pp, dp, cp, tp) < 1:
        raise ValueError(f"every axis needs at least 1 rank, got pp={pp} dp={dp} cp={cp} tp={tp}; "
                         f"leave unused axes at 1")
    if pp * dp * cp * tp != world:
        rest = pp * cp * tp
        hint = f"--dp {world // rest}" if world % rest == 0 else f"{rest * max(1, world // rest)} ranks"
        raise ValueError(f"pp={pp} x dp={dp} x cp={cp} x tp={tp} = {pp * dp * cp * tp} does not fit "
                         f"{world} ranks; try {hint}")

"""Assert that two tensors are equal; if they are not, say where, by how much and what the usual cause is.

    rank 1: `embed.weight` differs at [3, 0]: want 0.5, got 1, 2 x (96 of 96): summed instead of averaged?
"""
import math

import torch

from nanoinfra.lab.check import CriterionNotMet


def assert_same_tensor(name: str, got, want: torch.Tensor, rank: int, axis_size: int = 1, rtol: float = 0.0,
                       likely_causes: dict[str, torch.Tensor] | None = None) -> None:
    """Raise CriterionNotMet unless `got` equals `want` to `rtol` of want's largest number (0: exactly).

    The text names `rank` and tensor, the first index that differs, and a usual cause: summed instead of
    averaged over `axis_size` ranks, for example. `likely_causes` adds {text: the tensor that this mistake
    gives}.
    """
    where = f"rank {rank}: `{name}`"
    if not isinstance(got, torch.Tensor):
        raise CriterionNotMet(f"{where} is {type(got).__name__}, want a tensor {tuple(want.shape)}: no "
                              "return?")
    if got.shape != want.shape:
        raise CriterionNotMet(f"{where} has shape {tuple(got.shape)}, want {tuple(want.shape)}")
    if got.dtype != want.dtype:
        raise CriterionNotMet(f"{where} is {got.dtype}, want {want.dtype}: cast on the way?")
    off = ~((got - want).abs() <= rtol * want.abs().max())
    if off.any():
        index = tuple(off.nonzero()[0].tolist())
        g, w = got[index].item(), want[index].item()
        digits = 6 if f"{g:.6g}" != f"{w:.6g}" else 17
        ratio = f", {g / w:.4g} x" if w and digits == 6 and _telling(g / w) else ""
        why = _cause(got, want, axis_size, rtol, likely_causes or {})
        raise CriterionNotMet(f"{where} differs at {list(index)}: want {w:.{digits}g}, got "
                              f"{g:.{digits}g}{ratio} ({int(off.sum())} of "
                              f"{off.numel()}){': ' + why if why else ''}")


def _telling(ratio):
    """A small whole number, or one over one: more than chance."""
    return any(math.isfinite(q) and abs(q) <= 64 and abs(q - round(q)) < 1e-6
               for q in (ratio, 1 / ratio if ratio else 0.0))


def _cause(got, want, n, rtol, causes):
    shared = {"summed instead of averaged?": want * n, "averaged instead of summed?": want / n}
    usual = {**causes, **(shared if n > 1 else {}), "the sign?": -want,
             "still zero: never filled, or another tensor in its place?": torch.zeros_like(want)}
    close = max(rtol, 1e-6) * want.abs().max()
    if got.isnan().any():
        return "not a number: memory read before it was written?"
    matches = [text for text, wrong in usual.items() if ((got - wrong).abs() <= close).all()]
    if matches:
        return matches[0]
    near = ((got - want).abs() <= 1e-2 * want.abs().max()).all()
    return "rounding: summed in a narrower dtype?" if near else ""

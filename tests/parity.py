"""Parity as the design measures it: per tensor, against the size of the tensor or of the whole gradient."""
import torch


def assert_same_gradients(got: dict, want: dict, tol: float = 1e-10, where: str = "") -> None:
    """||got - want|| <= tol max(||want||, 1e-6 ||all gradients||), by tensor: a key bias has none at all."""
    assert got.keys() == want.keys(), where
    whole = torch.stack([w.norm() for w in want.values()]).norm()
    for name, w in want.items():
        error, scale = (got[name] - w).norm(), max(w.norm(), 1e-6 * whole)
        assert error <= tol * scale, f"{where} {name}: {error / scale:.2e} of its size apart"

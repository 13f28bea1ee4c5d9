"""AdamW and SGD over float32 masters, the learning rate's path, and clipping by the global norm.

Mixed precision (Micikevicius et al. 2018): the model computes in bf16; the optimizer owns float32 masters,
12 bytes a parameter with AdamW's two moments, and copies them into the model after each step. A float32 or
float64 model is its own master. The update is torch's fused kernel; AdamW: Loshchilov & Hutter 2019.
"""
import math
from collections.abc import Callable, Iterable

import torch

from nanoinfra.distributed import comm

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.1        # GPT-3's (Brown et al. 2020, appendix B)


class Optimizer:
    """`name` is "adamw" or "sgd" (plain). Matrices decay by `weight_decay` under AdamW, vectors do not.

    It moves a model's trainable parameters, or a rank's shards, {name: tensor}. `masters` may be given,
    {name: float32 tensor}, where the weights were drawn in more bits than the model keeps; it moves these.
    """

    def __init__(self, model: torch.nn.Module | dict[str, torch.Tensor], name: str = "adamw",
                 masters: dict[str, torch.Tensor] | None = None, betas: tuple[float, float] = BETAS,
                 weight_decay: float = WEIGHT_DECAY):
        named = model.items() if isinstance(model, dict) else model.named_parameters()
        self.params = {n: p for n, p in named if isinstance(model, dict) or p.requires_grad}
        self.masters = {n: _master(p, (masters or {}).get(n)) for n, p in self.params.items()}
        vectors = [m for m in self.masters.values() if m.dim() < 2]
        matrices = [m for m in self.masters.values() if m.dim() >= 2]
        if name == "adamw":
            groups = [{"params": g, "weight_decay": d}
                      for g, d in ((matrices, weight_decay), (vectors, 0.0)) if g]
            self.torch = torch.optim.AdamW(groups, betas=betas, eps=EPS, fused=True)
        elif name == "sgd":
            self.torch = torch.optim.SGD(list(self.masters.values()), fused=True)
        else:
            raise ValueError(f"no optimizer named {name!r}; there are adamw and sgd")
        self.name, self.steps = name, 0

    def step(self, grads: dict[str, torch.Tensor], lr: float) -> None:
        """Move the masters against `grads`, then the model's weights to the masters."""
        for group in self.torch.param_groups:
            group["lr"] = lr
        for n, master in self.masters.items():
            master.grad = grads[n].to(master.dtype)
        self.torch.step()
        self.steps += 1
        for master in self.masters.values():
            master.grad = None
        self._publish()

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: masters under the parameters' names, moments as `exp_avg/NAME`."""
        moments = {} if self.name == "sgd" else {
            f"{key}/{n}": self._moments(m)[key]
            for n, m in self.masters.items() for key in ("exp_avg", "exp_avg_sq")}
        return {**{n: m.detach() for n, m in self.masters.items()}, **moments}

    def load(self, tensors: dict[str, torch.Tensor], steps: int) -> None:
        """Take the tensors of `state()` back, after `steps` steps, and publish the weights.

        Of a shard the first rows may be given: those after them are no parameter's.
        """
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.state()[name].view(-1)[:tensor.numel()].copy_(tensor.view(-1))
        for m in self.masters.values() if self.name == "adamw" else ():
            self._moments(m)["step"].fill_(float(steps))
        self.steps = steps
        self._publish()

    def _moments(self, master):
        state = self.torch.state[master]
        if not state:
            state.update(step=torch.zeros((), dtype=torch.float32, device=master.device),
                         exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
        return state

    def _publish(self):
        pairs = [(p, self.masters[n]) for n, p in self.params.items() if p is not self.masters[n]]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])


def _master(p, given):
    if p.dtype in (torch.float32, torch.float64):
        return p
    return p.detach().to(torch.float32) if given is None else given


def clip(grads: dict[str, torch.Tensor], limit: float, scale: float = 1.0, axes: Iterable = (),
         counts: Callable[[str], bool] = lambda name: True) -> float:
    """Divide `grads` by `scale`, and on to a global 2-norm of at most `limit` (0: no limit).

    In place; 16-bit ones, which would lose what the scale has saved, become float32 first. Returns the norm
    after the division by `scale`. Over `axes` ranks hold different parts; what several of them hold alike is
    the norm's on the one where it `counts`.
    """
    wide = torch.promote_types(next(iter(grads.values())).dtype, torch.float32)
    if scale != 1.0:
        grads.update({name: grad.to(wide) for name, grad in grads.items()})
    tensors, counted = list(grads.values()), [grad for name, grad in grads.items() if counts(name)]
    norms = torch._foreach_norm(counted or [tensors[0].new_zeros(1)], 2, dtype=wide)
    norm = torch.linalg.vector_norm(torch.stack(norms)).double()
    for axis in axes:
        norm = comm.all_reduce(norm.square(), axis, "scalars").sqrt()
    norm = norm.item() / scale
    factor = (limit / norm if limit and norm > limit else 1.0) / scale
    if factor != 1.0:
        torch._foreach_mul_(tensors, factor)
    return norm


def learning_rate(step: int, progress: float, warmup: int, peak: float, schedule: str = "cosine",
                  lowest: float | None = None) -> float:
    """The rate of `step` (from 1) at `progress` (0 to 1) of the run.

    Linear up over `warmup` steps, times a cosine's path from `peak` to `lowest` (default: a tenth of it), or
    times `peak` ("constant").
    """
    rise = min(1.0, step / warmup) if warmup else 1.0
    if schedule == "constant":
        return peak * rise
    lowest = peak / 10 if lowest is None else lowest
    return rise * (lowest + (peak - lowest) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)

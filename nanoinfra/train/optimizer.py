"""AdamW and SGD over float32 master weights, the learning-rate schedule, and gradient clipping.

Mixed precision (Micikevicius et al. 2018): the model computes in bf16; the optimizer owns float32 master
weights, 12 bytes a parameter with AdamW's two moments, and copies them into the model after each step. The
weights of a float32 or float64 model are their own master weights. The update is torch's fused kernel;
AdamW: Loshchilov & Hutter 2019.
"""
import math
from collections.abc import Callable, Iterable

import torch

from nanoinfra.distributed import comm

ADAMW_BETAS = (0.9, 0.95)                    # these three are GPT-3's (Brown et al. 2020, appendix B)
ADAMW_EPS = 1e-8
ADAMW_WEIGHT_DECAY = 0.1


class MixedPrecisionOptimizer:
    """AdamW ("adamw") or plain SGD ("sgd") for a model's trainable parameters or a rank's {name: shard}.

    Under AdamW matrices have `weight_decay`, vectors have none. `master_weights`, {name: float32 tensor}, may
    be given when the weights were drawn in more bits than the model keeps; else they are made here.
    """

    def __init__(self, model: torch.nn.Module | dict[str, torch.Tensor], name: str = "adamw",
                 master_weights: dict[str, torch.Tensor] | None = None,
                 betas: tuple[float, float] = ADAMW_BETAS, weight_decay: float = ADAMW_WEIGHT_DECAY):
        named = model.items() if isinstance(model, dict) else model.named_parameters()
        self.params = {n: p for n, p in named if isinstance(model, dict) or p.requires_grad}
        self.master_weights = {n: _master(p, (master_weights or {}).get(n)) for n, p in self.params.items()}
        vectors = [m for m in self.master_weights.values() if m.dim() < 2]
        matrices = [m for m in self.master_weights.values() if m.dim() >= 2]
        if name == "adamw":
            groups = [{"params": g, "weight_decay": d}
                      for g, d in ((matrices, weight_decay), (vectors, 0.0)) if g]
            self.torch_optimizer = torch.optim.AdamW(groups, betas=betas, eps=ADAMW_EPS, fused=True)
        elif name == "sgd":
            self.torch_optimizer = torch.optim.SGD(list(self.master_weights.values()), fused=True)
        else:
            raise ValueError(f"no optimizer named {name!r}; there are adamw and sgd")
        self.name = name
        self.num_steps = 0

    def step(self, grads: dict[str, torch.Tensor], lr: float) -> None:
        """Update the master weights with `grads` {name: tensor}, then copy them into the model."""
        for group in self.torch_optimizer.param_groups:
            group["lr"] = lr
        for n, master in self.master_weights.items():
            master.grad = grads[n].to(master.dtype)
        self.torch_optimizer.step()
        self.num_steps += 1
        for master in self.master_weights.values():
            master.grad = None
        self._copy_masters_to_model()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return master weights by parameter name, and moments as `exp_avg/NAME` and `exp_avg_sq/NAME`."""
        moments = {} if self.name == "sgd" else {
            f"{key}/{n}": self._moments(m)[key]
            for n, m in self.master_weights.items() for key in ("exp_avg", "exp_avg_sq")}
        return {**{n: m.detach() for n, m in self.master_weights.items()}, **moments}

    def load_state_dict(self, tensors: dict[str, torch.Tensor], num_steps: int) -> None:
        """Restore the tensors of `state_dict()` after `num_steps` steps, and copy them into the model.

        A tensor may be shorter than a padded ZeRO shard: the padding after it stays as it is.
        """
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.state_dict()[name].view(-1)[:tensor.numel()].copy_(tensor.view(-1))
        for m in self.master_weights.values() if self.name == "adamw" else ():
            self._moments(m)["step"].fill_(float(num_steps))
        self.num_steps = num_steps
        self._copy_masters_to_model()

    def _moments(self, master):
        state = self.torch_optimizer.state[master]
        if not state:
            state.update(step=torch.zeros((), dtype=torch.float32, device=master.device),
                         exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
        return state

    def _copy_masters_to_model(self):
        pairs = [(p, self.master_weights[n]) for n, p in self.params.items()
                 if p is not self.master_weights[n]]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])


def _master(p, given):
    if p.dtype in (torch.float32, torch.float64):
        return p
    return p.detach().to(torch.float32) if given is None else given


def unscale_and_clip_grads(grads: dict[str, torch.Tensor], max_norm: float, loss_scale: float = 1.0,
                           axes: Iterable = (),
                           counted_in_norm: Callable[[str], bool] = lambda name: True) -> float:
    """Divide `grads` by `loss_scale`, then clip them to a global 2-norm of at most `max_norm` (0: no limit).

    Works in place; 16-bit gradients become float32 before they are unscaled, as they could underflow. Returns
    the norm before clipping. Ranks of `axes` hold different gradients; one that several ranks hold is counted
    only on the rank where `counted_in_norm(name)` is true.
    """
    wide = torch.promote_types(next(iter(grads.values())).dtype, torch.float32)
    if loss_scale != 1.0:
        grads.update({name: grad.to(wide) for name, grad in grads.items()})
    tensors = list(grads.values())
    counted = [grad for name, grad in grads.items() if counted_in_norm(name)]
    norms = torch._foreach_norm(counted or [tensors[0].new_zeros(1)], 2, dtype=wide)
    norm = torch.linalg.vector_norm(torch.stack(norms)).double()
    for axis in axes:
        norm = comm.all_reduce(norm.square(), axis, "scalars").sqrt()
    norm = norm.item() / loss_scale
    factor = (max_norm / norm if max_norm and norm > max_norm else 1.0) / loss_scale
    if factor != 1.0:
        torch._foreach_mul_(tensors, factor)
    return norm


def scheduled_learning_rate(step: int, progress: float, warmup_steps: int, peak_lr: float,
                            schedule: str = "cosine", min_lr: float | None = None) -> float:
    """The learning-rate schedule: the rate of `step` (from 1) at `progress` (0 to 1) of the run.

    Linear warm-up over `warmup_steps`, times cosine decay from `peak_lr` to `min_lr` (default: a tenth of
    the peak), or times the peak ("constant").
    """
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    if schedule == "constant":
        return peak_lr * warmup
    min_lr = peak_lr / 10 if min_lr is None else min_lr
    return warmup * (min_lr + (peak_lr - min_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)

"""AdamW and SGD over float32 master weights, the learning-rate schedule, and gradient clipping.

Mixed precision (Micikevicius et al. 2018): the model computes in bf16; the optimizer owns float32 master
weights, 12 bytes a parameter with AdamW's two moments, and copies them into the model after each step. The
weights of a float32 or float64 model are their own master weights. The update is torch's fused kernel;
AdamW: Loshchilov & Hutter 2019.
"""
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from nanoinfra.distributed import comm

ADAMW_BETAS = (0.9, 0.95)                    # these three are GPT-3's (Brown et al. 2020, appendix B)
ADAMW_EPS = 1e-8
ADAMW_WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class OptimizerGroup:
    """Parameters that are updated alike. None: as the MixedPrecisionOptimizer is told for all groups."""
    param_names: Collection[str]             # or patterns of them, as in "blocks.*.norm1.weight"
    optimizer: str | None = None             # adamw or sgd
    lr_scale: float = 1.0                    # times the learning rate of the step
    betas: tuple[float, float] | None = None             # AdamW's
    weight_decay: float | None = None                    # AdamW's

    def __post_init__(self):
        if isinstance(self.param_names, str):
            raise ValueError(f"param_names is a collection of names or patterns, not one; write "
                             f"({self.param_names!r},)")

    def contains(self, param_name: str) -> bool:
        """Whether the parameter is in this group."""
        return param_name in self.param_names or any(fnmatchcase(param_name, each)
                                                     for each in self.param_names)


class MixedPrecisionOptimizer:
    """AdamW ("adamw") or plain SGD ("sgd") for a model's trainable parameters or a rank's {name: shard}.

    Parameters are updated by `groups`, {name of the group: OptimizerGroup}, each by a torch optimizer of its
    own; a group may have no parameter on this rank. By default they are "matrices", which under AdamW have
    `weight_decay`, and "vectors", which have none. `master_weights`, {name: float32 tensor}, may be given
    when the weights were drawn in more bits than the model keeps; else they are made here. Raises ValueError
    for an unknown optimizer and unless every parameter is in one group.
    """

    def __init__(self, model: torch.nn.Module | dict[str, torch.Tensor], name: str = "adamw",
                 master_weights: dict[str, torch.Tensor] | None = None,
                 betas: tuple[float, float] = ADAMW_BETAS, weight_decay: float = ADAMW_WEIGHT_DECAY,
                 groups: dict[str, OptimizerGroup] | None = None):
        named = model.items() if isinstance(model, dict) else model.named_parameters()
        self.params = {n: p for n, p in named if isinstance(model, dict) or p.requires_grad}
        self.master_weights = {n: _master(p, (master_weights or {}).get(n)) for n, p in self.params.items()}
        groups = default_optimizer_groups(self.master_weights) if groups is None else groups
        self.param_names = assign_to_groups(self.params, groups)
        self.torch_optimizers = {
            key: _torch_optimizer([self.master_weights[n] for n in names], groups[key], name, betas,
                                  weight_decay)
            for key, names in self.param_names.items() if names}
        self._lr_scales = {key: group.lr_scale for key, group in groups.items()}
        self._group_steps = dict.fromkeys(groups, 0)

    @property
    def num_steps(self) -> int:
        """The steps made. Raises RuntimeError while only some of the groups have made the last one."""
        if len(counts := set(self._group_steps.values())) > 1:
            raise RuntimeError(f"a step is not finished: the groups have made {self._group_steps} steps; "
                               "call step_group for the others first")
        return counts.pop() if counts else 0

    def step(self, grads: dict[str, torch.Tensor], lr: float) -> None:
        """Update the master weights with `grads` {name: tensor}, then copy them into the model."""
        for group in self.param_names:
            self.step_group(group, grads, lr)

    def step_group(self, group: str, grads: dict[str, torch.Tensor], lr: float) -> None:
        """Do the part of `step` that is one group's; `grads` has its gradients at least.

        A step is made when this was called once for each group, in any order.
        """
        names = self.param_names[group]
        self._group_steps[group] += 1
        if not names:
            return
        [torch_group] = self.torch_optimizers[group].param_groups
        torch_group["lr"] = lr * self._lr_scales[group]
        for n in names:
            self.master_weights[n].grad = grads[n].to(self.master_weights[n].dtype)
        self.torch_optimizers[group].step()
        for n in names:
            self.master_weights[n].grad = None
        self._copy_masters_to_model(names)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return master weights by parameter name, and moments as `exp_avg/NAME` and `exp_avg_sq/NAME`.

        Parameters that SGD updates have no moments.
        """
        states = self._adamw_states()
        moments = {f"{key}/{n}": states[n][key] for n in self.master_weights if n in states
                   for key in ("exp_avg", "exp_avg_sq")}
        return {**{n: m.detach() for n, m in self.master_weights.items()}, **moments}

    def load_state_dict(self, tensors: dict[str, torch.Tensor], num_steps: int) -> None:
        """Restore the tensors of `state_dict()` after `num_steps` steps, and copy them into the model.

        A tensor may be shorter than a padded ZeRO shard: the padding after it stays as it is.
        """
        own = self.state_dict()
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].view(-1)[:tensor.numel()].copy_(tensor.view(-1))
        for state in self._adamw_states().values():
            state["step"].fill_(float(num_steps))
        self._group_steps = dict.fromkeys(self._group_steps, num_steps)
        self._copy_masters_to_model(self.params)

    def _adamw_states(self):
        """{parameter: torch's state of it} of AdamW's groups, made with zeros before their first step."""
        found = {}
        for key, torch_optimizer in self.torch_optimizers.items():
            if isinstance(torch_optimizer, torch.optim.AdamW):
                for n in self.param_names[key]:
                    master = self.master_weights[n]
                    found[n] = torch_optimizer.state[master]
                    if not found[n]:
                        found[n].update(step=torch.zeros((), dtype=torch.float32, device=master.device),
                                        exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
        return found

    def _copy_masters_to_model(self, names):
        pairs = [(self.params[n], self.master_weights[n]) for n in names
                 if self.params[n] is not self.master_weights[n]]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])


def default_optimizer_groups(params: dict[str, torch.Tensor]) -> dict[str, OptimizerGroup]:
    """The groups "matrices", which have weight decay under AdamW, and "vectors", which have none."""
    matrices = {n for n, p in params.items() if p.dim() >= 2}
    return {"matrices": OptimizerGroup(matrices),
            "vectors": OptimizerGroup(params.keys() - matrices, weight_decay=0.0)}


def assign_to_groups(param_names: Iterable[str], groups: dict[str, OptimizerGroup]) -> dict[str, list[str]]:
    """{group: its parameters, in their order}. Raises ValueError unless each is in exactly one group."""
    homes = {n: [key for key, group in groups.items() if group.contains(n)] for n in param_names}
    if homeless := [n for n, found in homes.items() if not found]:
        raise ValueError(f"no optimizer group has {', '.join(homeless)}; there are {', '.join(groups)}: add "
                         "a group or a pattern for them")
    if shared := [f"{n} ({', '.join(found)})" for n, found in homes.items() if len(found) > 1]:
        raise ValueError(f"a parameter has one optimizer group, and these have more: {', '.join(shared)}; "
                         "narrow the patterns")
    return {key: [n for n, [home] in homes.items() if home == key] for key in groups}


def _torch_optimizer(masters, group, name, betas, weight_decay):
    """torch's optimizer of one group; what the group does not say is `name`, `betas`, `weight_decay`."""
    name = group.optimizer or name
    if name == "adamw":
        decay = weight_decay if group.weight_decay is None else group.weight_decay
        return torch.optim.AdamW(masters, betas=group.betas or betas, eps=ADAMW_EPS, weight_decay=decay,
                                 fused=True)
    if name != "sgd":
        raise ValueError(f"no optimizer named {name!r}; there are adamw and sgd")
    if group.betas or group.weight_decay:
        raise ValueError("betas and weight decay are AdamW's, and a group that says them is updated by sgd; "
                         "leave them out, or make it adamw")
    return torch.optim.SGD(masters, fused=True)


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

"""Weight initialization by name: a parameter's initial values depend on the seed and its own name alone.

They are normal with standard deviation 0.02, and 0.02 / sqrt(2 L) for the 2 L matrices that write to the
residual stream (GPT-2, Radford et al. 2019, section 2.3). Norm weights are 1, biases 0. Neither the order of
construction nor the dtype nor the number of ranks changes a value: a rank draws the whole tensor and keeps
its shard.
"""
import hashlib
import math

import torch

_INIT_STD = 0.02
_RESIDUAL_PROJECTIONS = ("attn.o.weight", "mlp.down.weight")


def init_weights(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Initialize every parameter of a `Decoder` in place, in its own dtype and device. Returns the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw_initial_tensor(name, parameter.shape, model.config.layers, seed))
    return model


def draw_initial_tensor(name: str, shape: tuple[int, ...], num_layers: int, seed: int) -> torch.Tensor:
    """The whole initial tensor of the parameter `name`, float32 on the CPU; the model has `num_layers`."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = _INIT_STD / math.sqrt(2 * num_layers) if name.endswith(_RESIDUAL_PROJECTIONS) else _INIT_STD
    return torch.empty(shape).normal_(0.0, std, generator=named_generator(seed, name))


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU random generator for (seed, name), seeded with the first 8 bytes of their SHA-256."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

"""Ports: the call sites of a layer's linears. Techniques replace or wrap them, and leave the linears alone.

    attn.in_proj(x, q, k, v)   mlp.in_proj(x, gate, up)    in-ports: a list with the output of each linear
    attn.out_proj(y, o)        mlp.out_proj(y, down)       out-ports: what is added to the hidden states
The module of a name owns its part of the weight, whatever is applied to it; adapters are its children, such
as `attn.q.lora_a`. Tensor parallelism and packed weights replace the plain ports. An adapter wraps a port and
calls it with linears of its own, of any width: LoRA (Hu et al. 2021) adds inner(lora_a(x), lora_b) to q's.
"""
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn


class LinearPort:
    """What a layer calls in place of its linears; a technique's port is a subclass with its own `__call__`.

    An in-port takes (x, *linears) and returns a list of outputs, an out-port takes (y, linear) and returns a
    tensor. A port that wraps another one keeps it in `inner`, calls it, and passes it other linears too.
    """
    inner: "LinearPort | None" = None        # the port that this one wraps
    applied_children: frozenset[str] = frozenset()       # names of a linear's children that it applies
    is_plain = False                         # whether it gives the linears' own outputs and can be replaced
    can_be_wrapped = True

    def why_not_taken(self, linear: nn.Module) -> str:
        """Why this port must not be given `linear`; an empty string where it can."""
        return ""

    def __str__(self) -> str:
        return type(self).__name__


class PlainInPort(LinearPort):
    """Calls each linear on the input: its own forward, hooks included."""
    is_plain = True

    def __call__(self, x: torch.Tensor, *linears: nn.Module) -> list[torch.Tensor]:
        return [linear(x) for linear in linears]


class PlainOutPort(LinearPort):
    """Calls the linear on the layer's result: its own forward, hooks included."""
    is_plain = True

    def __call__(self, y: torch.Tensor, linear: nn.Module) -> torch.Tensor:
        return linear(y)


class PortRow(NamedTuple):
    """A row of `check_ports`: which ports apply which linears."""
    path: str                                # of the call site, as in blocks.0.attn.in_proj
    chain: tuple[LinearPort, ...]            # the port, and the ports that it wraps, the innermost last
    linears: tuple[str, ...]                 # their names in the layer


def replace_ports(model: nn.Module, make_in_port: Callable[..., LinearPort],
                  make_out_port: Callable[..., LinearPort]) -> None:
    """Put `make_in_port(*linears)` or `make_out_port(linear)` where the plain port is, inside of wrappers.

    Raises TypeError where the port there is not plain: what it does would be lost.
    """
    make_port = {"in_proj": make_in_port, "out_proj": make_out_port}
    for path, owner, key, linears in list(_ports(model)):
        chain = _chain_of(path, getattr(owner, key))
        if not chain[-1].is_plain:
            raise TypeError(f"{path} is {_written(chain)}; a port in the place of {chain[-1]} would drop "
                            "what it does; apply each technique once, or wrap the port (wrap_ports)")
        port = make_port[key](*linears)
        if len(chain) > 1:
            chain[-2].inner = port
        else:
            setattr(owner, key, port)


def wrap_ports(model: nn.Module, make_in_port: Callable[..., LinearPort],
               make_out_port: Callable[..., LinearPort]) -> None:
    """Wrap each port: `make_in_port(inner, *linears)`, `make_out_port(inner, linear)`; `inner` to leave it.

    Raises TypeError where the new port's `inner` is not the one that it was given, or cannot be wrapped.
    """
    make_port = {"in_proj": make_in_port, "out_proj": make_out_port}
    for path, owner, key, linears in list(_ports(model)):
        inner = getattr(owner, key)
        port = make_port[key](inner, *linears)
        if port is not inner and inner not in _chain_of(path, port)[1:]:
            raise TypeError(f"{path}: {port} would drop what {inner} does; keep it as `inner`, and call it")
        setattr(owner, key, port)


def check_ports(model: nn.Module) -> list[PortRow]:
    """A table of all ports of `model`, after TypeErrors for what would switch itself off in silence.

    That is: a port of another kind, a linear that its port must not be given, and a linear's child that no
    port applies. Call it when all techniques are applied.
    """
    rows = []
    for path, owner, key, linears in _ports(model):
        chain = _chain_of(path, getattr(owner, key))
        names = _names_of(owner, linears)
        for name, linear in zip(names, linears):
            _check_linear(path, name, linear, chain, *(port.why_not_taken(linear) for port in chain))
        rows.append(PortRow(path, chain, names))
    return rows


def check_bare_linears(model: nn.Module, reader: str) -> None:
    """Raise TypeError for a linear whose weight `reader` cannot take apart: it is wrapped, or has a child.

    For techniques that change weights, to call before they touch any.
    """
    for path, owner, key, linears in _ports(model):
        chain = _chain_of(path, getattr(owner, key))
        for name, linear in zip(_names_of(owner, linears), linears):
            _check_linear(path, name, linear, chain, why_not_bare(linear, reader))


def why_not_bare(linear: nn.Module, reader: str, kinds: tuple[type, ...] = (nn.Linear,)) -> str:
    """Why `reader`, which takes weight and bias of `linear`, would lose something; "" where it is bare.

    Bare is a module of exactly one of `kinds` whose forward nothing changes: no hooks, no parametrization.
    """
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks,
             linear._backward_pre_hooks)
    if type(linear) not in kinds:
        lost = f"{type(linear).__name__}'s forward"
    elif "forward" in vars(linear):
        lost = "the forward that was set on it"
    elif any(hooks):
        lost = "its hooks"
    else:
        return ""
    return (f"{reader} reads the weight and bias of a bare nn.Linear, and would skip {lost}; wrap the port "
            "instead (wrap_ports in nanoinfra/model/ports.py)")


def _ports(model) -> Iterator[tuple[str, nn.Module, str, tuple[nn.Module, ...]]]:
    """(path, layer, attribute, linears) of each port; layers with ports have `linears_by_port`."""
    for prefix, owner in model.named_modules():
        for key, linears in owner.linears_by_port().items() if hasattr(owner, "linears_by_port") else ():
            yield f"{prefix}.{key}".lstrip("."), owner, key, linears


def _chain_of(path, port):
    """The port and all that it wraps, each of which must be a LinearPort."""
    chain = [port]
    while isinstance(chain[-1], LinearPort) and chain[-1].inner is not None:
        chain.append(chain[-1].inner)
    if not isinstance(chain[-1], LinearPort):
        raise TypeError(f"{path} has a port {chain[-1]!r} that does not say which linears it takes; make it "
                        "a LinearPort (nanoinfra/model/ports.py)")
    for outer, inner in zip(chain, chain[1:]):
        if not inner.can_be_wrapped:
            raise TypeError(f"{path}: {inner} is called by nobody, so {outer} around it would do nothing")
    return tuple(chain)


def _check_linear(path, name, linear, chain, *reasons):
    """A module with a forward of its own calls its children itself; nobody calls those of a bare linear."""
    name = path.removesuffix("in_proj").removesuffix("out_proj") + name
    if reason := next(filter(None, reasons), None):
        raise TypeError(f"{name}: {reason}")
    applied = frozenset().union(*(port.applied_children for port in chain))
    for child, _ in linear.named_children() if type(linear) is nn.Linear else ():
        if child not in applied:
            raise TypeError(f"{name} has the child {child!r}, which no port applies: {_written(chain)}; wrap "
                            "the port by one that has it in applied_children")


def _written(chain):
    return " around ".join(map(str, chain))


def _names_of(owner, linears):
    names = {module: name for name, module in owner.named_children()}
    return tuple(names[linear] for linear in linears)

"""A backward in two halves, for zero-bubble schedules: the input's gradient now, the weights' in a gap.

The graph that autograd has built is walked once. Where a weight joins the way from `y` back to `x` lies a
joint, a node with both gradients to give. The first half asks for x's alone and notes what arrives at each
joint; the second gives every joint that again and asks for its weights' alone. No module knows of it. Custom
autograd functions ask tensor.py's `needed` which gradients are wanted, or it computes both in both halves.
Qi et al. 2023, section 2.1. Not with recompute of whole blocks, which hides their weights from the graph.
"""
import functools

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Halves:
    """The backward of `y`, made of the leaf `x`: call `inputs`, then `weights`."""

    def __init__(self, y: torch.Tensor, x: torch.Tensor):
        self.y, self.x = y, x
        self.joints, self.caught = joints(y.grad_fn, get_gradient_edge(x).node), {}

    def inputs(self, grad: torch.Tensor | None) -> None:
        """The gradient of `x`, into `x.grad`, from `grad`, that of `y`."""
        hooks = [node.register_prehook(functools.partial(self.caught.__setitem__, node))
                 for node in self.joints]
        torch.autograd.backward(self.y, grad, inputs=[self.x], retain_graph=True)
        for hook in hooks:
            hook.remove()
        self.y = None

    def weights(self) -> None:
        """The gradients of the weights, as `.backward()` gives them: into `.grad`, past hooks."""
        for node, params in self.joints.items():
            pairs = [(GradientEdge(node, i), grad) for i, grad in enumerate(self.caught.pop(node))
                     if grad is not None]
            torch.autograd.backward(*map(list, zip(*pairs)), inputs=params)
        self.joints = {}


def joints(top, bottom) -> dict:
    """{node: parameters}: each node from which `bottom` can be reached, with what else it leads to."""
    order, leads = _down(top), {bottom: True}
    for node in order:                                                   # a node's children come before it
        leads[node] = node is bottom or any(leads[child] for child in _children(node))
    found = {}
    for node in reversed(order):
        if leads[node] and node is not bottom:
            aside = [child for child in _children(node) if not leads[child]]
            params = [leaf.variable for child in aside for leaf in _down(child) if hasattr(leaf, "variable")]
            if params:
                found[node] = params
    return found


def _children(node):
    return [child for child, _ in node.next_functions if child is not None]


def _down(top):
    """All nodes under `top`, children first."""
    seen, order, stack = {top}, [], [(top, iter(_children(top)))]
    while stack:
        node, children = stack[-1]
        child = next((child for child in children if child not in seen), None)
        if child is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(child)
            stack.append((child, iter(_children(child))))
    return order

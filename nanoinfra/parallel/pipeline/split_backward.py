"""A backward in two halves, for zero-bubble schedules: the input's gradient first, the weights' later.

The autograd graph is walked once. A joint is a node on the way from `y` back to `x` that also leads to
weights: it can compute both gradients. The first half asks for x's gradient only and keeps the gradients that
arrive at each joint; the second half passes them to every joint again and asks for its weights' only. Modules
need no change. A custom autograd function asks tensor_parallel.py's `inputs_needing_grad`, else it computes
both twice. Qi et al. 2023, section 2.1. Not with recompute of whole blocks, which hides their weights from
the graph.
"""
import functools

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge


class SplitBackward:
    """The backward of `y`, computed from the leaf `x`: call `backward_input`, then `backward_weight`."""

    def __init__(self, y: torch.Tensor, x: torch.Tensor):
        self._y, self._x = y, x
        self._joints, self._caught_grads = _joint_nodes(y.grad_fn, get_gradient_edge(x).node), {}

    def backward_input(self, output_grad: torch.Tensor | None) -> None:
        """Compute the gradient of `x` into `x.grad`, from the gradient of `y`."""
        hooks = [node.register_prehook(functools.partial(self._caught_grads.__setitem__, node))
                 for node in self._joints]
        torch.autograd.backward(self._y, output_grad, inputs=[self._x], retain_graph=True)
        for hook in hooks:
            hook.remove()
        self._y = None

    def backward_weight(self) -> None:
        """Compute the gradients of the weights as `.backward()` does: into `.grad`, and hooks run."""
        for node, params in self._joints.items():
            pairs = [(GradientEdge(node, i), grad) for i, grad in enumerate(self._caught_grads.pop(node))
                     if grad is not None]
            torch.autograd.backward(*map(list, zip(*pairs)), inputs=params)
        self._joints = {}


def _joint_nodes(top, bottom) -> dict:
    """{node: parameters}: each node on a way from `top` to `bottom`, with the parameters it also leads to."""
    order, leads = _nodes_below(top), {bottom: True}
    for node in order:                                                   # a node's children come before it
        leads[node] = node is bottom or any(leads[child] for child in _children(node))
    found = {}
    for node in reversed(order):
        if leads[node] and node is not bottom:
            aside = [child for child in _children(node) if not leads[child]]
            leaves = [leaf for child in aside for leaf in _nodes_below(child)]
            params = [leaf.variable for leaf in leaves if hasattr(leaf, "variable")]
            if params:
                found[node] = params
    return found


def _children(node):
    return [child for child, _ in node.next_functions if child is not None]


def _nodes_below(top):
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

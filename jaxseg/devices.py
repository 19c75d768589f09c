"""The mean over the devices that work side by side, in a pmap or a vmap with a named axis."""

from typing import TypeVar

import jax

Tree = TypeVar("Tree")


def mean_over_devices(tree: Tree, axis_name: str | None) -> Tree:
    """The mean of each array over a named axis; over no axis, or one of a single device, the arrays themselves.

    Over a single device XLA's CPU backend would still copy them and wait for a meeting of one: with a ResNet-18 more
    than forty times in a step of the improved model's stage 2.

    Args:
      tree: of float arrays.
      axis_name: of the axis, or None.
    """
    if axis_name is None or jax.lax.axis_size(axis_name) == 1:
        return tree
    return jax.lax.pmean(tree, axis_name)

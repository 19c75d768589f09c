"""The layers of a model, with their output shapes and parameters, found without computing anything."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn


class Layer(NamedTuple):
    """One layer that has parameters.

    Attributes:
      name: its path in the model, such as 'encoder/layer1_0/conv1'.
      kind: its class, such as 'Conv'.
      shape: of its output, without the batch: (H, W, C).
      parameters: how many numbers it learns; running statistics are not learnt.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int


def list_layers(model: nn.Module, image_size: tuple[int, int]) -> list[Layer]:
    """Lists the layers of a segmenter that have parameters, in the order in which an image passes them.

    Args:
      model: called with (1, H, W, 3) uint8.
      image_size: (H, W) in pixels.

    Returns:
      The layers. Only shapes are traced: it takes seconds for a ResNet-18, and no memory.
    """
    shapes: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(output, jax.Array):
            shapes[context.module.path] = (type(context.module).__name__, output.shape[1:])
        return output

    with nn.intercept_methods(record):
        image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.uint8)
        params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    layers = []
    # A module is recorded when it returns: those inside another come before it, and all in the order of the data.
    for path, (kind, shape) in shapes.items():
        values = params
        for name in path:
            values = values.get(name, {})
        count = sum(math.prod(leaf.shape) for leaf in values.values() if not isinstance(leaf, dict))
        if count:
            layers.append(Layer("/".join(path), kind, shape, count))
    return layers


def format_summary(layers: list[Layer]) -> str:
    """The table for the terminal: name, kind, output as height x width x channels, parameters; then the totals.

    Args:
      layers: as `list_layers` returns them.

    Returns:
      Lines of equal columns; at the end a total for each part of the model ('encoder', 'decoder') and for all.
    """
    rows = [("layer", "kind", "output", "parameters")]
    rows += [(x.name, x.kind, "x".join(map(str, x.shape)), f"{x.parameters:,}") for x in layers]
    totals: dict[str, int] = {}
    for layer in layers:
        part = layer.name.partition("/")[0]
        totals[part] = totals.get(part, 0) + layer.parameters
    rows += [(part, "", "", f"{count:,}") for part, count in totals.items()]
    rows.append(("all", "", "", f"{sum(totals.values()):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {output:>{widths[2]}}  {count:>{widths[3]}}"
        for name, kind, output, count in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1 : len(layers) + 1], rule, *lines[len(layers) + 1 :]])

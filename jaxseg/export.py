"""A segmenter as one file that runs without this package: a StableHLO program, for any JAX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import export

from jaxseg.segmenter import STRIDE

PLATFORMS = ("cpu", "cuda")


def export_program(model: nn.Module, variables: Any) -> bytes:
    """Compiles nothing yet: traces what turns an image into its class map, weights and preprocessing included.

    Args:
      model: the segmenter, its batch norms averaging over no axis.
      variables: its {'params', 'batch_stats'}.

    Returns:
      What `jax.export.deserialize` makes a program of again, whose `call` takes (N, H, W, 3) uint8 RGB and gives
      (N, H, W) uint8 class indices: any N, and H and W multiples of 32. It holds the forms of all `PLATFORMS`.
    """
    number, height, width = export.symbolic_shape(f"n, {STRIDE}*h, {STRIDE}*w")

    def classify(image: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, image)
        return logits.argmax(-1).astype(jnp.uint8)

    image = jax.ShapeDtypeStruct((number, height, width, 3), jnp.uint8)
    return bytes(export.export(jax.jit(classify), platforms=PLATFORMS)(image).serialize())

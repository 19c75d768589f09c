"""Decoders: stride-32 features -> logits at the input's size."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxseg.layers import ConvTranspose


class BaselineDecoder(nn.Module):
    """Five times [transposed convolution k4 s2 p1, no bias -> ReLU], then a 1x1 convolution to the classes.

    Source: the baseline of the 2019 report.

    Attributes:
      num_classes: the number of logits for each pixel.
      widths: the channels after each transposed convolution.
      dtype: of the transposed convolutions; the last convolution and the logits are float32.
    """

    num_classes: int
    widths: tuple[int, ...] = (256, 128, 64, 32, 16)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        """Decodes x: (N, H, W, C) float at stride 32 into logits (N, 32 H, 32 W, num_classes) float32."""
        for layer, width in enumerate(self.widths):
            x = nn.relu(ConvTranspose(width, dtype=self.dtype, name=f"conv_transpose{layer + 1}")(x))
        return nn.Conv(self.num_classes, (1, 1), dtype=jnp.float32, name="head")(x.astype(jnp.float32))

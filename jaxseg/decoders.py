"""Decoders: stride-32 features -> logits at the input's size; all are called with (features, train, keys)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxseg.layers import BatchNorm, Conv, ConvTranspose, dropout


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
    def __call__(self, x: jnp.ndarray, train: bool = False, keys: jax.Array | None = None) -> jnp.ndarray:
        """Decodes x: (N, H, W, C) float at stride 32 into logits (N, 32 H, 32 W, num_classes) float32.

        The other arguments are those of `ImprovedDecoder`; nothing here depends on them.
        """
        for layer, width in enumerate(self.widths):
            x = nn.relu(ConvTranspose(width, dtype=self.dtype, name=f"conv_transpose{layer + 1}")(x))
        return Conv(self.num_classes, (1, 1), use_bias=True, name="head")(x.astype(jnp.float32))


class ImprovedDecoder(nn.Module):
    """The baseline's, with batch norm before each ReLU, and dropout before the last convolution.

    Source: the improved model of the 2019 report, which does not give the dropout rate.

    Attributes:
      num_classes: the number of logits for each pixel.
      widths: the channels after each transposed convolution.
      dropout_rate: the probability that a value of the last features is dropped, from 0 to below 1.
      axis_name: the pmap axis over which batch statistics are averaged, or None.
      dtype: of all but the last convolution; that, the logits, parameters and statistics are float32.
    """

    num_classes: int
    widths: tuple[int, ...] = (256, 128, 64, 32, 16)
    dropout_rate: float = 0.2
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jnp.ndarray, train: bool = False, keys: jax.Array | None = None) -> jnp.ndarray:
        """Decodes features into logits.

        Args:
          x: (N, H, W, C) float at stride 32.
          train: batch norm uses, and updates, the batch's statistics; otherwise the running ones, unchanged.
          keys: (N,) keys, one for each image, from which dropout draws; without them, or without `train`, nothing is
            dropped.

        Returns:
          logits: (N, 32 H, 32 W, num_classes) float32.
        """
        for layer, width in enumerate(self.widths):
            x = ConvTranspose(width, dtype=self.dtype, name=f"conv_transpose{layer + 1}")(x)
            norm = BatchNorm(
                use_running_average=not train,
                axis_name=self.axis_name,
                dtype=self.dtype,
                name=f"bn{layer + 1}",
            )
            x = nn.relu(norm(x))
        x = x.astype(jnp.float32)
        if train and keys is not None and self.dropout_rate:
            x = dropout(x, keys, self.dropout_rate)
        return Conv(self.num_classes, (1, 1), use_bias=True, name="head")(x)


def start_at_prior(params: Any, counts: np.ndarray, scale: float = 0.3) -> Any:
    """Lets a decoder start where it need not learn what all pixels have in common.

    Otherwise one without biases and batch norm learns the classes' frequencies first, through all its layers at once:
    within a hundred updates its last channels are nearly multiples of each other, and stay so for long. Here the head's
    bias knows the frequencies, and the transposed convolutions' kernels are centred: a constant added to all of their
    inputs changes nothing, except at the borders. Batch norms stay as they are: they subtract that constant anyway.

    Args:
      params: the parameters of `BaselineDecoder` or `ImprovedDecoder`.
      counts: (num_classes,) int64 pixels of each class in the training split; one is added to each.
      scale: what the head's kernel is multiplied by, so that the features disturb the first guess little.

    Returns:
      Other parameters, of the same structure, on the host.

    Source: Lin et al. 2017, "Focal loss for dense object detection", 3.3, for the bias.
    """
    params = jax.tree.map(np.asarray, params)
    frequencies = (counts + 1) / (counts + 1).sum()
    head = {"kernel": params["head"]["kernel"] * scale, "bias": np.log(frequencies).astype(np.float32)}
    layers = {name: layer for name, layer in params.items() if name != "head"}
    centred = {name: {"kernel": _centre(layer["kernel"])} for name, layer in layers.items() if "kernel" in layer}
    return {**layers, **centred, "head": head}


def _centre(kernel: np.ndarray) -> np.ndarray:
    """Makes the weights (4, 4, C, F) that one output sees, 4 taps of all channels, sum to 0; the variance stays."""
    phases = kernel.reshape(2, 2, 2, 2, *kernel.shape[2:])
    centred = phases - phases.mean((0, 2, 4), keepdims=True)
    # Of a rectified normal's mean square the squared mean is 1 / pi; only the rest still passes.
    return centred.reshape(kernel.shape) * (1 - 1 / math.pi) ** -0.5

"""The transposed convolution and the max-pool, exact, and fast forward and backward on CPU and GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# An output pixel of a k4 s2 transposed convolution sees 2x2 of the 16 taps; Flax's own initialisers count all 16.
_TAPS = 4


def conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Doubles height and width with the transposed convolution of kernel 4, stride 2 and padding 1.

    Written as four 2x2 convolutions, one for each parity of the output's row and column, because XLA's CPU backend is
    about twenty times slower on the gradient of a convolution with a dilated input. Along one axis, zero outside:

        y[2 i]     = x[i - 1] kernel[0] + x[i]     kernel[2]
        y[2 i + 1] = x[i]     kernel[1] + x[i + 1] kernel[3]

    Args:
      x: (N, H, W, C) float.
      kernel: (4, 4, C, O) float, HWIO, of x's dtype.

    Returns:
      (N, 2 H, 2 W, O), of x's dtype.

    Source: equals `jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")`, which does not flip the kernel. PyTorch's
      `ConvTranspose2d(C, O, 4, stride=2, padding=1)` does: its weight (C, O, 4, 4) is
      `kernel[::-1, ::-1].transpose(2, 3, 0, 1)`.
    """

    def phase(row: int, column: int) -> jax.Array:
        """Computes the outputs at rows 2 i + row and columns 2 j + column."""
        taps = kernel[row::2, column::2]
        padding = ((1 - row, row), (1 - column, column))
        return jax.lax.conv_general_dilated(x, taps, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    n, height, width, _ = x.shape
    rows = [jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(n, 2 * height, 2 * width, kernel.shape[3])


def _he_normal_4_taps(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Draws a (4, 4, C, O) kernel with standard deviation sqrt(2 / (4 C)): a ReLU halves what this doubles."""
    return jax.random.normal(key, shape, dtype) * jnp.sqrt(2.0 / (_TAPS * shape[2])).astype(dtype)


class ConvTranspose(nn.Module):
    """The transposed convolution k4 s2 p1 without bias: (N, H, W, C) -> (N, 2 H, 2 W, features).

    Attributes:
      features: the number of output channels.
      dtype: of the computation and the output.
      param_dtype: of the parameter `kernel`: (4, 4, C, features).
      kernel_init: by default normal and such that the variance survives a ReLU behind the layer.
    """

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = _he_normal_4_taps

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to x: (N, H, W, C) float."""
        kernel = self.param("kernel", self.kernel_init, (4, 4, x.shape[-1], self.features), self.param_dtype)
        return conv_transpose(x.astype(self.dtype), kernel.astype(self.dtype))


def _first_maximum(first: jax.Array, second: jax.Array) -> jax.Array:
    """Selects the larger; the first if they are equal, so that the gradient goes there whole; a NaN before all."""
    return jnp.where((second > first) | jnp.isnan(second), second, first)


def max_pool(x: jax.Array) -> jax.Array:
    """Takes the maximum of 3x3 windows with stride 2 and padding 1, the padding of ResNets.

    Written over nine strided slices, because the gradient of a windowed reduction is slow on XLA's CPU backend. Among
    equal values the first in row-major order gets the gradient (after a ReLU ties are everywhere), and a NaN wins.

    Args:
      x: (N, H, W, C) float.

    Returns:
      (N, ceil(H / 2), ceil(W / 2), C), of x's dtype.

    Source: equals `flax.linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))` and PyTorch's `MaxPool2d(3, 2, 1)`.
    """
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    # Row by row, so that the first maximum is the first in row-major order.
    taps = (padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3))
    return functools.reduce(_first_maximum, taps)

"""Convolution, transposed convolution, max-pool and dropout, exact, and fast forward and backward on CPU and GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

# An output pixel of a k4 s2 transposed convolution sees 2x2 of the 16 taps; Flax's own initialisers count all 16.
_TAPS = 4
# Below this many input channels XLA's own kernel gradient is no slower than matrix products.
_FEW_CHANNELS = 16


def _plain_conv(x: jax.Array, kernel: jax.Array, strides: int, padding: int) -> jax.Array:
    rows, columns, _, features = kernel.shape
    if x.shape[1] < rows or x.shape[2] < columns:
        # A map smaller than the kernel, the last of an image of 64x64: XLA's CPU backend would take a hundred times
        # longer than the matrix product of the kernel with each output's whole input.
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        bottom, right = max(x.shape[1] - rows + 1, 0), max(x.shape[2] - columns + 1, 0)
        taps = [x[:, u : u + bottom : strides, v : v + right : strides] for u, v in np.ndindex(rows, columns)]
        return jnp.concatenate(taps, axis=-1) @ kernel.reshape(-1, features)
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _kernel_grad_by_products(x: jax.Array, g: jax.Array, size: tuple[int, int], strides: int, padding: int):
    """The gradient of `conv` with respect to its kernel, `sum x[s i + u, s j + v] g[i, j]`, as matrix products.

    Two forms. With stride 1 a row offset may move from x to g, `sum x[i, j + v] g[i - u, j]`, so that one product of
    x at all column offsets with g at all row offsets gives every tap: small sides (64 channels) are what the matrix
    product is slow at. With a stride it may not, and the products are one for each tap.

    Args:
      x: (N, H, W, C), the input.
      g: (N, H', W', O), the gradient at the output.
      size: (KH, KW) of the kernel.
      strides: of both axes.
      padding: on each of the four sides.

    Returns:
      (KH, KW, C, O), accumulated in float32 at least, of x's dtype.
    """
    (rows, columns), channels = size, x.shape[3]
    _, height, width, out_channels = g.shape
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        over_pixels = (((0, 1, 2), (0, 1, 2)), ((), ()))
        accumulator = jnp.promote_types(x.dtype, jnp.float32)
        return jax.lax.dot_general(a, b, over_pixels, preferred_element_type=accumulator).astype(x.dtype)

    if strides == 1:
        by_column = jnp.concatenate([x[:, :, v : v + width] for v in range(columns)], axis=-1)
        shifts = [((0, 0), (u, rows - 1 - u), (0, 0), (0, 0)) for u in range(rows)]
        by_row = jnp.concatenate([jnp.pad(g, shift) for shift in shifts], axis=-1)
        taps = product(by_column, by_row).reshape(columns, channels, rows, out_channels)
        return taps.transpose(2, 0, 1, 3)
    bottom, right = (height - 1) * strides + 1, (width - 1) * strides + 1
    taps = [product(x[:, u : u + bottom : strides, v : v + right : strides], g) for u, v in np.ndindex(rows, columns)]
    return jnp.stack(taps).reshape(rows, columns, channels, out_channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, strides: int, padding: int) -> jax.Array:
    """Convolves (cross-correlates) as `jax.lax.conv_general_dilated` does, with a faster kernel gradient on CPU.

    XLA's CPU backend runs the gradient with respect to the kernel at a quarter to a half of the forward pass's speed,
    and matrix products over shifted inputs are up to twice as fast, for 1x1 kernels with a stride six times.
    Reverse-mode differentiation only.

    Args:
      x: (N, H, W, C) float.
      kernel: (KH, KW, C, O) float, HWIO, of x's dtype.
      strides: of both axes.
      padding: zeros added on each of the four sides.

    Returns:
      (N, (H + 2 padding - KH) // strides + 1, (W + 2 padding - KW) // strides + 1, O), of x's dtype.

    Source: equals PyTorch's `Conv2d(C, O, (KH, KW), strides, padding, bias=False)` with kernel.transpose(3, 2, 0, 1).
    """
    return _plain_conv(x, kernel, strides, padding)


def _conv_forward(x: jax.Array, kernel: jax.Array, strides: int, padding: int):
    return _plain_conv(x, kernel, strides, padding), (x, kernel)


def _conv_backward(strides: int, padding: int, inputs: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = inputs
    (x_grad,) = jax.linear_transpose(lambda x: _plain_conv(x, kernel, strides, padding), x)(g)

    def by_convolution(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda kernel: _plain_conv(x, kernel, strides, padding), kernel)(g)[0]

    def by_products(x: jax.Array, g: jax.Array) -> jax.Array:
        return _kernel_grad_by_products(x, g, kernel.shape[:2], strides, padding)

    # With a handful of input channels (an image) a product has too small a side; a GPU has no need of them.
    if x.shape[3] < _FEW_CHANNELS:
        return x_grad, by_convolution(x, g)
    return x_grad, jax.lax.platform_dependent(x, g, cpu=by_products, default=by_convolution)


conv.defvjp(_conv_forward, _conv_backward)


class Conv(nn.Module):
    """A convolution without bias: (N, H, W, C) -> (N, H / strides, W / strides, features).

    Attributes:
      features: the number of output channels.
      kernel_size: (KH, KW).
      strides: of both axes.
      padding: zeros added on each of the four sides.
      dtype: of the computation and the output.
      param_dtype: of the parameter `kernel`: (KH, KW, C, features).
      kernel_init: of `kernel`.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    padding: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to x: (N, H, W, C) float."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        return conv(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, self.padding)


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


def dropout(x: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    """Sets values to 0 with probability `rate`, each independently, and divides the others by 1 - rate.

    What an image loses depends on its own key only, not on its place in the batch, nor on how many devices share it.
    The key gives 64 random bits, and a value's index is hashed with them: `jax.random` would take 100 to 500 ms on a
    CPU for what the hash does in 17 (8 images of 192x256x16).

    Args:
      x: (N, ...) float, fewer than 2^32 values in each image.
      keys: (N,) keys, one for each image.
      rate: from 0 to below 1.

    Returns:
      (N, ...), of x's dtype; its expectation is x.

    Raises:
      ValueError: the rate is out of range.

    Source: Srivastava et al. 2014, "Dropout", scaled in training as PyTorch's `Dropout`; the hash is C. Wellons'
      `lowbias32`, from the Hash Prospector.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout rate must be from 0 to below 1, not {rate}")
    threshold = np.uint32(min(round(rate * 2**32), 2**32 - 1))

    def drop(x: jax.Array, key: jax.Array) -> jax.Array:
        first, second = jax.random.bits(key, (2,), jnp.uint32)
        index = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
        # Two rounds, because after one all images would draw from one table of 2^32 values, and those whose first bits
        # agree in their upper part would drop alike, in another order.
        return jnp.where(_hash(_hash(index ^ first) ^ second) >= threshold, x / (1 - rate), 0)

    return jax.vmap(drop)(x, keys)


def _hash(x: jax.Array) -> jax.Array:
    """Maps uint32 one to one onto uint32 such that each input bit flips each output bit about half the time."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)

"""Convolution and transposed convolution as modules, max-pool and dropout."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxseg.convolution import conv, conv_transpose

# An output pixel of a k4 s2 transposed convolution sees 2x2 of the 16 taps; Flax's own initialisers count all 16.
_TAPS = 4


class Conv(nn.Module):
    """A convolution: (N, H, W, C) -> (N, H / strides, W / strides, features).

    Attributes:
      features: the number of output channels.
      kernel_size: (KH, KW).
      strides: of both axes.
      padding: zeros added on each of the four sides.
      use_bias: adds a parameter `bias`: (features,), which starts at 0.
      dtype: of the computation and the output.
      param_dtype: of the parameters; `kernel`: (KH, KW, C, features).
      kernel_init: of `kernel`.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    padding: int = 0
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to x: (N, H, W, C) float."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        y = conv(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, self.padding)
        if not self.use_bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype)


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


def _is_before(second: jax.Array, first: jax.Array) -> jax.Array:
    """Whether the second value is to be chosen."""
    return (second > first) | jnp.isnan(second)


def _first_maximum(first: jax.Array, second: jax.Array) -> jax.Array:
    """Selects the larger; the first if they are equal, so that the gradient goes there whole; a NaN before all."""
    return jnp.where(_is_before(second, first), second, first)


def _windows(x: jax.Array) -> list[jax.Array]:
    """The nine values of each window of `max_pool`, in row-major order: -inf outside."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return [padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Takes the maximum of 3x3 windows with stride 2 and padding 1, the padding of ResNets.

    Written over nine strided slices, because the gradient of a windowed reduction is slow on XLA's CPU backend. Among
    equal values the first in row-major order gets the gradient (after a ReLU ties are everywhere), and a NaN wins.
    Reverse-mode differentiation only.

    Args:
      x: (N, H, W, C) float.

    Returns:
      (N, ceil(H / 2), ceil(W / 2), C), of x's dtype.

    Source: equals `flax.linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))` and PyTorch's `MaxPool2d(3, 2, 1)`.
    """
    return functools.reduce(_first_maximum, _windows(x))


def _max_pool_forward(x: jax.Array):
    maximum, *others = _windows(x)
    place = jnp.zeros(maximum.shape, jnp.int8)
    for index, value in enumerate(others, start=1):
        place = jnp.where(_is_before(value, maximum), jnp.int8(index), place)
        maximum = _first_maximum(maximum, value)
    # Of x only the shape is needed, which an array without channels carries.
    return maximum, (place, x[:0, ..., :0])


def _max_pool_backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array):
    place, like = residuals
    n, height, width, channels = g.shape
    # The windows below and to the right of the last ones: none.
    after = ((0, 0), (0, 1), (0, 1), (0, 0))
    place, g = jnp.pad(place, after, constant_values=-1), jnp.pad(g, after)

    def phase(row: int, column: int) -> jax.Array:
        """The gradient at rows 2 i + row and columns 2 j + column, which one window in each direction sees, or two."""
        total = jnp.zeros((), g.dtype)
        for i, j in np.ndindex(row + 1, column + 1):
            # Of two windows the second has this pixel in its first row, the first in its last.
            tap = 3 * (1 + row - 2 * i) + 1 + column - 2 * j
            window = (slice(None), slice(i, i + height), slice(j, j + width))
            total += jnp.where(place[window] == tap, g[window], 0)
        return total

    rows = [jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)]
    x_grad = jnp.stack(rows, axis=2).reshape(n, 2 * height, 2 * width, channels)
    return (x_grad[:, : like.shape[1], : like.shape[2]],)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


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

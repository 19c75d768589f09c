"""Convolution, transposed convolution and batch norm as modules, max-pool and dropout."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors
from flax import linen as nn
from flax.core import meta

from jaxseg.convolution import conv, conv_transpose
from jaxseg.devices import mean_over_devices
from jaxseg.initializers import constant, lecun_normal, normal

# An output pixel of a k4 s2 transposed convolution sees 2x2 of the 16 taps; Flax's own initialisers count all 16.
_TAPS = 4


def _param(
    module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    """What `module.param` gives; that would trace the initializer each time, to compare its shape with the array's."""
    value: Any = meta.unbox(module.get_variable("params", name))
    if value is None:
        return module.param(name, initializer, shape, dtype)
    if value.shape != shape:
        raise errors.ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
    return value


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
    kernel_init: nn.initializers.Initializer = lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to x: (N, H, W, C) float."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = _param(self, "kernel", self.kernel_init, shape, self.param_dtype)
        y = conv(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, self.padding)
        if not self.use_bias:
            return y
        return y + _param(self, "bias", constant(0.0), (self.features,), self.param_dtype).astype(self.dtype)


# Standard deviation sqrt(2 / (4 C)) of a (4, 4, C, O) kernel: a ReLU halves what this doubles.
_he_normal_4_taps = normal(lambda shape: math.sqrt(2 / (_TAPS * shape[2])))


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
        kernel = _param(self, "kernel", self.kernel_init, (4, 4, x.shape[-1], self.features), self.param_dtype)
        return conv_transpose(x.astype(self.dtype), kernel.astype(self.dtype))


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with a scale and a bias for each channel.

    Parameters, statistics and numbers are those of `flax.linen.BatchNorm`; the backward pass is written by hand, so
    that it needs, and keeps in memory, nothing but the layer's input. Flax's momentum of 0.9 is PyTorch's 0.1; the
    running variance is the biased one, what the batch was divided by, where PyTorch keeps the unbiased one.
    Reverse-mode differentiation only.

    Source: Ioffe and Szegedy 2015, "Batch normalization".

    Attributes:
      use_running_average: normalise by the running statistics, and leave them; otherwise by the batch's, and update.
      axis_name: the pmap axis over which the batch's statistics are averaged, or None.
      momentum: the share of the running statistics that stays.
      epsilon: added to the variance.
      dtype: of the output; parameters and statistics are float32, and it computes in float32 at least.
    """

    use_running_average: bool
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to x: (..., C) float."""
        shape = x.shape[-1:]
        scale = _param(self, "scale", constant(1.0), shape, jnp.float32)
        bias = _param(self, "bias", constant(0.0), shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", constant(0.0), None, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", constant(1.0), None, shape, jnp.float32)
        if self.use_running_average:
            inverse = jax.lax.rsqrt(running_var.value + self.epsilon)
            return _scale(x, running_mean.value, inverse, scale, bias).astype(self.dtype)
        # There is no axis yet where the parameters are drawn.
        axis_name = None if self.is_initializing() else self.axis_name
        y, mean, var = _normalise(x, scale, bias, self.epsilon, axis_name)
        if not self.is_initializing():
            running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
            running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
        return y.astype(self.dtype)


def _scale(x: jax.Array, mean: jax.Array, inverse: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return (x - mean) * (inverse * scale) + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises x by its own statistics: y, and the mean and variance, through which no gradient passes."""
    return _normalise_forward(x, scale, bias, epsilon, axis_name)[0]


def _normalise_forward(x, scale, bias, epsilon, axis_name):
    axes, wide = tuple(range(x.ndim - 1)), jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    mean, square = mean_over_devices(jnp.stack([wide.mean(axes), (wide * wide).mean(axes)]), axis_name)
    # Rounding can make the difference negative.
    var = jnp.maximum(0.0, square - mean * mean)
    inverse = jax.lax.rsqrt(var + epsilon)
    return (_scale(wide, mean, inverse, scale, bias), mean, var), (x, mean, inverse, scale)


def _normalise_backward(epsilon, axis_name, residuals, grads):
    (x, mean, inverse, scale), g = residuals, grads[0]
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    # A zero that is not known before g is: otherwise XLA normalises x for this in the forward pass already, and keeps
    # that beside x.
    zero = 0 * g[(0,) * g.ndim]
    normalised = (x.astype(g.dtype) - (mean + zero)) * inverse
    bias_grad, scale_grad = g.sum(axes), (g * normalised).sum(axes)
    bias_mean, scale_mean = mean_over_devices(jnp.stack([bias_grad, scale_grad]) / count, axis_name)
    x_grad = (scale * inverse) * (g - bias_mean - normalised * scale_mean)
    return x_grad.astype(x.dtype), scale_grad.astype(scale.dtype), bias_grad.astype(scale.dtype)


_normalise.defvjp(_normalise_forward, _normalise_backward)


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
    # Otherwise XLA's CPU backend would find the places anew from x, three times, and keep x until then.
    place, g = jax.lax.platform_dependent(
        place, g, cpu=lambda *arrays: jax.lax.optimization_barrier(arrays), default=lambda *arrays: arrays
    )

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

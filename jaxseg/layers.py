"""Convolution, transposed convolution, max-pool and dropout, exact, and fast forward and backward on CPU and GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

# An output pixel of a k4 s2 transposed convolution sees 2x2 of the 16 taps; Flax's own initialisers count all 16.
_TAPS = 4
# From here on a map is so small, or so short of pixels, that its gradients as products may copy it for every tap.
_MANY_CHANNELS = 256


def _plain_conv(x: jax.Array, kernel: jax.Array, strides: int, padding: int) -> jax.Array:
    rows, columns, _, features = kernel.shape
    if rows == columns == 1 and not padding:
        return _product(x[:, ::strides, ::strides], kernel[0, 0], ((3,), (0,)))
    # A side that is not known yet, in a program that is exported, is no int, and counts as long.
    if any(isinstance(side, int) and side < length for side, length in ((x.shape[1], rows), (x.shape[2], columns))):
        # A map smaller than the kernel, the last of an image of 64x64: XLA's CPU backend would take a hundred times
        # longer than the matrix product of the kernel with each output's whole input.
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        bottom, right = max(x.shape[1] - rows + 1, 0), max(x.shape[2] - columns + 1, 0)
        taps = [x[:, u : u + bottom : strides, v : v + right : strides] for u, v in np.ndindex(rows, columns)]
        return jnp.concatenate(taps, axis=-1) @ kernel.reshape(-1, features)
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _product(a: jax.Array, b: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """Contracts these axes of a with those of b, accumulating in float32 at least; of a's dtype."""
    accumulator = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=accumulator).astype(a.dtype)


def _kernel_grad_by_products(x: jax.Array, g: jax.Array, size: tuple[int, int], strides: int, padding: int):
    """The gradient of `conv` with respect to its kernel, `sum x[s i + u, s j + v] g[i, j]`, as one matrix product.

    Two forms. With stride 1 a row offset may move from x to g, `sum x[i, j + v] g[i - u, j]`: a product of x at all
    column offsets with g at all row offsets gives every tap and copies the least. With a stride it may not, and where
    maps are small and channels many it need not: x at all offsets, channels first, so that a row of a map is copied
    as one piece, however few the channels are.

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
    n, height, width, out_channels = g.shape
    # A zero that is not known before g is: otherwise XLA makes the copies of x in the forward pass already, and keeps
    # those of all layers until the backward pass takes them. (An optimization_barrier is gone before it orders them.)
    zero = 0 * g[0, 0, 0, 0]
    if strides == 1 and (channels <= _MANY_CHANNELS or rows == columns == 1):
        x = jax.lax.pad(x, zero, ((0, 0, 0), (padding, padding, 0), (padding, padding, 0), (0, 0, 0)))
        by_column = jnp.concatenate([x[:, :, v : v + width] for v in range(columns)], axis=-1)
        shifts = [((0, 0), (u, rows - 1 - u), (0, 0), (0, 0)) for u in range(rows)]
        by_row = jnp.concatenate([jnp.pad(g, shift) for shift in shifts], axis=-1)
        by_column, by_row = (a.reshape(-1, a.shape[3]) for a in (by_column, by_row))
        taps = _product(by_column.T, by_row, ((1,), (0,))).reshape(columns, channels, rows, out_channels)
        return taps.transpose(2, 0, 1, 3)
    # Rows s i and s i + 1 become rows i of two maps; what the last window does not reach is cut.
    phase_height, phase_width = height + (rows - 1) // strides, width + (columns - 1) // strides
    ends = (strides * phase_height - x.shape[1] - padding, strides * phase_width - x.shape[2] - padding)
    edges = ((0, 0, 0), (0, 0, 0), (padding, ends[0], 0), (padding, ends[1], 0))
    maps = jax.lax.pad(x.transpose(3, 0, 1, 2), zero, edges)
    maps = maps.reshape(channels, n, phase_height, strides, phase_width, strides).transpose(3, 5, 0, 1, 2, 4)
    # Otherwise XLA would transpose anew for each tap.
    maps = jax.lax.optimization_barrier(maps)
    cut = [
        maps[u % strides, v % strides, :, :, u // strides :, v // strides :][:, :, :height, :width]
        for u, v in np.ndindex(rows, columns)
    ]
    taps = _product(jnp.stack(cut), g, ((2, 3, 4), (0, 1, 2)))
    return taps.reshape(rows, columns, channels, out_channels)


def _input_grad_by_products(
    g: jax.Array, kernel: jax.Array, size: tuple[int, int], strides: int, padding: int
) -> jax.Array:
    """The gradient of `conv` with respect to its input: each pixel of g times all taps, added where they came from.

    Args:
      g: (N, H', W', O), the gradient at the output.
      kernel: (KH, KW, C, O).
      size: (H, W) of the input.
      strides: of both axes.
      padding: on each of the four sides.

    Returns:
      (N, H, W, C), of g's dtype.
    """
    rows, columns = kernel.shape[:2]
    n, height, width, features = g.shape
    # One of the two must be transposed: of few pixels rather the product than the kernel.
    if n * height * width < features:
        taps = jnp.moveaxis(_product(kernel, g, ((3,), (3,))), (0, 1, 2), (3, 4, 5))
    else:
        taps = _product(g, kernel, ((3,), (3,)))

    def spread(tap: int, outputs: int, length: int) -> tuple[int, int, int]:
        """Zeros before, after and between the outputs, so that each lies where this tap met the input."""
        before = tap - padding
        return before, length - before - ((outputs - 1) * strides + 1), strides - 1

    places = (
        jax.lax.pad(
            taps[:, :, :, u, v],
            jnp.zeros((), g.dtype),
            ((0, 0, 0), spread(u, height, size[0]), spread(v, width, size[1]), (0, 0, 0)),
        )
        for u, v in np.ndindex(rows, columns)
    )
    return functools.reduce(jnp.add, places)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, strides: int, padding: int) -> jax.Array:
    """Convolves (cross-correlates) as `jax.lax.conv_general_dilated` does, with faster gradients on CPU.

    XLA's CPU backend runs the gradient with respect to the kernel at a tenth to a half of the forward pass's speed, and
    a matrix product over shifted inputs is up to three times as fast; so is one for the gradient with respect to the
    input where there are many channels or a stride. Reverse-mode differentiation only.

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

    def input_grad_plain(kernel: jax.Array, g: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda x: _plain_conv(x, kernel, strides, padding), x)(g)[0]

    def input_grad(kernel: jax.Array, g: jax.Array) -> jax.Array:
        return _input_grad_by_products(g, kernel, (x.shape[1], x.shape[2]), strides, padding)

    def kernel_grad_plain(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda kernel: _plain_conv(x, kernel, strides, padding), kernel)(g)[0]

    def kernel_grad(x: jax.Array, g: jax.Array) -> jax.Array:
        return _kernel_grad_by_products(x, g, (kernel.shape[0], kernel.shape[1]), strides, padding)

    # A GPU has no need of products. Nor has a wide map of few channels: nine times the gradient is much to write.
    if strides == 1 and x.shape[3] < _MANY_CHANNELS:
        x_grad = input_grad_plain(kernel, g)
    else:
        x_grad = jax.lax.platform_dependent(kernel, g, cpu=input_grad, default=input_grad_plain)
    return x_grad, jax.lax.platform_dependent(x, g, cpu=kernel_grad, default=kernel_grad_plain)


conv.defvjp(_conv_forward, _conv_backward)


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


# Along one axis, zero outside, a transposed convolution of kernel 4, stride 2 and padding 1 is
#
#     y[2 i - 1] = x[i - 1] kernel[1] + x[i] kernel[3]
#     y[2 i]     = x[i - 1] kernel[0] + x[i] kernel[2]
#
# and so a convolution of windows of 2 that gives blocks of 2: of four times the channels in two dimensions.


def _kernel_to_blocks(kernel: jax.Array) -> jax.Array:
    """(4, 4, C, O), a transposed convolution's -> (2, 2, C, 4 O), the convolution's that gives its blocks."""
    channels, features = kernel.shape[2:]
    taps = kernel.reshape(2, 2, 2, 2, channels, features)[:, ::-1, :, ::-1]
    return taps.transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, channels, 4 * features)


def _kernel_from_blocks(blocks: jax.Array) -> jax.Array:
    """The inverse of `_kernel_to_blocks`."""
    channels, features = blocks.shape[2], blocks.shape[3] // 4
    taps = blocks.reshape(2, 2, channels, 2, 2, features).transpose(0, 3, 1, 4, 2, 5)
    return taps[:, ::-1, :, ::-1].reshape(4, 4, channels, features)


def _to_blocks(y: jax.Array) -> jax.Array:
    """(N, 2 H, 2 W, O) -> (N, H + 1, W + 1, 4 O): blocks of 2x2, the first half outside; there it is 0."""
    n, height, width, features = y.shape
    y = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = y.reshape(n, height // 2 + 1, 2, width // 2 + 1, 2 * features)
    return jnp.concatenate([rows[:, :, 0], rows[:, :, 1]], axis=-1)


def _from_blocks(blocks: jax.Array) -> jax.Array:
    """(N, H + 1, W + 1, 4 O) -> (N, 2 H, 2 W, O): what is outside is cut."""
    n, height, width, channels = blocks.shape
    blocks = blocks.reshape(n, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(n, 2 * height, 2 * width, channels // 4)[:, 1:-1, 1:-1]


def _plain_conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _conv_transpose_by_blocks(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _from_blocks(_plain_conv(x, _kernel_to_blocks(kernel), 1, 1))


def _transposed_kernel_grad_by_blocks(x: jax.Array, g: jax.Array) -> jax.Array:
    return _kernel_from_blocks(_kernel_grad_by_products(x, _to_blocks(g), (2, 2), 1, 1))


@jax.custom_vjp
def conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Doubles height and width with the transposed convolution of kernel 4, stride 2 and padding 1.

    XLA's CPU backend is slow on a convolution with a dilated input, and twenty times slower on its gradients. There a
    convolution that gives blocks of 2x2 pixels takes its place, and a matrix product that of the kernel's gradient; the
    input's is a plain convolution with stride 2. Reverse-mode differentiation only.

    Args:
      x: (N, H, W, C) float.
      kernel: (4, 4, C, O) float, HWIO, of x's dtype.

    Returns:
      (N, 2 H, 2 W, O), of x's dtype.

    Source: equals `jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")`, which does not flip the kernel. PyTorch's
      `ConvTranspose2d(C, O, 4, stride=2, padding=1)` does: its weight (C, O, 4, 4) is
      `kernel[::-1, ::-1].transpose(2, 3, 0, 1)`.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_conv_transpose_by_blocks, default=_plain_conv_transpose)


def _conv_transpose_forward(x: jax.Array, kernel: jax.Array):
    return conv_transpose(x, kernel), (x, kernel)


def _conv_transpose_backward(inputs: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = inputs

    def kernel_grad_plain(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda kernel: _plain_conv_transpose(x, kernel), kernel)(g)[0]

    x_grad = _plain_conv(g, kernel[::-1, ::-1].transpose(0, 1, 3, 2), 2, 1)
    kernel_grad = jax.lax.platform_dependent(x, g, cpu=_transposed_kernel_grad_by_blocks, default=kernel_grad_plain)
    return x_grad, kernel_grad


conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)


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

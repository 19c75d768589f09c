"""Convolution and transposed convolution as functions, fast forward and backward on CPU and GPU."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.cpu import copies
from jaxseg.winograd import winograd, winograd_input_grad, winograd_kernel_grad, winograd_pays

# With more channels than these a map is so small, and a kernel so large, that on a CPU the input's gradient is faster
# as products, and a transposed convolution as what it is; unless `winograd_pays`.
_MANY_CHANNELS = 256
# What a convolution with a dilated kernel, as that of a gradient where there are strides, sees of its input XLA's CPU
# backend gathers by eights of channels, or one by one if their number is no multiple of eight.
_GATHERED_AT_ONCE = 8


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


def _kernel_grad_plain(x: jax.Array, g: jax.Array, shape: tuple[int, ...], strides: int, padding: int) -> jax.Array:
    """The gradient of `_plain_conv` with respect to its kernel, of this shape, as XLA computes it."""
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda kernel: _plain_conv(x, kernel, strides, padding), kernel)(g)[0]


def _product(a: jax.Array, b: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """Contracts these axes of a with those of b, in float32 at least; of a's dtype."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=wide).astype(a.dtype)


def _kernel_grad_on_cpu(x: jax.Array, g: jax.Array, shape: tuple[int, ...], strides: int, padding: int) -> jax.Array:
    """The gradient of `_plain_conv` with respect to its kernel, `sum x[s i + u, s j + v] g[i, j]`, fast on a CPU.

    Of a 1x1 kernel it is a product; otherwise, where `winograd_kernel_grad` does not pay, a convolution whose input
    channels are the images; where a size is 0 or not known, XLA's own. With strides, if the images are no multiple of
    `_GATHERED_AT_ONCE`, each is cut into so many bands that they are, as far as it has rows; a band has what its
    outputs see of the next. Without strides one band is as fast.

    Args:
      x: (N, H, W, C), the input.
      g: (N, H', W', O), the gradient at the output.
      shape: (KH, KW, C, O) of the kernel.
      strides: of both axes.
      padding: on each of the four sides.

    Returns:
      (KH, KW, C, O), of x's dtype.
    """
    rows, columns, channels, features = shape
    n, height, width, _ = g.shape
    if winograd_pays(x, shape, strides, padding, kernel_grad=True):
        return winograd_kernel_grad(x, g, rows, padding)
    if not _has_numbers(x, g):
        return _kernel_grad_plain(x, g, shape, strides, padding)
    if rows == columns == 1 and not padding:
        return _kernel_grad_by_product(x if strides == 1 else _not_before(x, g)[:, ::strides, ::strides], g)
    bands = 1 if strides == 1 else min(math.lcm(n, _GATHERED_AT_ONCE) // n, height)
    band = -(-height // bands)
    seen, pitch = (band - 1) * strides + rows, band * strides
    after = (bands - 1) * pitch + seen - x.shape[1] - padding, (width - 1) * strides + columns - x.shape[2] - padding

    def lay_x(x: jax.Array) -> jax.Array:
        places = ((0, 0, 0), (padding, after[0], 0), (padding, after[1], 0), (0, 0, 0))
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), places)
        x = jnp.stack([x[:, first : first + seen] for first in range(0, bands * pitch, pitch)])
        return x.transpose(4, 2, 3, 0, 1).reshape(channels, seen, -1, bands * n)

    def lay_g(g: jax.Array) -> jax.Array:
        g = jnp.pad(g, ((0, 0), (0, bands * band - height), (0, 0), (0, 0))).reshape(n, bands, band, width, features)
        return g.transpose(2, 3, 1, 0, 4).reshape(band, width, bands * n, features)

    return _kernel_grad_of_copies(x, g, lay_x, lay_g, strides)


def _has_numbers(*arrays: jax.Array) -> bool:
    """Whether all sides are known, which in a program that is exported they may not be, and none is 0."""
    return all(isinstance(side, int) and side for array in arrays for side in array.shape)


def _not_before(x: jax.Array, g: jax.Array) -> jax.Array:
    """x plus a zero that depends on g, and so not to be had before g is.

    Otherwise XLA makes a copy of x in the forward pass already, or keeps x itself beside what it was computed from, in
    every layer, until the backward pass takes it. (An optimization_barrier does not help: XLA drops it before it orders
    the operations.)
    """
    return x + 0 * g[0, 0, 0, 0]


def _kernel_grad_by_product(x: jax.Array, g: jax.Array) -> jax.Array:
    """(N, H, W, C), (N, H, W, O) -> (1, 1, C, O), of x's dtype: the gradient of a convolution that is a product.

    The pixels are one axis first, or XLA would make transposed copies of the maps. And Eigen is up to twice as fast if
    the result has no more rows than columns: of fewer features than channels it is (O, C), and transposed at the end
    in a function that is not inlined, or XLA would make a product (C, O) of both again.
    """
    x, g = x.reshape(-1, x.shape[3]), g.reshape(-1, g.shape[3])
    if g.shape[1] >= x.shape[1]:
        return _product(x, g, ((0,), (0,)))[None, None]
    (kernel,) = copies(jnp.transpose, [_product(g, x, ((0,), (0,)))])
    return kernel[None, None]


def _kernel_grad_of_copies(
    x: jax.Array,
    g: jax.Array,
    lay_x: Callable[[jax.Array], jax.Array],
    lay_g: Callable[[jax.Array], jax.Array],
    strides: int,
) -> jax.Array:
    """The gradient with respect to a kernel as a convolution, whose input channels are the N images, or bands of them.

    Args:
      x: any, the input.
      g: any, the gradient at the output.
      lay_x: gives what g sees of x, (C, (H' - 1) strides + KH, (W' - 1) strides + KW, N), padded: if XLA were to pad,
        it would take a hundred times longer where g is larger than x.
      lay_g: gives (H', W', N, O).
      strides: of both axes.

    Returns:
      (KH, KW, C, O), of x's dtype.
    """
    (x,), (g,) = copies(lay_x, [_not_before(x, g)]), copies(lay_g, [g])
    kernel = jax.lax.conv_general_dilated(
        x, g, (1, 1), "VALID", rhs_dilation=(strides, strides), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return kernel.transpose(1, 2, 0, 3)


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
    """Convolves (cross-correlates) as `jax.lax.conv_general_dilated` does, faster on CPU.

    There, in float32, 3x3 and 2x2 convolutions, and a ResNet's stem forward, are those of `jaxseg.winograd`, where it
    pays, which rounds a little more. XLA's CPU backend is faster on the gradient with respect to the kernel if the
    arrays are laid for it first, and, with a stride, if images and bands of them come in eights; that with respect to
    the input is faster as a matrix product where there are many channels or a stride. A number that is not finite may
    make all of the output and of both gradients NaN. Reverse-mode differentiation only.

    Args:
      x: (N, H, W, C) float.
      kernel: (KH, KW, C, O) float, HWIO, of x's dtype.
      strides: of both axes.
      padding: zeros added on each of the four sides.

    Returns:
      (N, (H + 2 padding - KH) // strides + 1, (W + 2 padding - KW) // strides + 1, O), of x's dtype.

    Source: equals PyTorch's `Conv2d(C, O, (KH, KW), strides, padding, bias=False)` with kernel.transpose(3, 2, 0, 1).
    """
    if not winograd_pays(x, kernel.shape, strides, padding):
        return _plain_conv(x, kernel, strides, padding)
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: winograd(x, kernel, strides, padding),
        default=lambda x, kernel: _plain_conv(x, kernel, strides, padding),
    )


def _conv_forward(x: jax.Array, kernel: jax.Array, strides: int, padding: int):
    return conv(x, kernel, strides, padding), (x, kernel)


def _conv_backward(strides: int, padding: int, inputs: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = inputs

    def input_grad_plain(kernel: jax.Array, g: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda x: _plain_conv(x, kernel, strides, padding), x)(g)[0]

    def input_grad_on_cpu(kernel: jax.Array, g: jax.Array, kernel_grad: jax.Array) -> jax.Array:
        # It waits for the kernel's: then x can be freed first, which matters in the head, whose maps are the largest.
        if kernel.shape[:2] == (1, 1):
            kernel += 0 * kernel_grad[0, 0, 0, 0]
        if strides == 1 and winograd_pays(g, kernel.shape, strides, kernel.shape[0] - 1 - padding):
            return winograd_input_grad(g, kernel, padding)
        # A wide map of few channels has no need of products: nine times the gradient is much to write. Of a map that is
        # empty or of unknown size there can be none.
        if (strides == 1 and x.shape[3] <= _MANY_CHANNELS) or not _has_numbers(g):
            return input_grad_plain(kernel, g)
        return _input_grad_by_products(g, kernel, (x.shape[1], x.shape[2]), strides, padding)

    kernel_grad = jax.lax.platform_dependent(
        x,
        g,
        cpu=lambda x, g: _kernel_grad_on_cpu(x, g, kernel.shape, strides, padding),
        default=lambda x, g: _kernel_grad_plain(x, g, kernel.shape, strides, padding),
    )
    x_grad = jax.lax.platform_dependent(
        kernel, g, kernel_grad, cpu=input_grad_on_cpu, default=lambda kernel, g, _: input_grad_plain(kernel, g)
    )
    return x_grad, kernel_grad


conv.defvjp(_conv_forward, _conv_backward)


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


def _kernel_to_blocks_once(kernel: jax.Array) -> jax.Array:
    """`_kernel_to_blocks`, written to memory once; otherwise XLA moves the taps again in each of Winograd's sums."""
    return copies(_kernel_to_blocks, [kernel])[0]


def _kernel_from_blocks(blocks: jax.Array) -> jax.Array:
    """The inverse of `_kernel_to_blocks`."""
    channels, features = blocks.shape[2], blocks.shape[3] // 4
    taps = blocks.reshape(2, 2, channels, 2, 2, features).transpose(0, 3, 1, 4, 2, 5)
    return taps[:, ::-1, :, ::-1].reshape(4, 4, channels, features)


def _pairs(y: jax.Array) -> jax.Array:
    """(N, 2 H, 2 W, O) -> (N, H + 1, 2, W + 1, 2 O): pairs of rows and columns; the first half is outside, and 0."""
    n, height, width, features = y.shape
    y = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return y.reshape(n, height // 2 + 1, 2, width // 2 + 1, 2 * features)


def _to_blocks(y: jax.Array) -> jax.Array:
    """(N, 2 H, 2 W, O) -> (N, H + 1, W + 1, 4 O): blocks of 2x2, the first half outside; there it is 0."""
    pairs = _pairs(y)
    return jnp.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=-1)


def _to_blocks_of_images(y: jax.Array) -> jax.Array:
    """(N, 2 H, 2 W, O) -> (H + 1, W + 1, N, 4 O): the same in another order, faster than in two steps."""
    n, height, width, features = y.shape
    return _pairs(y).transpose(1, 3, 0, 2, 4).reshape(height // 2 + 1, width // 2 + 1, n, 4 * features)


def _from_blocks(blocks: jax.Array) -> jax.Array:
    """(N, H + 1, W + 1, 4 O) -> (N, 2 H, 2 W, O): what is outside is cut."""
    n, height, width, channels = blocks.shape
    blocks = blocks.reshape(n, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(n, 2 * height, 2 * width, channels // 4)[:, 1:-1, 1:-1]


def _from_blocks_once(blocks: jax.Array) -> jax.Array:
    """`_from_blocks`, written to memory once.

    Otherwise XLA moves the pixels again in each operation that reads them, three of them a batch norm's.
    """
    return copies(_from_blocks, [blocks])[0]


def _plain_conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _conv_transpose_on_cpu(
    x: jax.Array, kernel: jax.Array, from_blocks: Callable[[jax.Array], jax.Array] = _from_blocks
) -> jax.Array:
    channels, features = kernel.shape[2:]
    if winograd_pays(x, (2, 2, channels, 4 * features), 1, 1):
        return from_blocks(winograd(x, _kernel_to_blocks_once(kernel), 1, 1))
    # Of so many channels the kernel is what takes long to lay anew. On a map smaller than the kernel XLA's own takes
    # twenty times longer; nor may the size be known, in a program that is exported.
    has_room = all(
        isinstance(side, int) and side >= length for side, length in zip(x.shape[1:3], kernel.shape[:2], strict=True)
    )
    if x.shape[3] > _MANY_CHANNELS and has_room:
        return _plain_conv_transpose(x, kernel)
    return from_blocks(_plain_conv(x, _kernel_to_blocks(kernel), 1, 1))


def _turn(kernel: jax.Array) -> jax.Array:
    """(4, 4, C, O), a transposed convolution's -> (4, 4, O, C), that of the convolution which it transposes."""
    return kernel[::-1, ::-1].transpose(0, 1, 3, 2)


def _transposed_input_grad_on_cpu(g: jax.Array, kernel: jax.Array) -> jax.Array:
    n, height, width, features = g.shape
    channels = kernel.shape[2]
    blocks = jax.ShapeDtypeStruct((n, height // 2 + 1, width // 2 + 1, 4 * features), g.dtype)
    # With fewer channels laying g in blocks takes what is won.
    if channels >= 128 and winograd_pays(blocks, (2, 2, channels, 4 * features), 1, 0):
        return winograd_input_grad(_to_blocks(g), _kernel_to_blocks_once(kernel), 1)
    return _plain_conv(g, _turn(kernel), 2, 1)


def _transposed_kernel_grad_on_cpu(x: jax.Array, g: jax.Array) -> jax.Array:
    channels, features = x.shape[3], g.shape[3]
    shape = 2, 2, channels, 4 * features
    if winograd_pays(x, shape, 1, 1, kernel_grad=True):
        return _kernel_from_blocks(winograd_kernel_grad(x, _to_blocks(g), 2, 1))
    if not _has_numbers(x, g):
        return _kernel_from_blocks(_kernel_grad_plain(x, _to_blocks(g), shape, 1, 1))

    def lay_x(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).transpose(3, 1, 2, 0)

    return _kernel_from_blocks(_kernel_grad_of_copies(x, g, lay_x, _to_blocks_of_images, 1))


@jax.custom_vjp
def conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Doubles height and width with the transposed convolution of kernel 4, stride 2 and padding 1.

    XLA's CPU backend is slow on a convolution with a dilated input, and twenty times slower on its gradients. There a
    convolution that gives blocks of 2x2 pixels takes its place, in float32 that of `jaxseg.winograd` where it pays; if
    not, one of many channels stays what it is. The kernel's gradient is that of the convolution by blocks; so is the
    input's where it pays, and otherwise a plain convolution with stride 2. A number that is not finite may make all of
    the output and of both gradients NaN. Reverse-mode differentiation only.

    Args:
      x: (N, H, W, C) float, H and W at least 1.
      kernel: (4, 4, C, O) float, HWIO, of x's dtype.

    Returns:
      (N, 2 H, 2 W, O), of x's dtype.

    Source: equals `jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")`, which does not flip the kernel. PyTorch's
      `ConvTranspose2d(C, O, 4, stride=2, padding=1)` does: its weight (C, O, 4, 4) is
      `kernel[::-1, ::-1].transpose(2, 3, 0, 1)`.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_conv_transpose_on_cpu, default=_plain_conv_transpose)


def _conv_transpose_forward(x: jax.Array, kernel: jax.Array):
    # In training the backward pass of what follows, a batch norm or a ReLU, reads the output, too.
    on_cpu = functools.partial(_conv_transpose_on_cpu, from_blocks=_from_blocks_once)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=_plain_conv_transpose), (x, kernel)


def _conv_transpose_backward(inputs: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = inputs

    def kernel_grad_plain(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda kernel: _plain_conv_transpose(x, kernel), kernel)(g)[0]

    x_grad = jax.lax.platform_dependent(
        g, kernel, cpu=_transposed_input_grad_on_cpu, default=lambda g, kernel: _plain_conv(g, _turn(kernel), 2, 1)
    )
    kernel_grad = jax.lax.platform_dependent(x, g, cpu=_transposed_kernel_grad_on_cpu, default=kernel_grad_plain)
    return x_grad, kernel_grad


conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)

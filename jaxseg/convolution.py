"""Convolution and transposed convolution as functions, fast forward and backward on CPU and GPU."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

# Between these XLA's own gradients of a kernel are the fastest on a CPU. With fewer channels they run in one thread;
# with more a map is so small, or so short of pixels, that its gradients as products may copy it for every tap.
_FEW_CHANNELS, _MANY_CHANNELS = 64, 256
# XLA's CPU backend takes a row of the output at a time, and another thread for each 2 to 2.4 million multiplications.
_NARROW = 3e6
# What two threads must have to do on the images side by side to gain more than the copies cost, which are the dearer
# the fewer taps a value has: multiplications in a row of all images, times taps.
_WORTH_A_COPY = 9e8
# Bytes of a gradient at all row offsets, of several images, that are copied for one product of a kernel's gradient.
_COPIED_AT_ONCE = 2**26


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


def _side_by_side(x: jax.Array, kernel: jax.Array, strides: int, padding: int) -> jax.Array:
    """`_plain_conv` of one image that has all images beside each other, with zeros between them."""
    n, height, width, channels = x.shape
    columns, features = kernel.shape[1], kernel.shape[3]
    # A multiple of the stride, so that each image meets the kernel as it would alone.
    pitch = -(-(width + padding) // strides) * strides
    x = jnp.pad(x.transpose(1, 0, 2, 3), ((0, 0), (0, 0), (0, pitch - width), (0, 0)))
    y = jax.lax.conv_general_dilated(
        x.reshape(1, height, n * pitch, channels),
        kernel,
        (strides, strides),
        [(padding, padding), (padding, columns - strides - padding)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y.reshape(y.shape[1], n, pitch // strides, features)
    return y[:, :, : (width + 2 * padding - columns) // strides + 1].transpose(1, 0, 2, 3)


def _is_narrow(x: jax.Array, kernel: jax.Array, strides: int, padding: int) -> bool:
    """Whether a CPU computes `_plain_conv` of these in one thread, and `_side_by_side` in several."""
    n, height, width, _ = x.shape
    rows, columns, _, features = kernel.shape
    # The images must not need more room beside each other than alone; nor is a program's size known that is exported.
    known = all(isinstance(length, int) for length in x.shape)
    if not known or n == 1 or padding + strides > columns or height < rows or width < columns:
        return False
    taps = math.prod(kernel.shape[:3])
    row = ((width + 2 * padding - columns) // strides + 1) * taps * features
    return row < _NARROW and n * row * taps >= _WORTH_A_COPY


def _conv_on_cpu(x: jax.Array, kernel: jax.Array, strides: int, padding: int) -> jax.Array:
    form = _side_by_side if _is_narrow(x, kernel, strides, padding) else _plain_conv
    return form(x, kernel, strides, padding)


def _any_conv(x: jax.Array, kernel: jax.Array, strides: int, padding: int) -> jax.Array:
    """`_plain_conv`, in the form that suits the platform."""
    if not _is_narrow(x, kernel, strides, padding):
        return _plain_conv(x, kernel, strides, padding)
    side_by_side, plain = (functools.partial(f, strides=strides, padding=padding) for f in (_side_by_side, _plain_conv))
    return jax.lax.platform_dependent(x, kernel, cpu=side_by_side, default=plain)


def _kernel_grad_plain(x: jax.Array, g: jax.Array, shape: tuple[int, ...], strides: int, padding: int) -> jax.Array:
    """The gradient of `_plain_conv` with respect to its kernel, of this shape, as XLA computes it."""
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda kernel: _plain_conv(x, kernel, strides, padding), kernel)(g)[0]


def _wide_product(a: jax.Array, b: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """Contracts these axes of a with those of b, in float32 at least."""
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _product(a: jax.Array, b: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """`_wide_product`, of a's dtype."""
    return _wide_product(a, b, axes).astype(a.dtype)


def _some_at_a_time(x: jax.Array, g: jax.Array, size: tuple[int, int]) -> list[tuple[jax.Array, jax.Array]]:
    """Both for some images after the others, so few that g at all row offsets is no more than `_COPIED_AT_ONCE`."""
    # A 1x1 kernel needs no copies. A program that is exported may not know how many images there are.
    if size == (1, 1) or not all(isinstance(length, int) for length in g.shape):
        return [(x, g)]
    step = max(_COPIED_AT_ONCE // (size[0] * math.prod(g.shape[1:]) * g.dtype.itemsize), 1)
    return [(x[first : first + step], g[first : first + step]) for first in range(0, len(g), step)]


def _kernel_grad_by_products(x: jax.Array, g: jax.Array, size: tuple[int, int], strides: int, padding: int):
    """The gradient of `conv` with respect to its kernel, `sum x[s i + u, s j + v] g[i, j]`, as matrix products.

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
        total = jnp.zeros(())
        for x_part, g_part in _some_at_a_time(x, g, size):
            x_part = jax.lax.pad(x_part, zero, ((0, 0, 0), (padding, padding, 0), (padding, padding, 0), (0, 0, 0)))
            by_column = jnp.concatenate([x_part[:, :, v : v + width] for v in range(columns)], axis=-1)
            shifts = [((0, 0, 0), (u, rows - 1 - u, 0), (0, 0, 0), (0, 0, 0)) for u in range(rows)]
            by_row = jnp.concatenate([jax.lax.pad(g_part, zero, shift) for shift in shifts], axis=-1)
            by_column, by_row = (a.reshape(-1, a.shape[3]) for a in (by_column, by_row))
            total += _wide_product(by_column.T, by_row, ((1,), (0,)))
            # The next images' copies wait for this product.
            zero = (0 * total[0, 0]).astype(x.dtype)
        return total.astype(x.dtype).reshape(columns, channels, rows, out_channels).transpose(2, 0, 1, 3)
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

    XLA's CPU backend runs the gradient with respect to the kernel, of few channels, very many or with a stride, at a
    tenth to a half of the forward pass's speed, and a matrix product over shifted inputs is up to three times as fast;
    so is one for the gradient with respect to the input where there are many channels or a stride. Of narrow maps it
    computes a row in a single thread: there the images of a batch are laid side by side. Reverse-mode differentiation
    only.

    Args:
      x: (N, H, W, C) float.
      kernel: (KH, KW, C, O) float, HWIO, of x's dtype.
      strides: of both axes.
      padding: zeros added on each of the four sides.

    Returns:
      (N, (H + 2 padding - KH) // strides + 1, (W + 2 padding - KW) // strides + 1, O), of x's dtype.

    Source: equals PyTorch's `Conv2d(C, O, (KH, KW), strides, padding, bias=False)` with kernel.transpose(3, 2, 0, 1).
    """
    return _any_conv(x, kernel, strides, padding)


def _conv_forward(x: jax.Array, kernel: jax.Array, strides: int, padding: int):
    return _any_conv(x, kernel, strides, padding), (x, kernel)


def _conv_backward(strides: int, padding: int, inputs: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = inputs

    def input_grad_plain(kernel: jax.Array, g: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda x: _plain_conv(x, kernel, strides, padding), x)(g)[0]

    def input_grad_on_cpu(kernel: jax.Array, g: jax.Array) -> jax.Array:
        # A wide map of few channels has no need of products: nine times the gradient is much to write.
        if strides == 1 and x.shape[3] < _MANY_CHANNELS:
            return jax.linear_transpose(lambda x: _conv_on_cpu(x, kernel, strides, padding), x)(g)[0]
        return _input_grad_by_products(g, kernel, (x.shape[1], x.shape[2]), strides, padding)

    kernel_grad_plain = functools.partial(_kernel_grad_plain, shape=kernel.shape, strides=strides, padding=padding)

    def kernel_grad_on_cpu(x: jax.Array, g: jax.Array) -> jax.Array:
        rows, columns, channels, _ = kernel.shape
        # Where the output is larger than the input, XLA's own takes a hundred times longer.
        same_size = strides == 1 and rows == columns == 2 * padding + 1 > 1
        if same_size and _FEW_CHANNELS < channels <= _MANY_CHANNELS:
            return kernel_grad_plain(x, g)
        return _kernel_grad_by_products(x, g, (rows, columns), strides, padding)

    return (
        jax.lax.platform_dependent(kernel, g, cpu=input_grad_on_cpu, default=input_grad_plain),
        jax.lax.platform_dependent(x, g, cpu=kernel_grad_on_cpu, default=kernel_grad_plain),
    )


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
    return _from_blocks(_conv_on_cpu(x, _kernel_to_blocks(kernel), 1, 1))


def _turn(kernel: jax.Array) -> jax.Array:
    """(4, 4, C, O), a transposed convolution's -> (4, 4, O, C), that of the convolution which it transposes."""
    return kernel[::-1, ::-1].transpose(0, 1, 3, 2)


def _transposed_kernel_grad_on_cpu(x: jax.Array, g: jax.Array) -> jax.Array:
    channels, features = x.shape[3], g.shape[3]
    if _FEW_CHANNELS <= channels <= _MANY_CHANNELS:
        return _turn(_kernel_grad_plain(g, x, (4, 4, features, channels), 2, 1))
    return _kernel_from_blocks(_kernel_grad_by_products(x, _to_blocks(g), (2, 2), 1, 1))


@jax.custom_vjp
def conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Doubles height and width with the transposed convolution of kernel 4, stride 2 and padding 1.

    XLA's CPU backend is slow on a convolution with a dilated input, and twenty times slower on its gradients. There a
    convolution that gives blocks of 2x2 pixels takes its place; the input's gradient is a plain convolution with stride
    2, and the kernel's that convolution's own or, of few or very many channels, a matrix product. Reverse-mode
    differentiation only.

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

    x_grad = _any_conv(g, _turn(kernel), 2, 1)
    kernel_grad = jax.lax.platform_dependent(x, g, cpu=_transposed_kernel_grad_on_cpu, default=kernel_grad_plain)
    return x_grad, kernel_grad


conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)

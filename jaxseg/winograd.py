"""Winograd's F(4, 3), F(3, 2) and F(3, 4) along the rows: convolutions with fewer multiplications, for CPUs."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxseg.cpu import copies

# A few outputs of a filter of a few taps are the transpose of a product of polynomials, which its values at as many
# points as it has coefficients determine: a multiplication for each. F(4, 3) has four outputs, three taps and takes
# six multiplications instead of twelve; F(3, 2) four instead of six. A 7x7 kernel with stride 2 sees four pairs of
# rows, one row of them in vain: F(3, 4) takes 2 x 6 multiplications instead of 3 x 7.


class _Form(NamedTuple):
    """How rows are added, with which weights.

    Attributes:
      of_input: for each point, rows of the input.
      of_kernel: for each point, those of the kernel.
      of_output: for each output of a tile, the products at the points.
    """

    of_input: tuple[tuple[float, ...], ...]
    of_kernel: tuple[tuple[float, ...], ...]
    of_output: tuple[tuple[float, ...], ...]


_OF_INPUT_AT_SIX = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
# By the number of taps: F(3, 2) at 0, 1, -1 and infinity, F(4, 3) and F(3, 4) at 0, 1, -1, 2, -2 and infinity.
_FORMS = {
    2: _Form(
        ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, -1, 0, 1)),
        ((1, 0), (1 / 2, 1 / 2), (1 / 2, -1 / 2), (0, 1)),
        ((1, 1, 1, 0), (0, 1, -1, 0), (0, 1, 1, 1)),
    ),
    3: _Form(
        _OF_INPUT_AT_SIX,
        (
            (1 / 4, 0, 0),
            (-1 / 6, -1 / 6, -1 / 6),
            (-1 / 6, 1 / 6, -1 / 6),
            (1 / 24, 1 / 12, 1 / 6),
            (1 / 24, -1 / 12, 1 / 6),
            (0, 0, 1),
        ),
        ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
    ),
    4: _Form(
        _OF_INPUT_AT_SIX,
        (
            (1 / 4, 0, 0, 0),
            (-1 / 6, -1 / 6, -1 / 6, -1 / 6),
            (-1 / 6, 1 / 6, -1 / 6, 1 / 6),
            (1 / 24, 1 / 12, 1 / 6, 1 / 3),
            (1 / 24, -1 / 12, 1 / 6, -1 / 3),
            (0, 0, 0, 1),
        ),
        ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 1)),
    ),
}
# By the number of taps, without strides: with fewer channels there is more to add than to multiply.
_FEWEST_CHANNELS = {2: 64, 3: 32}
# Adding is fast only within the processor's cache: so many bytes of the map are worked on at a time.
_AT_ONCE = 6 * 2**20
# Each group of images is compiled for itself.
_MOST_GROUPS = 4
# A stem's products take ten times as many bytes as its images; of more than these that would be much memory.
_LARGEST_IMAGES = 24 * 2**20


def winograd_pays(
    x: jax.Array | jax.ShapeDtypeStruct,
    shape: tuple[int, ...],
    strides: int,
    padding: int,
    kernel_grad: bool = False,
) -> bool:
    """Whether a CPU is faster on a convolution in the form of this module.

    As measured: there must be twice as many pixels as channels, or adding the kernel's rows takes longer than the
    products; a map that fits into the cache, or does in a few groups of images, or so many channels that there is more
    to multiply than to add (not so for the kernel's gradient, whose sums are copied, too); not so few channels that it
    is the other way round; and tiles that exceed the output's height by no more than half. The map must be no smaller
    than the kernel. With strides only the forward pass of a ResNet's stem pays: three channels, 7x7, stride 2, padding
    3, an even height, and images that are not so large that the products take much memory. In bfloat16 the sums would
    lose too much, and a program that is exported may not know its sizes.

    Args:
      x: (N, H, W, C), the input, or, without strides, for the gradient with respect to it that at the output.
      shape: (KH, KW, C, O) of the kernel.
      strides: of both axes.
      padding: on each of the four sides; for the gradient at the output K - 1 minus the convolution's.
      kernel_grad: whether it is the gradient with respect to the kernel, and not the convolution.
    """
    known = all(isinstance(length, int) for length in (*x.shape, *shape))
    if not known or 0 in x.shape or x.dtype != jnp.float32:
        return False
    n, height, width, channels = x.shape
    if strides != 1:
        is_stem = (*shape[:3], strides, padding) == (7, 7, 3, 2, 3) and shape[3] >= 32 and not kernel_grad
        is_large = 4 * math.prod(x.shape) > _LARGEST_IMAGES
        return is_stem and height % 2 == 0 and min(height, width) >= 7 and not is_large
    taps, columns = shape[:2]
    if taps != columns or taps not in _FEWEST_CHANNELS or not 0 <= padding < taps:
        return False
    outputs = height + 2 * padding - taps + 1
    tile = len(_FORMS[taps].of_output)
    fits = 4 * height * width * channels <= _AT_ONCE and _groups(x) <= _MOST_GROUPS
    return (
        (fits or (channels >= 128 and not kernel_grad))
        and min(shape[2:]) >= _FEWEST_CHANNELS[taps]
        and min(height, width) >= taps
        and n * height * width >= 2 * channels
        and 2 * tile * _tiles(outputs, tile) <= 3 * outputs
    )


def winograd(x: jax.Array, kernel: jax.Array, strides: int, padding: int) -> jax.Array:
    """Convolves as `conv(x, kernel, strides, padding)` does; the errors of rounding are some three times as large.

    A value that is not finite reaches all outputs of its tiles, or all there are.

    Args:
      x: (N, H, W, C) float32, H + 2 padding and W + 2 padding at least K; with a stride of 2 H is even.
      kernel: (K, K, C, O) float32, HWIO; K is 2 or 3, with a stride of 2 it is 7.
      strides: of both axes, 1 or 2.
      padding: zeros added on each of the four sides, fewer than K.

    Returns:
      (N, (H + 2 padding - K) // strides + 1, (W + 2 padding - K) // strides + 1, O) float32.

    Source: Lavin and Gray 2016, "Fast algorithms for convolutional neural networks", along one axis.
    """
    outputs, before = (x.shape[1] + 2 * padding - len(kernel)) // strides + 1, padding
    if strides == 2:
        # Where an output sees an odd row first, its first pair has a row more, which weighs nothing; else its last.
        odd = padding % 2
        kernel = jnp.pad(kernel, ((odd, (odd + len(kernel)) % 2), (0, 0), (0, 0), (0, 0)))
        x, kernel = _pairs_of_rows(x), jnp.moveaxis(_pairs_of_rows(jnp.moveaxis(kernel, 3, 0)), 0, 3)
        before = (padding + odd) // 2
    return _convolve(x, functools.partial(_of_kernel, kernel), len(kernel), outputs, (before, padding), strides)


def winograd_input_grad(g: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    """The gradient of `winograd` without strides with respect to its input: a convolution with the kernel turned.

    Args:
      g: (N, H', W', O) float32, the gradient at the output.
      kernel: (K, K, C, O) float32, HWIO.
      padding: that of the convolution.

    Returns:
      (N, H, W, C) float32.
    """
    taps, padding = len(kernel), len(kernel) - 1 - padding
    outputs = g.shape[1] + 2 * padding - taps + 1

    def kernels(after: jax.Array) -> list[jax.Array]:
        return copies(lambda kernel: kernel[:, ::-1].transpose(0, 1, 3, 2), _of_kernel(kernel[::-1], after))

    return _convolve(g, kernels, taps, outputs, (padding, padding))


def winograd_kernel_grad(x: jax.Array, g: jax.Array, taps: int, padding: int) -> jax.Array:
    """The gradient of `winograd` without strides with respect to its kernel: the tiles are convolutions' channels.

    A value that is not finite may reach all of it.

    Args:
      x: (N, H, W, C) float32, the input.
      g: (N, H', W', O) float32, the gradient at the output.
      taps: K of the kernel.
      padding: that of the convolution.

    Returns:
      (K, K, C, O) float32.
    """
    form, groups = _FORMS[taps], _groups(x)
    tile = len(form.of_output)
    tiles = _tiles(g.shape[1], tile)

    def products(x: jax.Array, g: jax.Array, zero: jax.Array) -> list[jax.Array]:
        inputs = _sums(form.of_input, _rows(x, tiles, tile, tile + taps - 1, (padding, padding), zero))
        outputs = _sums(_transpose(form.of_output), _rows(g, tiles, tile, tile, (0, 0), 0.0))
        inputs = copies(lambda x: _tiles_together(x).transpose(2, 1, 0)[:, None], inputs)
        outputs = copies(lambda g: _tiles_together(g).transpose(1, 0, 2)[None], outputs)
        return [_conv_of_rows(x, g, 0) for x, g in zip(inputs, outputs, strict=True)]

    # A zero that is not known before g is: otherwise XLA adds the rows of x in the forward pass already. And one group
    # waits for the other.
    totals, zero = [jnp.zeros((), x.dtype)] * len(form.of_input), 0 * g[0, 0, 0, 0]
    for group in zip(_in_groups(x, groups), _in_groups(g, groups), strict=True):
        totals = [total + product for total, product in zip(totals, products(*group, zero), strict=True)]
        zero = 0 * totals[0][0, 0, 0, 0]
    return jnp.concatenate(_sums(_transpose(form.of_kernel), totals), axis=1).transpose(1, 2, 0, 3)


def _groups(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Into how many groups of as many images a map is divided, so that a group fits into the cache, or is one image."""
    n, size = x.shape[0], 4 * math.prod(x.shape)
    return next(groups for groups in range(1, n + 1) if n % groups == 0 and (groups == n or size <= groups * _AT_ONCE))


def _in_groups(x: jax.Array, groups: int) -> jax.Array:
    return x.reshape(groups, -1, *x.shape[1:])


def _tiles(outputs: int, tile: int) -> int:
    """How many tiles cover so many rows."""
    return -(-outputs // tile)


def _rows(
    x: jax.Array, tiles: int, tile: int, number: int, padding: tuple[int, int], zero: jax.Array | float
) -> list[jax.Array]:
    """The first row of each tile, the second, ..., as many as asked for.

    Before the first one there are as many rows of zeros as `padding` says, and after the last one what is missing; and
    zeros at both ends of each row.
    """
    n, height = x.shape[:2]
    before, ends = padding
    last = (tiles - 1) * tile
    places = ((0, 0, 0), (before, last + number - before - height, 0), (ends, ends, 0), (0, 0, 0))
    x = jax.lax.pad(x, jnp.asarray(zero, x.dtype), places)
    return [
        jax.lax.slice(x, (0, row, 0, 0), (n, row + last + 1, *x.shape[2:]), (1, tile, 1, 1)) for row in range(number)
    ]


def _sums(weights: Sequence[Sequence[float]], terms: Sequence[jax.Array]) -> list[jax.Array]:
    """For each of the weights' rows the terms' sum."""

    def total(weights: Sequence[float]) -> jax.Array:
        # Not jnp's operators, which take longer to trace: a network has a thousand of these.
        weighted = [
            term if weight == 1 else jax.lax.mul(term.dtype.type(weight), term)
            for weight, term in zip(weights, terms, strict=True)
            if weight
        ]
        return functools.reduce(jax.lax.add, weighted)

    return [total(row) for row in weights]


def _transpose(weights: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    return tuple(zip(*weights, strict=True))


def _of_kernel(kernel: jax.Array, after: jax.Array) -> list[jax.Array]:
    """(K, L, C, O) -> for each point (1, L, C, O), which XLA cannot compute before `after`, to keep them."""
    zero = 0 * after[0, 0, 0, 0]
    return _sums(_FORMS[len(kernel)].of_kernel, [row + zero for row in jnp.split(kernel, len(kernel))])


def _conv_of_rows(x: jax.Array, kernel: jax.Array, padding: int, strides: int = 1) -> jax.Array:
    """A convolution with a kernel of one row."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, strides), [(0, 0), (padding, padding)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _convolve(
    x: jax.Array,
    kernels: Callable[[jax.Array], list[jax.Array]],
    taps: int,
    outputs: int,
    padding: tuple[int, int],
    strides: int = 1,
) -> jax.Array:
    """So many rows of outputs, in groups of images, one after the other.

    `kernels` gives those of the points, not before the array that it is given. Before the first row of x there are
    `padding[0]` rows of zeros, at both ends of each row `padding[1]` zeros; `strides` are along the rows.
    """
    form = _FORMS[taps]
    tile = len(form.of_output)
    tiles = _tiles(outputs, tile)
    groups = _groups(x)
    # A stem's image of three channels is small; groups for its outputs' sake are slower.
    if strides != 1 or groups > _MOST_GROUPS:
        groups = 1
    of_points: list[jax.Array] = []
    parts: list[jax.Array] = []
    for part in _in_groups(x, groups):
        # A group waits for a zero of the one before. (A `lax.map` would keep the map and the output twice.)
        part = part + 0 * parts[-1][0, 0, 0, 0] if parts else part
        inputs = _sums(form.of_input, _rows(part, tiles, tile, tile + taps - 1, (padding[0], 0), 0.0))
        # They wait for the first sum, not for x, whose expression XLA may repeat in the loop over a kernel's rows: that
        # would then be another one in each layer, and be compiled each time.
        of_points = of_points or kernels(inputs[0])
        products = [_conv_of_rows(x, kernel, padding[1], strides) for x, kernel in zip(inputs, of_points, strict=True)]
        n, _, width, features = products[0].shape
        rows = jnp.stack(_sums(form.of_output, products), axis=2).reshape(n, tiles * tile, width, features)
        parts.append(rows[:, :outputs])
    return jnp.concatenate(parts)


def _pairs_of_rows(x: jax.Array) -> jax.Array:
    """(N, 2 H, W, C) -> (N, H, W, 2 C)."""
    n, height, width, channels = x.shape
    return (
        x.reshape(n, height // 2, 2, width, channels)
        .transpose(0, 1, 3, 2, 4)
        .reshape(n, height // 2, width, 2 * channels)
    )


def _tiles_together(x: jax.Array) -> jax.Array:
    """(N, T, W, C) -> (N T, W, C)."""
    return x.reshape(-1, *x.shape[2:])

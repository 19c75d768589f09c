"""Winograd's F(4, 3) along the rows: 3x3 convolutions and their gradients with half the multiplications, for CPUs."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxseg.cpu import GATHERED_AT_ONCE, copies

# Four outputs of a filter of three taps are the transpose of a product of polynomials, which its values at 0, 1, -1, 2,
# -2 and infinity determine: six multiplications, not twelve. For each of the six, how rows of the input are added, and
# how those of the kernel; for each of the four outputs, how the six products are.
_OF_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_OF_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OF_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_TILE = len(_OF_OUTPUT)
# Adding is fast only within the processor's cache: so many bytes of the map are worked on at a time.
_AT_ONCE = 6 * 2**20
# Each group of images is compiled for itself.
_MOST_GROUPS = 4


def winograd_pays(x: jax.Array, shape: tuple[int, ...], strides: int, padding: int, kernel_grad: bool = False) -> bool:
    """Whether a CPU is faster on a convolution in the form of this module, which has no strides.

    As measured: there must be twice as many pixels as channels, or adding the kernel's rows takes longer than the
    products; a map that fits into the cache, or does in a few groups of images, or so many channels that there is more
    to multiply than to add (not so for the kernel's gradient, whose sums are copied, too); not so few channels that it
    is the other way round; and tiles that exceed the height by no more than half. In bfloat16 the sums would lose too
    much, and a program that is exported may not know its sizes.

    Args:
      x: (N, H, W, C), the input, or the gradient at the output.
      shape: (KH, KW, C, O) of the kernel.
      strides: of both axes.
      padding: on each of the four sides.
      kernel_grad: whether it is the gradient with respect to the kernel, and not the convolution.
    """
    known = all(isinstance(length, int) for length in (*x.shape, *shape))
    if not known or 0 in x.shape or shape[:2] != (3, 3) or (strides, padding) != (1, 1) or x.dtype != jnp.float32:
        return False
    n, height, width, channels = x.shape
    fits = 4 * height * width * channels <= _AT_ONCE and _groups(x) <= _MOST_GROUPS
    return (
        (fits or (channels >= 128 and not kernel_grad))
        and min(shape[2:]) >= 32
        and width >= 3
        and n * height * width >= 2 * channels
        and 2 * _TILE * _tiles(x, kernel_grad) <= 3 * height
    )


def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves with padding 1, as `conv(x, kernel, 1, 1)` does; the errors of rounding are some three times as large.

    A value that is not finite reaches all outputs of its tiles, or all there are.

    Args:
      x: (N, H, W, C) float32.
      kernel: (3, 3, C, O) float32, HWIO.

    Returns:
      (N, H, W, O) float32.

    Source: Lavin and Gray 2016, "Fast algorithms for convolutional neural networks", along one axis.
    """
    return _by_groups(functools.partial(_convolve, kernels=_of_kernel(kernel, x)), x)


def winograd_input_grad(g: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradient of `winograd` with respect to its input, which is the convolution with the kernel turned.

    Args:
      g: (N, H, W, O) float32, the gradient at the output.
      kernel: (3, 3, C, O) float32, HWIO.

    Returns:
      (N, H, W, C) float32.
    """
    kernels = copies(lambda kernel: kernel[:, ::-1].transpose(0, 1, 3, 2), _of_kernel(kernel[::-1], g))
    return _by_groups(functools.partial(_convolve, kernels=kernels), g)


def winograd_kernel_grad(x: jax.Array, g: jax.Array) -> jax.Array:
    """The gradient of `winograd` with respect to its kernel: six convolutions whose input channels are the tiles.

    Args:
      x: (N, H, W, C) float32, the input.
      g: (N, H, W, O) float32, the gradient at the output.

    Returns:
      (3, 3, C, O) float32.
    """
    tiles, groups = _tiles(x, kernel_grad=True), _groups(x)

    def products(x: jax.Array, g: jax.Array, zero: jax.Array) -> list[jax.Array]:
        inputs = _sums(_OF_INPUT, _rows(x, tiles, _TILE + 2, 1, zero))
        outputs = _sums(tuple(zip(*_OF_OUTPUT, strict=True)), _rows(g, tiles, _TILE, 0, 0.0))
        inputs = copies(lambda x: _tiles_together(x).transpose(2, 1, 0)[:, None], inputs)
        outputs = copies(lambda g: _tiles_together(g).transpose(1, 0, 2)[None], outputs)
        return [_conv_1x3(x, g) for x, g in zip(inputs, outputs, strict=True)]

    # A zero that is not known before g is: otherwise XLA adds the rows of x in the forward pass already. And one group
    # waits for the other.
    totals, zero = [jnp.zeros((), x.dtype)] * len(_OF_INPUT), 0 * g[0, 0, 0, 0]
    for group in zip(_in_groups(x, groups), _in_groups(g, groups), strict=True):
        totals = [total + product for total, product in zip(totals, products(*group, zero), strict=True)]
        zero = 0 * totals[0][0, 0, 0, 0]
    return jnp.concatenate(_sums(tuple(zip(*_OF_KERNEL, strict=True)), totals), axis=1).transpose(1, 2, 0, 3)


def _groups(x: jax.Array) -> int:
    """Into how many groups of as many images a map is divided, so that a group fits into the cache, or is one image."""
    n, size = x.shape[0], 4 * math.prod(x.shape)
    return next(groups for groups in range(1, n + 1) if n % groups == 0 and (groups == n or size <= groups * _AT_ONCE))


def _in_groups(x: jax.Array, groups: int) -> jax.Array:
    return x.reshape(groups, -1, *x.shape[1:])


def _by_groups(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    groups = _groups(x)
    if groups == 1 or groups > _MOST_GROUPS:
        return f(x)
    parts: list[jax.Array] = []
    for part in _in_groups(x, groups):
        # One after the other: the next one waits for a zero. (A `lax.map` would keep the map and the output twice.)
        parts.append(f(part + 0 * parts[-1][0, 0, 0, 0] if parts else part))
    return jnp.concatenate(parts)


def _tiles(x: jax.Array, kernel_grad: bool) -> int:
    """How many tiles cover the height; those of a group of images come in eights if they are to be input channels."""
    multiple = GATHERED_AT_ONCE // math.gcd(x.shape[0] // _groups(x), GATHERED_AT_ONCE) if kernel_grad else 1
    return -(-x.shape[1] // (_TILE * multiple)) * multiple


def _rows(x: jax.Array, tiles: int, number: int, before: int, zero: jax.Array | float) -> list[jax.Array]:
    """The first row of each tile, the second, ..., as many as asked for, after so many rows of zeros."""
    n, height, width, channels = x.shape
    last = (tiles - 1) * _TILE
    x = jax.lax.pad(
        x, jnp.asarray(zero, x.dtype), ((0, 0, 0), (before, last + number - before - height, 0), (0, 0, 0), (0, 0, 0))
    )
    return [
        jax.lax.slice(x, (0, row, 0, 0), (n, row + last + 1, width, channels), (1, _TILE, 1, 1))
        for row in range(number)
    ]


def _sums(weights: Sequence[Sequence[float]], terms: Sequence[jax.Array]) -> list[jax.Array]:
    """For each of the weights' rows the terms' sum."""

    def total(weights: Sequence[float]) -> jax.Array:
        weighted = [
            term if weight == 1 else weight * term for weight, term in zip(weights, terms, strict=True) if weight
        ]
        return functools.reduce(jnp.add, weighted)

    return [total(row) for row in weights]


def _of_kernel(kernel: jax.Array, x: jax.Array) -> list[jax.Array]:
    """(3, 3, C, O) -> six of (1, 3, C, O), such that XLA does not compute them before x, and keep them."""
    zero = 0 * x[0, 0, 0, 0]
    return _sums(_OF_KERNEL, [kernel[row : row + 1] + zero for row in range(3)])


def _conv_1x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), [(0, 0), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolve(x: jax.Array, kernels: Sequence[jax.Array]) -> jax.Array:
    n, height, width, _ = x.shape
    tiles = _tiles(x, kernel_grad=False)
    inputs = _sums(_OF_INPUT, _rows(x, tiles, _TILE + 2, 1, 0.0))
    products = [_conv_1x3(x, kernel) for x, kernel in zip(inputs, kernels, strict=True)]
    return jnp.stack(_sums(_OF_OUTPUT, products), axis=2).reshape(n, tiles * _TILE, width, -1)[:, :height]


def _tiles_together(x: jax.Array) -> jax.Array:
    """(N, T, W, C) -> (N T, W, C)."""
    return x.reshape(-1, *x.shape[2:])

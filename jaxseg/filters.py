"""Image filtering: Gaussian and derivative kernels, and the correlation that applies them.

The convention, once: kernels are applied by cross-correlation, as in every convolutional network, with the kernel's
centre on the pixel: `output[y, x] = sum over v, u of kernel[v, u] image[y + v - KH // 2, x + u - KW // 2]` for a kernel
of KH rows and KW columns. A convolution would turn the kernel by 180 degrees first: the same for a Gaussian, the other
sign for a derivative. x grows to the right and is the second axis, y grows downwards and is the first.

Images are grey (H, W) or colour (H, W, C), channel by channel; batches are `jax.vmap`'s. uint8 is not rescaled: it
becomes float32 in 0..255.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# The deviation of the report's 3x3 Gaussian, in pixels.
REPORT_SIGMA = 1 / (2 * math.log(2))
# How an image goes on beyond its edge, named as in NumPy's `pad`; SciPy's names are reflect, mirror, nearest, wrap and
# constant, in this order. For a row `a b c d`, to the left: b a | c b | a a | c d | 0 0.
BORDERS = ("symmetric", "reflect", "edge", "wrap", "constant")

# I_x = (I(x + 1, y) - I(x - 1, y)) / 2 is a row, because x runs along rows; I_y is a column. The report prints them the
# other way round.
K_X = np.array([[-0.5, 0.0, 0.5]])
K_Y = K_X.T


def gaussian_1d(size: int = 3, sigma: float = REPORT_SIGMA) -> np.ndarray:
    """Samples exp(-x^2 / (2 sigma^2)) at whole pixels around 0 and divides by the sum.

    The factor 1 / (sqrt(2 pi) sigma) of the density would not do instead: the report's three samples then sum to 0.976.

    Args:
      size: the number of taps, odd.
      sigma: the standard deviation in pixels, above 0.

    Returns:
      (size,) float64 with sum 1, computed on the host.

    Raises:
      ValueError: the size is even or below 1, or sigma is not above 0 and finite.
    """
    _check_gaussian(size, sigma)
    return _normalised(_squares(size, sigma))


def gaussian_2d(size: int = 3, sigma: float = REPORT_SIGMA) -> np.ndarray:
    """Samples exp(-(x^2 + y^2) / (2 sigma^2)) and divides by the sum: the outer product of two `gaussian_1d`.

    Args:
      size: the number of rows and of columns, odd.
      sigma: the standard deviation in pixels, above 0.

    Returns:
      (size, size) float64 with sum 1, computed on the host.

    Raises:
      ValueError: as `gaussian_1d`.
    """
    _check_gaussian(size, sigma)
    squares = _squares(size, sigma)
    return _normalised(squares[:, None] + squares)


def correlate(image: jax.Array, kernel: ArrayLike, border: str = "symmetric") -> jax.Array:
    """Applies a 2-D kernel directly: KH KW products for each pixel.

    Args:
      image: (H, W) or (H, W, C), uint8 or float.
      kernel: (KH, KW) float, both sides odd.
      border: one of `BORDERS`.

    Returns:
      The image's shape; float32, or the image's type if it is wider.

    Raises:
      ValueError: an unknown border mode, or shapes that are not as above.

    Source: equals scipy.ndimage.correlate(image, kernel, mode=...); for SciPy's name of a mode see `BORDERS`.
    """
    kernel = jnp.asarray(kernel)
    _check(image, kernel, border)
    x = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    # The channels become the batch: all of them have the same kernel.
    channels = x[None] if x.ndim == 2 else jnp.moveaxis(x, -1, 0)
    rows, columns = (size // 2 for size in kernel.shape)
    padded = jnp.pad(channels, ((0, 0), (rows, rows), (columns, columns)), mode=border)
    # 'highest', because a GPU would otherwise round the factors to 10 bits.
    filtered = jax.lax.conv_general_dilated(
        padded[:, None], kernel[None, None].astype(x.dtype), (1, 1), "VALID", precision="highest"
    )[:, 0]
    return filtered[0] if x.ndim == 2 else jnp.moveaxis(filtered, 0, -1)


def correlate_separable(image: jax.Array, column: ArrayLike, row: ArrayLike, border: str = "symmetric") -> jax.Array:
    """Applies the kernel `outer(column, row)` as two 1-D kernels: KH + KW products for each pixel.

    Args:
      image: (H, W) or (H, W, C), uint8 or float.
      column: (KH,) float, KH odd, applied along y.
      row: (KW,) float, KW odd, applied along x.
      border: one of `BORDERS`.

    Returns:
      As `correlate(image, jnp.outer(column, row), border)`, up to rounding.

    Raises:
      ValueError: as `correlate`.
    """
    return correlate(correlate(image, jnp.asarray(row)[None], border), jnp.asarray(column)[:, None], border)


def blur(image: jax.Array, size: int = 3, sigma: float = REPORT_SIGMA, border: str = "symmetric") -> jax.Array:
    """Blurs with a Gaussian, separably; arguments, result and errors as `gaussian_1d`'s and `correlate`'s."""
    kernel = gaussian_1d(size, sigma)
    return correlate_separable(image, kernel, kernel, border)


def derivatives(image: jax.Array, border: str = "symmetric") -> tuple[jax.Array, jax.Array]:
    """Computes I_x and I_y, the central differences per pixel to the right and down; each as `correlate` returns it."""
    return correlate(image, K_X, border), correlate(image, K_Y, border)


def gradient_magnitude(image: jax.Array, border: str = "symmetric") -> jax.Array:
    """Computes sqrt(I_x^2 + I_y^2), for each channel alone; arguments, result and errors as `correlate`'s."""
    return jnp.hypot(*derivatives(image, border))


def _check_gaussian(size: int, sigma: float) -> None:
    """Raises ValueError unless the size is odd and at least 1, and sigma above 0 and finite."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"a kernel needs a centre: its size must be odd and at least 1, not {size}")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be above 0 and finite, not {sigma}")


def _squares(size: int, sigma: float) -> np.ndarray:
    """x^2 / (2 sigma^2) at whole pixels around 0; divided before squaring, so that no sigma becomes 0."""
    x = np.arange(size) - size // 2
    with np.errstate(over="ignore"):
        return (x / sigma) ** 2 / 2


def _normalised(exponent: np.ndarray) -> np.ndarray:
    kernel = np.exp(-exponent)
    return kernel / kernel.sum()


def _check(image: jax.Array, kernel: jax.Array, border: str) -> None:
    if border not in BORDERS:
        raise ValueError(f"unknown border mode {border!r}: use one of {', '.join(BORDERS)}")
    if image.ndim not in (2, 3):
        raise ValueError(f"image must be (H, W) or (H, W, C), not {image.shape}; for a batch use jax.vmap")
    if kernel.ndim != 2 or not all(size % 2 for size in kernel.shape):
        raise ValueError(f"kernel must be (KH, KW) with odd sides, not {kernel.shape}")

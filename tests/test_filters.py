"""filters.py against SciPy, and the properties that blurs and derivatives have."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxseg import filters

# Our name of each border mode, and SciPy's.
SCIPY_MODES = {"symmetric": "reflect", "reflect": "mirror", "edge": "nearest", "wrap": "wrap", "constant": "constant"}
borders = pytest.mark.parametrize("border", filters.BORDERS)
# Compiled whole, an operation is tested sooner; uncompiled, the same is tested by test_the_same_under_jit_and_vmap.
correlate = jax.jit(filters.correlate, static_argnames="border")
blur = jax.jit(filters.blur, static_argnames=("size", "sigma", "border"))
GAUSSIANS = [(size, sigma) for size in (1, 3, 9, 31) for sigma in (1e-200, 0.3, filters.REPORT_SIGMA, 1.0, 2.5, 100)]


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def photo(seed, shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_close(got, expected, tolerance=1e-5):
    """Equal within `tolerance` of the largest magnitude."""
    assert got.shape == expected.shape
    assert np.abs(np.asarray(got, np.float64) - expected).max() <= tolerance * np.abs(expected).max()


def scipy_correlate(image, kernel, border):
    """In float64, each channel alone."""
    image, mode = image.astype(np.float64), SCIPY_MODES[border]
    if image.ndim == 2:
        return ndimage.correlate(image, kernel, mode=mode)
    return np.stack([ndimage.correlate(image[..., c], kernel, mode=mode) for c in range(image.shape[2])], -1)


@borders
@pytest.mark.parametrize("image", [normal(0, (13, 17)), photo(3, (12, 7, 3))])
@pytest.mark.parametrize("size", [(3, 3), (7, 5)], ids=str)
def test_correlate_equals_scipy(image, size, border):
    kernel = normal(4, size)
    got = correlate(image, kernel, border)
    assert got.dtype == jnp.float32
    assert_close(got, scipy_correlate(image, kernel.astype(np.float64), border))


@borders
@pytest.mark.parametrize("shape", [(1, 4), (2, 3)], ids=str)
def test_correlate_equals_scipy_where_the_kernel_is_larger_than_the_image(shape, border):
    image, kernel = normal(5, shape), normal(6, (11, 9))
    assert_close(correlate(image, kernel, border), scipy_correlate(image, kernel.astype(np.float64), border))


def test_the_convention_is_cross_correlation():
    dot = np.zeros((5, 5), np.float32)
    dot[2, 2] = 1
    kernel = np.arange(9.0).reshape(3, 3)
    # A dot's response is the kernel turned by 180 degrees; under convolution it would be the kernel itself.
    np.testing.assert_array_equal(filters.correlate(dot, kernel)[1:4, 1:4], kernel[::-1, ::-1])


@pytest.mark.parametrize(("image", "border"), [(normal(7, (9, 12)), "reflect"), (photo(8, (9, 12, 3)), "symmetric")])
def test_the_same_under_jit_and_vmap(image, border):
    def everything(image):
        return filters.blur(image, 5, 1.5, border), filters.gradient_magnitude(image, border)

    images = np.stack([image, image[::-1]])
    results = everything(image), jax.jit(everything)(image), jax.jit(jax.vmap(everything))(images)
    for alone, jitted, both in zip(*results, strict=True):
        assert_close(jitted, np.asarray(alone), 1e-6)
        assert_close(both[0], np.asarray(alone), 1e-6)
        assert not np.allclose(both[1], both[0])


@pytest.mark.parametrize(("size", "sigma"), GAUSSIANS)
def test_kernels_are_the_sampled_formula_with_sum_1(size, sigma):
    row, square = filters.gaussian_1d(size, sigma), filters.gaussian_2d(size, sigma)
    assert row.shape == (size,) and square.shape == (size, size)
    assert abs(row.sum() - 1) < 1e-12 and abs(square.sum() - 1) < 1e-12
    np.testing.assert_array_equal(row, row[::-1])
    np.testing.assert_array_equal(square, square.T)
    for distance in range(size // 2 + 1):
        ratio = row[size // 2 + distance] / row[size // 2]
        # The factor before the exponential falls out of a ratio.
        expected = math.exp(-0.5 * (distance / sigma) ** 2) if distance / sigma < 1e100 else 0
        assert ratio == pytest.approx(expected, rel=1e-12, abs=1e-300)


def test_the_reports_kernel_by_hand():
    # exp(-1 / (2 sigma^2)) with sigma = 1 / (2 ln 2) is exp(-2 (ln 2)^2).
    beside = math.exp(-2 * math.log(2) ** 2)
    np.testing.assert_allclose(filters.gaussian_1d(), np.array([beside, 1, beside]) / (1 + 2 * beside), rtol=1e-12)
    density = np.exp(-0.5 * (np.arange(-1, 2) / filters.REPORT_SIGMA) ** 2)
    density /= math.sqrt(2 * math.pi) * filters.REPORT_SIGMA
    assert density.sum() == pytest.approx(0.976, abs=5e-4), "the reason for dividing by the sum"


@pytest.mark.parametrize(("size", "sigma"), GAUSSIANS)
def test_the_gaussian_is_separable(size, sigma):
    """Section 3.1 of the report, with the formula right: exp(-(x^2 + y^2)) is exp(-x^2) exp(-y^2)."""
    row = filters.gaussian_1d(size, sigma)
    np.testing.assert_allclose(filters.gaussian_2d(size, sigma), np.outer(row, row), rtol=1e-12, atol=1e-300)
    image = normal(9, (11, 8))
    assert_close(
        filters.correlate(image, filters.gaussian_2d(size, sigma)), np.asarray(filters.blur(image, size, sigma))
    )


@borders
def test_separable_takes_the_column_along_y_and_the_row_along_x(border):
    image, column, row = normal(10, (9, 7, 2)), normal(11, (5,)), normal(12, (3,))
    got = filters.correlate_separable(image, column, row, border)
    assert_close(got, scipy_correlate(image, np.outer(column, row).astype(np.float64), border))


@borders
@pytest.mark.parametrize(("radius", "sigma"), [(1, 0.6), (6, 2.0)])
def test_blur_equals_scipys_gaussian_filter(radius, sigma, border):
    image = photo(13, (21, 18))
    expected = ndimage.gaussian_filter(image.astype(np.float64), sigma, mode=SCIPY_MODES[border], radius=radius)
    assert_close(blur(image, 2 * radius + 1, sigma, border), expected)


@borders
def test_a_constant_keeps_its_value_and_has_no_gradient(border):
    image = np.full((9, 8, 3), 200, np.uint8)
    blurred = blur(image, 5, 1.2, border)
    magnitude = jax.jit(filters.gradient_magnitude, static_argnames="border")(image, border)
    # Where zeros follow the edge, it is an edge; two pixels further in nothing tells.
    inside = np.s_[2:-2, 2:-2] if border == "constant" else np.s_[:, :]
    np.testing.assert_allclose(blurred[inside], 200, rtol=1e-6)
    np.testing.assert_array_equal(magnitude[inside], 0)
    if border == "constant":
        assert blurred[0, 0, 0] < 150 and magnitude[0, 0, 0] > 100


def test_the_derivative_of_a_ramp_is_its_slope():
    y, x = np.mgrid[:7, :9].astype(np.float32)
    i_x, i_y = filters.derivatives(2.5 * x - 0.75 * y + 3)
    inside = np.s_[1:-1, 1:-1]
    np.testing.assert_allclose(i_x[inside], 2.5, rtol=1e-6)
    np.testing.assert_allclose(i_y[inside], -0.75, rtol=1e-6)
    magnitude = filters.gradient_magnitude(2.5 * x - 0.75 * y + 3)
    np.testing.assert_allclose(magnitude[inside], math.hypot(2.5, 0.75), rtol=1e-6)


def test_uint8_neither_wraps_nor_is_rescaled():
    step = np.zeros((3, 4), np.uint8)
    step[:, :2] = 255
    i_x, _ = filters.derivatives(step)
    np.testing.assert_array_equal(i_x, np.broadcast_to([0, -127.5, -127.5, 0], (3, 4)))


def test_bfloat16_is_filtered_in_float32():
    image = jnp.asarray(normal(14, (6, 6)), jnp.bfloat16)
    got = filters.blur(image)
    assert got.dtype == jnp.float32
    assert_close(got, np.asarray(filters.blur(image.astype(jnp.float32))), 1e-7)


def test_highest_precision_is_asked_for():
    """A CPU computes in float32 anyway: a GPU or a TPU would not, and no test here would see it."""
    jaxpr = jax.make_jaxpr(filters.blur)(jnp.zeros((4, 4)))
    (precisions,) = {eqn.params["precision"] for eqn in jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"}
    assert set(precisions) == {jax.lax.Precision.HIGHEST}


@pytest.mark.parametrize("kernel", [filters.gaussian_1d, filters.gaussian_2d])
@pytest.mark.parametrize(("size", "sigma"), [(2, 1), (0, 1), (-1, 1), (3, 0), (3, -1), (3, math.nan), (3, math.inf)])
def test_impossible_gaussians_are_refused(kernel, size, sigma):
    with pytest.raises(ValueError, match=f"odd and at least 1, not {size}" if size != 3 else f"finite, not {sigma}"):
        kernel(size, sigma)


def test_other_mistakes_are_refused():
    image = np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match=r"'mirror'.*symmetric, reflect, edge, wrap, constant"):
        filters.blur(image, border="mirror")
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 3\).*vmap"):
        filters.blur(np.zeros((2, 4, 4, 3), np.float32))
    for shape in [(3,), (2, 3), (3, 4)]:
        with pytest.raises(ValueError, match="odd sides"):
            filters.correlate(image, np.zeros(shape))

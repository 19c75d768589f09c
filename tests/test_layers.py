"""convolution.py and layers.py against XLA's own operators, Flax's and PyTorch's.

`python -m tests.test_layers` writes PyTorch's numbers again, to tests/fixtures/layers_torch.npz.
"""

import functools
import pathlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn

from jaxseg import cpu
from jaxseg.convolution import conv, conv_transpose
from jaxseg.layers import BatchNorm, Conv, ConvTranspose, dropout, max_pool
from jaxseg.winograd import winograd_pays

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "layers_torch.npz"
# (N, H, W, C)
SHAPES = [
    *[
        (2, 6, 8, 5),
        (1, 1, 1, 1),
        (1, 7, 5, 3),
        (3, 1, 4, 2),
        (2, 9, 2, 1),
        (2, 3, 2, 64),
        (1, 2, 3, 257),
        (1, 4, 4, 257),
    ],
    *[(8, 3, 2, 5), (6, 5, 2, 3)],
]


def reference_conv_transpose(x, kernel):
    return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")


def reference_max_pool(x):
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, *inputs):
    """The output of function, and its gradients for an output gradient that differs everywhere."""
    output, pull_back = jax.vjp(function, *inputs)
    weight = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape).astype(output.dtype)
    return output, *pull_back(weight)


@functools.partial(jax.jit, static_argnums=0)
def output_and_pull_back(function, gradient, *inputs):
    """The output of function, and its gradients for the given output gradient."""
    output, pull_back = jax.vjp(function, *inputs)
    return output, *pull_back(gradient)


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rectified_integers(seed, shape):
    """Most of it zeros, the rest 1 or 2: every window has ties."""
    return np.maximum(np.random.default_rng(seed).integers(-3, 3, shape), 0).astype(np.float32)


# (N, H, W, C, KH, KW, strides, padding), for 5 features. The gradients have a form for a stride, one for many channels,
# one for few pixels and, with a stride, one for a number of images that is no multiple of eight.
CONVOLUTIONS = [
    (2, 13, 16, 3, 7, 7, 2, 3),
    (2, 9, 7, 16, 7, 7, 1, 3),
    (1, 11, 14, 17, 7, 7, 2, 3),
    (2, 8, 5, 16, 3, 3, 1, 1),
    (2, 8, 5, 1, 3, 3, 1, 1),
    (2, 7, 8, 16, 3, 3, 2, 1),
    (1, 1, 1, 16, 3, 3, 2, 1),
    (1, 1, 2, 16, 3, 3, 1, 1),
    (2, 2, 3, 16, 3, 3, 1, 1),
    (2, 9, 2, 16, 3, 3, 2, 1),
    (2, 4, 3, 64, 3, 3, 1, 1),
    (2, 4, 3, 65, 3, 3, 1, 1),
    (1, 2, 3, 65, 3, 3, 1, 2),
    (2, 4, 3, 256, 3, 3, 1, 1),
    (2, 4, 3, 257, 3, 3, 1, 1),
    (1, 2, 2, 257, 3, 3, 1, 1),
    (1, 3, 4, 300, 3, 3, 2, 1),
    (2, 2, 3, 4, 7, 7, 2, 3),
    (2, 6, 5, 16, 1, 1, 1, 0),
    (2, 6, 5, 3, 1, 1, 1, 0),
    (2, 3, 2, 300, 1, 1, 1, 0),
    (2, 6, 5, 16, 1, 1, 2, 0),
    (2, 5, 6, 1, 1, 1, 2, 0),
    (1, 6, 7, 16, 3, 1, 1, 0),
    (1, 6, 7, 16, 1, 3, 2, 2),
    (2, 6, 7, 16, 1, 3, 2, 2),
    (2, 5, 7, 16, 1, 1, 2, 1),
    (3, 19, 4, 3, 7, 7, 2, 3),
    (4, 9, 5, 6, 3, 3, 2, 1),
    (6, 11, 3, 6, 3, 3, 1, 1),
    (8, 5, 4, 6, 3, 3, 1, 1),
    (8, 6, 5, 3, 7, 7, 2, 3),
    (8, 3, 4, 6, 3, 3, 1, 2),
    (8, 3, 4, 6, 3, 3, 2, 2),
    (16, 3, 4, 6, 4, 4, 2, 1),
]


def numpy_conv(x, kernel, strides, padding):
    """The convolution in float64 and, for the weights of `value_and_gradients`, its gradients."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = kernel.shape[:2]
    height = (padded.shape[1] - rows) // strides + 1
    width = (padded.shape[2] - columns) // strides + 1

    def seen(array, u, v):
        return array[:, u : u + (height - 1) * strides + 1 : strides, v : v + (width - 1) * strides + 1 : strides]

    taps = list(np.ndindex(rows, columns))
    output = sum(seen(padded, *tap) @ kernel[tap] for tap in taps)
    gradient = np.cos(np.arange(output.size, dtype=np.float32)).reshape(output.shape).astype(np.float64)
    x_gradient, kernel_gradient = np.zeros_like(padded), np.zeros_like(kernel)
    for tap in taps:
        seen(x_gradient, *tap)[...] += gradient @ kernel[tap].T
        kernel_gradient[tap] = np.einsum("nijc,nijo->co", seen(padded, *tap), gradient)
    inside = slice(padding, x_gradient.shape[1] - padding), slice(padding, x_gradient.shape[2] - padding)
    return output, x_gradient[:, inside[0], inside[1]], kernel_gradient


def assert_close(got, expected, tolerance):
    """Each array within tolerance of the other, relative to the largest magnitude."""
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()
        assert difference <= tolerance * np.abs(np.asarray(b, np.float64)).max()


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv_equals_numpy_in_float64(case):
    *shape, rows, columns, strides, padding = case
    x, kernel = normal(20, shape), normal(21, (rows, columns, shape[-1], 5))
    got = value_and_gradients(functools.partial(conv, strides=strides, padding=padding), x, kernel)
    assert_close(got, numpy_conv(x, kernel, strides, padding), 1e-5)


def test_a_map_without_room_for_the_kernel_gives_nothing():
    x, kernel = jnp.ones((1, 2, 8, 2)), jnp.ones((3, 3, 2, 5))
    assert (
        conv(x, kernel, 1, 0).shape
        == jax.lax.conv(x.transpose(0, 3, 1, 2), kernel.T, (1, 1), "VALID").transpose(0, 2, 3, 1).shape
    )


def conv_with(strides, padding):
    return functools.partial(conv, strides=strides, padding=padding)


# The last ones give an empty map of one that is not: it has no room for the kernel.
@pytest.mark.parametrize(
    ("layer", "shape", "size"),
    [
        (conv_transpose, (0, 3, 3, 4), (4, 4)),
        *[(conv_with(s, 1), shape, (3, 3)) for s in (1, 2) for shape in ((0, 3, 3, 4), (2, 0, 3, 4), (8, 3, 0, 4))],
        *[(conv_with(s, 0), (0, 3, 3, channels), (1, 1)) for s in (1, 2) for channels in (1, 4)],
        *[(conv_with(s, 0), (1, 2, 8, channels), (3, 3)) for s in (1, 2) for channels in (4, 300)],
    ],
)
def test_of_an_empty_map_the_gradients_are_zeros(layer, shape, size):
    x, kernel = np.ones(shape, np.float32), np.ones((*size, shape[3], 2), np.float32)
    y, *gradients = value_and_gradients(layer, x, kernel)
    assert y.size == 0
    for got, argument in zip(gradients, (x, kernel), strict=True):
        np.testing.assert_array_equal(got, np.zeros_like(argument), strict=True)


@pytest.mark.parametrize(("channels", "product"), [(16, "9x16"), (9, "9x9"), (3, "3x9")])
@pytest.mark.parametrize("strides", [1, 2])
def test_the_product_of_a_1x1_kernels_gradient_has_no_more_rows_than_columns(channels, product, strides):
    gradient = jax.jit(jax.grad(lambda kernel, x: conv(x, kernel, strides, 0).sum()))
    traced = gradient.trace(jnp.zeros((1, 1, channels, 9)), jnp.zeros((2, 8, 8, channels)))
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    sizes = [re.search(r"-> tensor<(\w+)xf32>", line)[1] for line in text.splitlines() if "dot_general" in line]
    assert product in sizes


def test_an_input_gradient_of_unknown_size_can_be_exported():
    """With as many channels it would be products, whose order depends on how many pixels there are."""
    kernel = normal(2, (3, 3, 300, 20))
    gradient = jax.jit(jax.grad(lambda x: (conv(x, kernel, 1, 1) ** 2).sum()))
    sizes = (*jax.export.symbolic_shape("n, h"), 8, 300)
    exported = jax.export.export(gradient)(jax.ShapeDtypeStruct(sizes, jnp.float32))
    x = normal(1, (2, 5, 8, 300))
    assert_close([exported.call(x)], [gradient(x)], 1e-5)


def test_conv_transpose_and_its_gradients_of_unknown_size_can_be_exported():
    kernel = normal(2, (4, 4, 5, 3))

    def step(x):
        return value_and_gradients(conv_transpose, x, kernel)

    sizes = (*jax.export.symbolic_shape("n, h"), 6, 5)
    exported = jax.export.export(jax.jit(step))(jax.ShapeDtypeStruct(sizes, jnp.float32))
    x = normal(1, (2, 4, 6, 5))
    assert_close(exported.call(x), step(x), 1e-5)


# The second one's convolution by blocks is that of `jaxseg.winograd`.
@pytest.mark.parametrize(("shape", "features"), [((2, 4, 6, 5), 3), ((4, 24, 9, 128), 64)])
def test_conv_transpose_lays_its_blocks_once_where_it_is_differentiated(shape, features):
    """XLA would lay them anew for all that read them, the backward pass, too."""
    x, kernel = jnp.zeros(shape), jnp.zeros((4, 4, shape[3], features))

    def copied(function):
        return jax.jit(function).trace(x, kernel).lower(lowering_platforms=("cpu",)).as_text().count("inlineable")

    differentiated = copied(lambda *arguments: jax.vjp(conv_transpose, *arguments)[0])
    assert differentiated == copied(conv_transpose) + 1


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("strides", [1, 2])
def test_conv_under_vmap_of_both_arguments(strides, channels):
    x, kernel = normal(22, (3, 2, 6, 5, channels)), normal(23, (3, 3, 3, channels, 4))

    def step(x, kernel):
        return value_and_gradients(functools.partial(conv, strides=strides, padding=1), x, kernel)

    alone = [numpy_conv(*inputs, strides, 1) for inputs in zip(x, kernel, strict=True)]
    assert_close(jax.vmap(step)(x, kernel), [np.stack(parts) for parts in zip(*alone, strict=True)], 1e-5)


def test_conv_gradient_under_pmap():
    x, kernel = normal(24, (jax.local_device_count(), 2, 6, 5, 16)), normal(25, (3, 3, 16, 4))

    def gradient(x, kernel):
        return jax.lax.psum(value_and_gradients(lambda x, kernel: conv(x, kernel, 1, 1), x, kernel)[2], "batch")

    got = jax.pmap(gradient, axis_name="batch", in_axes=(0, None), out_axes=None)(x, kernel)
    expected = sum(numpy_conv(part, kernel, 1, 1)[2] for part in x)
    assert_close([got], [expected], 1e-5)


def test_conv_keeps_bfloat16_and_its_precision():
    x, kernel = (
        jnp.asarray(normal(26, (4, 12, 12, 16)), jnp.bfloat16),
        jnp.asarray(normal(27, (3, 3, 16, 8)), "bfloat16"),
    )
    for strides in (1, 2):
        got = value_and_gradients(functools.partial(conv, strides=strides, padding=1), x, kernel)
        assert {a.dtype for a in got} == {jnp.dtype("bfloat16")}
        assert_close(got, numpy_conv(np.asarray(x), np.asarray(kernel), strides, 1), 2**-6)


@pytest.mark.parametrize(
    ("layer", "shape", "size", "products"),
    [
        (functools.partial(conv, strides=1, padding=1), (1, 4, 4, 16), (3, 3), 0),
        (functools.partial(conv, strides=1, padding=1), (1, 4, 4, 256), (3, 3), 0),
        (functools.partial(conv, strides=1, padding=1), (1, 4, 4, 257), (3, 3), 1),
        (functools.partial(conv, strides=2, padding=1), (1, 4, 4, 16), (3, 3), 1),
        (conv_transpose, (1, 4, 4, 257), (4, 4), 0),
    ],
)
def test_which_input_gradients_are_products_on_cpu_and_none_on_gpu(layer, shape, size, products):
    traced = jax.jit(gradients_of(layer)).trace(jnp.zeros(shape), jnp.zeros((*size, shape[-1], 4)))
    count = {p: traced.lower(lowering_platforms=(p,)).as_text().count("stablehlo.dot_general") for p in ("cpu", "cuda")}
    assert count == {"cpu": products, "cuda": 0}


def test_what_other_platforms_compute_equals_what_a_cpu_does(monkeypatch):
    layers = {
        "stem": (functools.partial(conv, strides=2, padding=3), (2, 20, 17, 3), [(7, 7, 3, 64)]),
        "Winograd's on a CPU": (functools.partial(conv, strides=1, padding=1), (8, 16, 10, 64), [(3, 3, 64, 64)]),
        "many channels": (functools.partial(conv, strides=1, padding=1), (2, 3, 2, 257), [(3, 3, 257, 8)]),
        "strided": (functools.partial(conv, strides=2, padding=1), (3, 9, 8, 64), [(3, 3, 64, 32)]),
        "head": (functools.partial(conv, strides=1, padding=0), (2, 9, 8, 16), [(1, 1, 16, 9)]),
        "transposed": (conv_transpose, (2, 6, 8, 64), [(4, 4, 64, 32)]),
        "transposed, many channels": (conv_transpose, (2, 3, 2, 257), [(4, 4, 257, 4)]),
        "max-pool": (max_pool, (2, 9, 8, 5), []),
    }
    inputs = {
        name: [normal(seed, one) for seed, one in enumerate([shape, *kernel])]
        for name, (_, shape, kernel) in layers.items()
    }
    on_cpu = {name: value_and_gradients(layer, *inputs[name]) for name, (layer, *_) in layers.items()}
    asked = []

    def of_another(*arrays, default, **forms):
        asked.append(set(forms))
        return default(*arrays)

    try:
        with monkeypatch.context() as context:
            context.setattr(jax.lax, "platform_dependent", of_another)
            jax.clear_caches()  # what was traced before would be taken
            for name, (layer, *_) in layers.items():
                asked.clear()
                assert_close(value_and_gradients(layer, *inputs[name]), on_cpu[name], 1e-5)
                assert asked and all(platforms == {"cpu"} for platforms in asked), name
    finally:
        jax.clear_caches()


def gradients_of(layer):
    return jax.grad(lambda x, kernel: layer(x, kernel).sum(), (0, 1))


@pytest.mark.parametrize(
    ("layer", "shape", "size", "features"),
    [
        (functools.partial(conv, strides=2, padding=3), (3, 28, 8, 5), (7, 7), 24),
        (functools.partial(conv, strides=2, padding=1), (4, 8, 6, 5), (3, 3), 8),
        (functools.partial(conv, strides=2, padding=1), (3, 8, 6, 5), (3, 3), 12),  # no more bands than rows
        (functools.partial(conv, strides=2, padding=1), (16, 4, 6, 5), (3, 3), 16),
        (functools.partial(conv, strides=1, padding=1), (4, 8, 6, 5), (3, 3), 4),
        (conv_transpose, (4, 8, 6, 5), (4, 4), 4),
    ],
)
def test_a_kernel_gradients_features_come_in_eights_on_cpu_where_it_has_strides(layer, shape, size, features):
    kernel = jnp.zeros((*size, shape[-1], 7))
    traced = jax.jit(jax.grad(lambda kernel, x: layer(x, kernel).sum())).trace(kernel, jnp.zeros(shape))
    for platform, expected in (("cpu", features), ("cuda", shape[0])):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        (line,) = [line for line in text.splitlines() if "stablehlo.convolution" in line]
        spec, sides = re.search(r"\[([\w, ]+)\]x", line)[1], re.search(r": \(tensor<([\dx]+)x", line)[1]
        assert dict(zip(spec.split(", "), sides.split("x"), strict=True))["f"] == str(expected), platform


@pytest.mark.parametrize(("shape", "blocks"), [((1, 4, 4, 257), 0), ((1, 3, 4, 257), 1), ((1, 4, 4, 256), 1)])
def test_of_many_channels_a_transposed_convolution_is_what_it_is_where_there_is_room(shape, blocks):
    arguments = jnp.zeros(shape), jnp.zeros((4, 4, shape[-1], 3))
    text = jax.jit(conv_transpose).trace(*arguments).lower(lowering_platforms=("cpu",)).as_text()
    assert ("lhs_dilate = [2, 2]" in text) == (not blocks)


def test_programs_with_the_compiler_options_take_no_ynnpack_for_convolutions():
    arguments = jnp.zeros((4, 24, 28, 64)), jnp.zeros((3, 3, 64, 64))
    options = cpu.compiler_options()
    if not options:
        pytest.skip(f"jax {jax.__version__} has no option that turns YNNPACK off")
    by_default, chosen = (
        jax.jit(functools.partial(conv, strides=1, padding=1), compiler_options=given).lower(*arguments).compile()
        for given in ({}, options)
    )
    assert "ynn_fusion" in by_default.as_text() and "ynn_fusion" not in chosen.as_text()


def test_a_jax_that_knows_no_such_option_gets_none(monkeypatch):
    def refused(name):
        """A jit whose compiler refuses an option of this name, as XLA does."""

        def fail():
            raise jax.errors.JaxRuntimeError(f"INVALID_ARGUMENT: No such compile option: '{name}'")

        return lambda *_, **__: SimpleNamespace(lower=lambda: SimpleNamespace(compile=fail))

    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda: 0, compiler_options={"xla_no_such_option": "x"}).lower().compile()
    monkeypatch.setattr(jax, "jit", refused("xla_cpu_experimental_ynn_fusion_type"))
    assert cpu.compiler_options.__wrapped__() == {}
    monkeypatch.setattr(jax, "jit", refused("another"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        cpu.compiler_options.__wrapped__()


def test_conv_module_equals_flax_with_the_same_parameters():
    x = normal(28, (2, 7, 6, 16))
    layer = Conv(4, (3, 3), strides=2, padding=1)
    reference = nn.Conv(4, (3, 3), strides=2, padding=1, use_bias=False)
    variables = layer.init(jax.random.key(0), x)
    expected = reference.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)
    assert_close([layer.apply(variables, x)], [reference.apply(variables, x)], 1e-6)
    low = Conv(4, (3, 3), dtype=jnp.bfloat16)
    assert low.init(jax.random.key(0), x)["params"]["kernel"].dtype == jnp.float32
    assert low.apply(variables, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", SHAPES)
def test_conv_transpose_equals_lax(shape):
    x, kernel = normal(1, shape), normal(2, (4, 4, shape[-1], 3))
    got = value_and_gradients(conv_transpose, x, kernel)
    expected = value_and_gradients(reference_conv_transpose, x, kernel)
    assert got[0].shape == (shape[0], 2 * shape[1], 2 * shape[2], 3)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_conv_transpose_without_jit():
    x, kernel = normal(1, (1, 2, 3, 2)), normal(2, (4, 4, 2, 3))
    np.testing.assert_allclose(conv_transpose(x, kernel), reference_conv_transpose(x, kernel), rtol=1e-5, atol=1e-5)


def test_conv_transpose_under_vmap_of_both_arguments():
    x, kernel = normal(1, (3, 2, 4, 5, 2)), normal(2, (3, 4, 4, 2, 3))
    got = value_and_gradients(jax.vmap(conv_transpose), x, kernel)
    expected = value_and_gradients(jax.vmap(reference_conv_transpose), x, kernel)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_conv_transpose_keeps_bfloat16_and_its_precision():
    x, kernel = normal(1, (2, 4, 4, 256)), normal(2, (4, 4, 256, 8)) / 32
    x, kernel = (jnp.asarray(a, jnp.bfloat16) for a in (x, kernel))
    got = value_and_gradients(conv_transpose, x, kernel)
    exact = value_and_gradients(reference_conv_transpose, x.astype(jnp.float32), kernel.astype(jnp.float32))
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        # bfloat16 keeps 8 bits: 2^-8 of the largest is one rounding; sums of 1024 rounded products would be worse.
        assert jnp.abs(a.astype(jnp.float32) - b).max() < 2**-7 * jnp.abs(b).max()


def test_conv_transpose_module_has_one_parameter_of_the_given_types():
    layer = ConvTranspose(3, dtype=jnp.bfloat16)
    x = normal(1, (2, 4, 5, 7))
    variables = layer.init(jax.random.key(0), x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), variables) == {"params": {"kernel": ((4, 4, 7, 3), jnp.float32)}}
    assert layer.apply(variables, x).dtype == jnp.bfloat16
    variables = ConvTranspose(3, param_dtype=jnp.bfloat16).init(jax.random.key(0), x)
    assert variables["params"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        ConvTranspose(3).apply(variables, x),
        reference_conv_transpose(x, variables["params"]["kernel"].astype(jnp.float32)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_conv_transpose_module_starts_with_the_documented_deviation():
    kernel = ConvTranspose(64).init(jax.random.key(0), jnp.zeros((1, 1, 1, 32)))["params"]["kernel"]
    # 32768 draws: the standard error of the deviation is 0.4 %.
    assert abs(kernel.std() / np.sqrt(2 / (4 * 32)) - 1) < 0.02
    assert abs(kernel.mean()) < 0.03 * kernel.std()


def test_variance_survives_five_layers():
    """The mean square after five layers, away from the border, is what it was, on the average of eight draws.

    One draw of these narrow layers varies by about a quarter; Flax's own initialisers would lose a factor of 8^5.
    """

    @jax.jit
    def decode(x, key):
        for i, width in enumerate((64, 64, 32, 32, 16)):
            x = nn.relu(ConvTranspose(width).init_with_output(jax.random.fold_in(key, i), x)[0])
        return (x[:, 64:-64, 64:-64] ** 2).mean()

    x = np.maximum(normal(16, (1, 6, 6, 64)), 0)
    after = [decode(x, jax.random.key(seed)) for seed in range(8)]
    assert 1 / 1.5 < np.mean(after) / (x**2).mean() < 1.5


def batch_norm_case(shape):
    """An input far from centred, and variables other than those at the start."""
    x = 3 + 2 * normal(30, shape)
    params = {"scale": 1 + normal(31, shape[-1:]), "bias": normal(32, shape[-1:])}
    return x, {"params": params, "batch_stats": {"mean": normal(33, shape[-1:]), "var": normal(34, shape[-1:]) ** 2}}


def apply_norm(norm, variables, x):
    return norm.apply(variables, x, mutable=["batch_stats"])


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 8, 5), (3, 1, 4, 2), (2, 3, 2, 64), (7, 3)])
def test_batch_norm_equals_flax(shape, running):
    x, variables = batch_norm_case(shape)
    norms = BatchNorm(running), nn.BatchNorm(running, momentum=0.9, epsilon=1e-5)

    def everything(norm):
        (y, updated), pull_back = jax.vjp(functools.partial(apply_norm, norm), variables, x)
        weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        grads, x_grad = pull_back((weight, jax.tree.map(jnp.zeros_like, updated)))
        return y, updated, grads["params"], x_grad

    ours, theirs = (jax.jit(functools.partial(everything, norm))() for norm in norms)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, theirs)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, ours, theirs))
    drawn = [jax.jit(norm.init)(jax.random.key(0), x) for norm in norms]
    jax.tree.map(np.testing.assert_array_equal, *drawn)


def test_batch_norm_over_devices_is_that_of_the_whole_batch():
    x, variables = batch_norm_case((8, 3, 4, 5))
    weight = normal(35, x.shape)

    def loss(params, x, weight, axis_name=None):
        y, updated = apply_norm(BatchNorm(False, axis_name), variables | {"params": params}, x)
        return jnp.vdot(y, weight), updated

    grad = jax.grad(loss, (0, 1), has_aux=True)

    def per_device(x, weight):
        (params_grad, x_grad), updated = grad(variables["params"], x, weight, "batch")
        return jax.lax.psum(params_grad, "batch"), x_grad, updated

    split = [a.reshape(4, 2, *a.shape[1:]) for a in (x, weight)]
    params_grad, x_grad, updated = jax.pmap(per_device, "batch", devices=jax.local_devices()[:4])(*split)
    (expected_params, expected_x), expected_updated = jax.jit(grad)(variables["params"], x, weight)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(x_grad.reshape(x.shape), expected_x)
    jax.tree.map(lambda a, b: close(a[0], b), (params_grad, updated), (expected_params, expected_updated))


def test_batch_norm_of_a_constant_channel_is_finite_both_ways():
    x, variables = batch_norm_case((8, 11, 14, 2))
    x[..., 0] = 1000.1
    # In float32 the mean square is below the squared mean here.
    assert np.isfinite(apply_norm(BatchNorm(False), variables, x)[0]).all()
    grads = jax.grad(lambda x: apply_norm(BatchNorm(False), variables, x)[0].sum())(x)
    assert np.isfinite(grads).all()


def test_batch_norm_computes_in_float32_whatever_it_is_given():
    x, variables = batch_norm_case((4, 6, 8, 5))
    half = jnp.asarray(x, jnp.bfloat16)
    norm, wide = BatchNorm(False, dtype=jnp.bfloat16), BatchNorm(False)
    y, updated = apply_norm(norm, variables, half)
    expected, expected_updated = apply_norm(wide, variables, half.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, expected.astype(jnp.bfloat16))
    jax.tree.map(np.testing.assert_array_equal, updated, expected_updated)
    gradient = jnp.asarray(normal(37, x.shape), jnp.bfloat16)

    def x_grad(norm, x, gradient):
        return jax.vjp(lambda x: apply_norm(norm, variables, x)[0], x)[1](gradient)[0]

    grad, expected = x_grad(norm, half, gradient), x_grad(wide, half.astype(jnp.float32), gradient.astype(jnp.float32))
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("fill", [normal, rectified_integers])
@pytest.mark.parametrize("shape", SHAPES)
def test_max_pool_equals_flax(shape, fill):
    x = fill(3, shape)
    got = value_and_gradients(max_pool, x)
    expected = value_and_gradients(reference_max_pool, x)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-6, atol=1e-6)


def test_max_pool_under_vmap():
    x = rectified_integers(3, (3, 2, 5, 6, 2))
    got = value_and_gradients(jax.vmap(max_pool), x)
    np.testing.assert_array_equal(got[0], jax.vmap(reference_max_pool)(x))
    # The gradients of each image alone.
    alone = jax.jit(lambda x: max_pool(x.reshape(6, 5, 6, 2)))
    np.testing.assert_allclose(got[1], value_and_gradients(alone, x)[1], rtol=1e-6, atol=1e-6)


def test_max_pool_gives_a_tie_to_the_first_in_row_major_order():
    x = np.zeros((1, 4, 4, 1), np.float32)
    # Windows begin at -1 and 1: without the padding the first pixels are (0, 0), (0, 1), (1, 0), (1, 1).
    expected = np.zeros((4, 4), np.float32)
    expected[:2, :2] = 1
    gradient = output_and_pull_back(max_pool, np.ones((1, 2, 2, 1), np.float32), x)[1]
    np.testing.assert_array_equal(gradient[0, :, :, 0], expected)


def test_max_pool_prefers_an_earlier_row_to_an_earlier_column():
    x = np.array([[0, 1], [1, 0]], np.float32)[None, :, :, None]
    gradient = output_and_pull_back(max_pool, np.ones((1, 1, 1, 1), np.float32), x)[1]
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 1], [0, 0]])


def test_max_pool_of_negative_values_ignores_the_padding():
    x = normal(4, (2, 5, 6, 3)) - 100
    np.testing.assert_array_equal(max_pool(x), reference_max_pool(x))


def test_max_pool_keeps_bfloat16():
    x = jnp.asarray(normal(5, (1, 5, 6, 2)), jnp.bfloat16)
    assert max_pool(x).dtype == jnp.bfloat16
    assert (max_pool(x) == reference_max_pool(x)).all()


@functools.partial(jax.jit, static_argnums=(1, 2))
def kept(keys, shape, rate):
    """Which values of each image dropout keeps, as 0 and 1."""
    return dropout(jnp.ones((len(keys), *shape)), keys, rate) > 0


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.2, 0.5, 0.999])
def test_dropout_drops_its_share_and_preserves_the_mean(rate):
    x = normal(30, (4, 50, 40, 16)) + 3
    dropped = np.asarray(dropout(x, jax.random.split(jax.random.key(0), 4), rate))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], (x / (1 - rate))[kept], rtol=1e-6)
    # Four standard errors of a binomial share, and of the mean.
    share = (rate * (1 - rate) / x.size) ** 0.5
    assert abs(kept.mean() - (1 - rate)) <= 4 * share
    assert abs(dropped.mean() - x.mean()) <= 4 * 3.2 * share / (1 - rate) + 1e-5


def test_dropout_is_independent_between_values_and_between_images():
    masks = np.asarray(kept(jax.random.split(jax.random.key(1), 6), (64, 48, 16), 0.3), np.float64) - 0.7
    deviation = 0.3 * 0.7

    def correlation(a, b):
        return (a * b).mean() / deviation * a.size**0.5

    # In standard errors: neighbours in every direction and further apart, and every two images. The largest of about
    # 40 normal values is below 4.5 but once in 3000 sets.
    far = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (0, 0, 8), (0, 16, 0), (32, 0, 0), (1, 0, 1)]
    shifted = [correlation(masks, np.roll(masks, shift, (1, 2, 3))) for shift in far]
    images = [correlation(masks[i], masks[j]) for i in range(6) for j in range(i)]
    assert np.abs(shifted).max() < 4.5 and np.abs(images).max() < 4.5
    for axis in range(1, 4):
        profile = masks.mean(tuple(other for other in range(4) if other != axis))
        assert np.abs(profile).max() / (deviation * masks.shape[axis] / masks.size) ** 0.5 < 4.5


def test_dropout_does_not_rearrange_one_image_for_another(monkeypatch):
    # Keys that are the random bits themselves: the first ones differ in a single bit.
    monkeypatch.setattr(jax.random, "bits", lambda key, *args: key)
    bits = jnp.array([[12345, 111], [12345 ^ 1, 222], [12345, 333]], jnp.uint32)
    first, neighbour, same = np.asarray(dropout(jnp.ones((3, 10000)), bits, 0.5)) > 0
    swapped = first.reshape(-1, 2)[:, ::-1].ravel()
    # Half of the values agree by chance; four standard errors.
    for a, b in ((swapped, neighbour), (first, neighbour), (first, same)):
        assert abs((a == b).mean() - 0.5) < 4 * 0.5 / 100


def test_what_dropout_drops_depends_on_the_images_own_key_only():
    keys, order = jax.random.split(jax.random.key(2), 4), jnp.array([2, 0, 3, 1])
    masks = kept(keys, (9, 7, 3), 0.4)
    np.testing.assert_array_equal(kept(keys[order], (9, 7, 3), 0.4), masks[order])
    np.testing.assert_array_equal(kept(keys[1:2], (9, 7, 3), 0.4)[0], masks[1])
    np.testing.assert_array_equal(kept(jnp.stack([keys[0]] * 2), (9, 7, 3), 0.4), masks[jnp.array([0, 0])])


def test_dropout_passes_the_gradient_of_what_it_keeps_and_the_type():
    keys = jax.random.split(jax.random.key(3), 2)
    x = normal(31, (2, 5, 4, 3))
    out, pull_back = jax.vjp(lambda x: dropout(x, keys, 0.4), x)
    np.testing.assert_allclose(pull_back(np.ones_like(x))[0], np.asarray(out) / x, rtol=1e-5)
    assert dropout(jnp.asarray(x, jnp.bfloat16), keys, 0.4).dtype == jnp.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_dropout_refuses_impossible_rates(rate):
    with pytest.raises(ValueError, match="from 0 to below 1, not"):
        dropout(jnp.ones((1, 2)), jax.random.split(jax.random.key(0), 1), rate)


def torch_conv_transpose(torch, x, kernel, gradient):
    """PyTorch's output and gradients, in the layouts of this project."""
    image = torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)
    weight = torch.tensor(kernel[::-1, ::-1].transpose(2, 3, 0, 1).copy(), requires_grad=True)
    output = torch.nn.functional.conv_transpose2d(image, weight, stride=2, padding=1)
    output.backward(torch.tensor(gradient.transpose(0, 3, 1, 2).copy()))
    kernel_gradient = weight.grad.numpy().transpose(2, 3, 0, 1)[::-1, ::-1]
    return output.detach().numpy().transpose(0, 2, 3, 1), image.grad.numpy().transpose(0, 2, 3, 1), kernel_gradient


def torch_max_pool(torch, x, gradient):
    """PyTorch's output and gradient, in the layout of this project."""
    image = torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)
    output = torch.nn.functional.max_pool2d(image, 3, stride=2, padding=1)
    output.backward(torch.tensor(gradient.transpose(0, 3, 1, 2).copy()))
    return output.detach().numpy().transpose(0, 2, 3, 1), image.grad.numpy().transpose(0, 2, 3, 1)


def check_conv_transpose(x, kernel, gradient, expected):
    for a, b in zip(output_and_pull_back(conv_transpose, gradient, x, kernel), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def check_max_pool(x, gradient, expected):
    output, x_gradient = output_and_pull_back(max_pool, gradient, x)
    np.testing.assert_array_equal(output, expected[0])
    np.testing.assert_allclose(x_gradient, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_conv_transpose_equals_pytorch(shape):
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    n, height, width, channels = shape
    x, kernel = normal(6, shape), normal(7, (4, 4, channels, 3))
    gradient = normal(8, (n, 2 * height, 2 * width, 3))
    check_conv_transpose(x, kernel, gradient, torch_conv_transpose(torch, x, kernel, gradient))


def with_nan(seed, shape):
    """Ties, and a NaN in about one window of three."""
    x = rectified_integers(seed, shape)
    x[np.random.default_rng(seed + 1).random(shape) < 0.05] = np.nan
    return x


@pytest.mark.parametrize("shape", [(2, 6, 8, 5), (3, 1, 4, 2), (2, 3, 2, 64)])
def test_batch_norm_equals_pytorch(shape):
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    x, variables = batch_norm_case(shape)
    theirs = torch.nn.BatchNorm2d(shape[-1]).train()
    names = {"weight": ("params", "scale"), "bias": ("params", "bias")}
    names |= {"running_mean": ("batch_stats", "mean"), "running_var": ("batch_stats", "var")}
    with torch.no_grad():
        for name, (kind, own) in names.items():
            getattr(theirs, name).copy_(torch.tensor(variables[kind][own]))
    theirs_x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    y = theirs(theirs_x)
    gradient = normal(36, shape)
    y.backward(torch.tensor(gradient.transpose(0, 3, 1, 2)))

    def layer(params, x):
        return apply_norm(BatchNorm(False), variables | {"params": params}, x)

    (own_y, updated), pull_back = jax.vjp(layer, variables["params"], x)
    params_grad, x_grad = pull_back((gradient, jax.tree.map(jnp.zeros_like, updated)))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(own_y, y.detach().numpy().transpose(0, 2, 3, 1))
    close(x_grad, theirs_x.grad.numpy().transpose(0, 2, 3, 1))
    close(params_grad["scale"], theirs.weight.grad.numpy())
    close(params_grad["bias"], theirs.bias.grad.numpy())
    close(updated["batch_stats"]["mean"], theirs.running_mean.numpy())
    # PyTorch keeps the unbiased variance.
    own, count = variables["batch_stats"]["var"], np.prod(shape[:-1])
    unbiased = 0.9 * own + (updated["batch_stats"]["var"] - 0.9 * own) * count / (count - 1)
    close(unbiased, theirs.running_var.numpy())


@pytest.mark.parametrize("fill", [normal, rectified_integers, with_nan])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], (2, 17, 20, 8)])
def test_max_pool_equals_pytorch(shape, fill):
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    n, height, width, channels = shape
    x, gradient = fill(9, shape), normal(10, (n, -(-height // 2), -(-width // 2), channels))
    check_max_pool(x, gradient, torch_max_pool(torch, x, gradient))


def test_layers_equal_the_recorded_numbers_of_pytorch():
    with np.load(FIXTURE) as file:
        numbers = dict(file)
    check_conv_transpose(
        numbers["x"],
        numbers["kernel"],
        numbers["gradient"],
        (numbers["output"], numbers["x_gradient"], numbers["kernel_gradient"]),
    )
    pooled = (numbers["pool_output"], numbers["pool_x_gradient"])
    check_max_pool(numbers["pool_x"], numbers["pool_gradient"], pooled)


@pytest.mark.parametrize(
    "make", [lambda **kernel: Conv(3, (4, 4), **kernel), lambda **kernel: ConvTranspose(3, **kernel)]
)
def test_an_array_that_is_there_is_taken_if_it_fits_and_nothing_is_drawn(make):
    x, drawn = jnp.ones((1, 4, 4, 2)), []

    def draw(key, shape, dtype):
        drawn.append(shape)
        return jnp.ones(shape, dtype)

    layer = make(kernel_init=draw)
    variables = layer.init(jax.random.key(0), x)
    assert drawn == [(4, 4, 2, 3)]
    assert (
        layer.apply({"params": {"kernel": 2 * variables["params"]["kernel"]}}, x).max()
        == 2 * layer.apply(variables, x).max()
    )
    assert len(drawn) == 1
    with pytest.raises(errors.ScopeParamShapeError, match=r"\(4, 4, 2, 5\)"):
        layer.apply({"params": {"kernel": jnp.ones((4, 4, 2, 5))}}, x)
    with pytest.raises(errors.ScopeParamNotFoundError):
        layer.apply({"params": {"other": jnp.ones(3)}}, x)
    boxed = make(kernel_init=nn.with_partitioning(draw, (None, None, None, "features")))
    variables = boxed.init(jax.random.key(0), x)
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    np.testing.assert_array_equal(boxed.apply(variables, x), layer.apply(nn.unbox(variables), x))


def test_layers_of_float32_work_where_python_s_numbers_are_float64():
    with jax.enable_x64(True):
        x = jnp.ones((1, 16, 16, 32), jnp.float32)
        assert winograd_pays(x, (3, 3, 32, 32), 1, 1)
        layer = Conv(32, (3, 3), padding=1)
        variables = layer.init(jax.random.key(0), x)
        assert jax.jit(layer.apply)(variables, x).dtype == jnp.float32


def record():
    """Writes the fixture; needs PyTorch."""
    import torch

    x, kernel, gradient = normal(11, (2, 3, 5, 4)), normal(12, (4, 4, 4, 3)), normal(13, (2, 6, 10, 3))
    pool_x, pool_gradient = with_nan(14, (2, 7, 6, 3)), normal(15, (2, 4, 3, 3))
    output, x_gradient, kernel_gradient = torch_conv_transpose(torch, x, kernel, gradient)
    pool_output, pool_x_gradient = torch_max_pool(torch, pool_x, pool_gradient)
    np.savez_compressed(
        FIXTURE,
        x=x,
        kernel=kernel,
        gradient=gradient,
        output=output,
        x_gradient=x_gradient,
        kernel_gradient=kernel_gradient,
        pool_x=pool_x,
        pool_gradient=pool_gradient,
        pool_output=pool_output,
        pool_x_gradient=pool_x_gradient,
    )


if __name__ == "__main__":
    record()


def megabytes(function, *shapes):
    """What XLA needs to compute it, besides the arguments and the outputs."""
    arguments = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=is_shape)
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 2**20


def is_shape(x):
    return isinstance(x, tuple) and all(isinstance(length, int) for length in x)


# The kernels' gradients take all images at once, but of the third in two groups, one after the other; the last one's is
# not Winograd's.
@pytest.mark.parametrize("shape", [(2, 64, 64, 64), (8, 32, 32, 64), (8, 64, 64, 64), (4, 64, 64, 16)])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_backward_pass_of_a_further_layer_costs_the_memory_of_one_map(normalised, shape):
    """Its input is copied for the kernel's gradient when that is computed, not in the forward pass.

    Besides the map XLA may keep where the ReLU let it pass, a byte for each value. Of a batch norm it keeps the input
    alone, and not what that is when it is centred.
    """
    variables = BatchNorm(False).init(jax.random.key(0), jnp.zeros(shape[-1:]))

    def loss(kernels, x):
        for kernel in kernels:
            x = conv(x, kernel, 1, 1)
            if normalised:
                x, _ = apply_norm(BatchNorm(False), variables, x)
            x = jax.nn.relu(x)
        return jnp.vdot(x, x)

    kernel = (3, 3, shape[-1], shape[-1])
    few, many = (megabytes(jax.grad(loss), [kernel] * number, shape) for number in (3, 5))
    assert many - few <= 2 * 1.3 * 4 * np.prod(shape) / 2**20


@pytest.mark.parametrize("images", [4, 8])
def test_the_backward_pass_of_a_further_layer_with_a_stride_costs_the_memory_of_its_output(images):
    shape = images, 64, 64, 16

    def loss(kernels, x):
        for kernel in kernels:
            x = jax.nn.relu(conv(x, kernel, 2, 1).repeat(2, 1).repeat(2, 2))
        return jnp.vdot(x, x)

    few, many = (megabytes(jax.grad(loss), [(3, 3, 16, 16)] * layers, shape) for layers in (4, 8))
    assert many - few <= 4 * 0.3 * 4 * np.prod(shape) / 2**20


@pytest.mark.parametrize("shape", [(4, 64, 64, 16), (8, 32, 32, 32)])
def test_the_backward_pass_of_a_further_transposed_layer_costs_the_memory_of_its_input(shape):
    def halve(x):
        n, height, width, channels = x.shape
        return x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))

    def loss(kernels, x):
        for kernel in kernels:
            x = jax.nn.relu(halve(conv_transpose(x, kernel)))
        return jnp.vdot(x, x)

    few, many = (megabytes(jax.grad(loss), [(4, 4, shape[-1], shape[-1])] * layers, shape) for layers in (4, 8))
    assert many - few <= 4 * 1.3 * 4 * np.prod(shape) / 2**20


def test_the_poolings_barrier_is_on_cpu_only():
    step = jax.jit(jax.grad(lambda x: max_pool(x).sum()))
    shape = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    counts = {
        platform: step.trace(shape).lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier")
        for platform in ("cpu", "cuda")
    }
    assert counts == {"cpu": 1, "cuda": 0}


def test_the_backward_pass_of_the_pooling_keeps_no_map():
    """But for which of its nine values each window chose, a byte for each."""
    shape, kernel = (2, 64, 64, 64), (4, 4, 64, 64)

    def needs(pool):
        def loss(x, kernel):
            y = conv_transpose(pool(jnp.sin(x)), kernel)
            return jnp.vdot(y, y)

        return megabytes(jax.grad(loss, (0, 1)), shape, kernel)

    one_map = 4 * np.prod(shape) / 2**20
    assert needs(lambda x: max_pool(jax.nn.relu(x))) - needs(lambda x: x[:, ::2, ::2]) <= 0.5 * one_map

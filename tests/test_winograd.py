"""winograd.py against the convolution in float64, and where it is taken."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import convolution
from jaxseg import winograd as module
from jaxseg.convolution import conv, conv_transpose
from jaxseg.cpu import copies
from jaxseg.winograd import winograd, winograd_input_grad, winograd_kernel_grad, winograd_pays
from tests.test_layers import assert_close, megabytes, normal, numpy_conv, value_and_gradients

# (N, H, W, C, O): heights that a tile's divides, and that are one, two and three short of it; images in one group, in
# several, one by one.
CASES = [
    (1, 32, 5, 32, 32),
    (2, 16, 7, 32, 40),
    (3, 22, 4, 33, 32),
    (4, 11, 6, 40, 33),
    (5, 24, 1, 32, 32),
    (6, 9, 9, 32, 33),
    (8, 3, 10, 33, 64),
]
SMALL, STEM = (3, 3, 64, 64), (7, 7, 3, 64)
WAYS = ("winograd", "winograd_input_grad", "winograd_kernel_grad")


def inputs(case, mean=0.0, taps=3):
    n, height, width, channels, features = case
    return normal(1, (n, height, width, channels)) + np.float32(mean), normal(2, (taps, taps, channels, features))


def gradient_of(output):
    """What `numpy_conv` takes the gradients for."""
    return np.cos(np.arange(output.size, dtype=np.float32)).reshape(output.shape)


@pytest.mark.parametrize(("taps", "padding"), [(3, 1), (2, 1), (2, 0), (3, 0), (3, 2)])
# Whole; and, of three cases, in groups and image by image.
@pytest.mark.parametrize(
    ("case", "at_once"),
    [
        *((case, 6 * 2**20) for case in CASES),
        *((case, at_once) for case in CASES[::3] for at_once in (30_000, 1)),
    ],
    ids=str,
)
def test_the_convolution_and_its_gradients_equal_numpy_in_float64(case, at_once, taps, padding, monkeypatch):
    n, height, width, channels, features = case
    if min(height, width) < taps - padding:
        case = (n, height + 2, width + 2, channels, features)
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    x, kernel = inputs(case, taps=taps)
    output, x_grad, kernel_grad = numpy_conv(x, kernel, 1, padding)
    g = gradient_of(output)
    # Compiled anew: at_once is no argument.
    forward = jax.jit(lambda x, kernel, g: (winograd(x, kernel, 1, padding), winograd_input_grad(g, kernel, padding)))
    assert_close(forward(x, kernel, g), [output, x_grad], 1e-5)
    backward = jax.jit(lambda x, g: winograd_kernel_grad(x, g, taps, padding))
    assert_close([backward(x, g)], [kernel_grad], 1e-5)


@pytest.mark.parametrize("padding", [3, 2, 1, 0, 6])
@pytest.mark.parametrize(
    "case", [(2, 12, 9, 3, 8), (1, 14, 8, 3, 5), (3, 16, 7, 4, 8), (2, 8, 11, 1, 1), (2, 40, 10, 3, 64)], ids=str
)
def test_a_stem_equals_numpy_in_float64(case, padding):
    x, kernel = inputs(case, taps=7)
    got = jax.jit(lambda x, kernel: winograd(x, kernel, 2, padding))(x, kernel)
    assert_close([got], numpy_conv(x, kernel, 2, padding)[:1], 1e-5)


@pytest.fixture
def called(monkeypatch):
    """Which functions of winograd.py `conv` and `conv_transpose` call."""
    jax.clear_caches()  # what another test has traced is not called again
    names = []
    for name in WAYS:
        form = getattr(convolution, name)
        monkeypatch.setattr(convolution, name, lambda *a, name=name, form=form: names.append(name) or form(*a))
    return names


@pytest.mark.parametrize(
    ("case", "taps", "padding", "expected"),
    [
        ((4, 12, 7, 32, 32), 3, 1, (True, True, True)),
        ((8, 16, 6, 32, 64), 3, 1, (True, True, True)),
        ((8, 16, 8, 64, 64), 3, 1, (True, True, True)),
        ((1, 8, 9, 32, 64), 3, 1, (True, False, True)),
        ((3, 13, 8, 128, 32), 3, 1, (True, True, True)),
        ((4, 14, 7, 32, 32), 3, 0, (True, True, True)),
        ((4, 9, 7, 32, 32), 3, 0, (True, True, True)),
        ((4, 10, 7, 32, 32), 3, 2, (True, True, True)),
        ((4, 11, 9, 64, 64), 2, 1, (True, True, True)),
        ((4, 13, 9, 64, 64), 2, 0, (True, True, True)),
        ((4, 13, 9, 32, 64), 2, 0, (False, False, False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("at_once", [6 * 2**20, 4 * 2 * 16 * 8 * 64])
def test_conv_equals_numpy_where_it_takes_this_form(case, taps, padding, expected, at_once, called, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    x, kernel = inputs(case, taps=taps)
    got = value_and_gradients(functools.partial(conv, strides=1, padding=padding), x, kernel)
    assert set(called) == {name for name, taken in zip(WAYS, expected, strict=True) if taken}
    assert_close(got, numpy_conv(x, kernel, 1, padding), 1e-5)


@pytest.mark.parametrize(("case", "taken"), [((2, 20, 17, 3, 32), True), ((2, 19, 16, 3, 32), False)], ids=str)
def test_conv_with_strides_equals_numpy_where_it_takes_this_form(case, taken, called):
    x, kernel = inputs(case, taps=7)
    got = value_and_gradients(functools.partial(conv, strides=2, padding=3), x, kernel)
    assert called == ["winograd"] * taken
    assert_close(got, numpy_conv(x, kernel, 2, 3), 1e-5)


# A decoder's layers: (N, H, W, C, O), and whether the output and the gradients of input and kernel take this form.
TRANSPOSED = [
    ((4, 24, 9, 128, 64), (True, True, True)),
    ((4, 12, 16, 64, 32), (True, False, True)),
    ((2, 12, 16, 32, 16), (False, False, False)),
    ((4, 6, 7, 512, 256), (False, False, False)),
]


@pytest.mark.parametrize(("case", "expected"), TRANSPOSED, ids=str)
def test_transposed_convolutions_in_this_form_equal_laxs(case, expected, called, monkeypatch):
    """Forward and for the input's gradient their kernel is laid as blocks once, before the sums."""
    channels, features = case[3:]
    laid, copies = [], convolution.copies
    monkeypatch.setattr(convolution, "copies", lambda change, arrays: laid.append(change) or copies(change, arrays))
    x, kernel = normal(1, case[:4]), normal(2, (4, 4, channels, features))
    got = value_and_gradients(lambda *arguments: conv_transpose(*arguments), x, kernel)
    assert called == [name for name, taken in zip(WAYS, expected, strict=True) if taken]
    assert laid.count(convolution._kernel_to_blocks) == sum(expected[:2])

    def plain(x, kernel):
        return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert_close(got, value_and_gradients(plain, x, kernel), 1e-5)


def test_conv_in_this_form_under_vmap_of_both_arguments():
    parts = [inputs((4, 12, 7, 32, 32)), inputs((4, 12, 7, 32, 32), mean=1.0)]
    x, kernel = (np.stack(arrays) for arrays in zip(*parts, strict=True))

    def step(x, kernel):
        return value_and_gradients(functools.partial(conv, strides=1, padding=1), x, kernel)

    alone = [numpy_conv(*part, 1, 1) for part in parts]
    assert_close(jax.vmap(step)(x, kernel), [np.stack(outputs) for outputs in zip(*alone, strict=True)], 1e-5)


def test_a_stem_under_vmap_of_both_arguments():
    parts = [inputs((2, 12, 9, 3, 8), mean, taps=7) for mean in (0.0, 1.0)]
    x, kernel = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    got = jax.vmap(lambda x, kernel: winograd(x, kernel, 2, 3))(x, kernel)
    assert_close([got], [np.stack([numpy_conv(*part, 2, 3)[0] for part in parts])], 1e-5)


def test_the_kernels_gradient_in_this_form_under_pmap():
    _, kernel = inputs((4, 12, 7, 32, 32))
    x = normal(4, (jax.local_device_count(), 4, 12, 7, 32))

    def gradient(x, kernel):
        return jax.lax.psum(value_and_gradients(lambda x, kernel: conv(x, kernel, 1, 1), x, kernel)[2], "batch")

    got = jax.pmap(gradient, axis_name="batch", in_axes=(0, None), out_axes=None)(x, kernel)
    assert_close([got], [sum(numpy_conv(part, kernel, 1, 1)[2] for part in x)], 1e-5)


def test_of_too_many_groups_the_map_is_taken_whole(monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 12, 7, 32), (3, 3, 32, 32))]
    text = jax.jit(lambda x, kernel: winograd(x, kernel, 1, 1)).lower(*arguments).as_text()
    assert text.count("stablehlo.convolution") == 6


def test_a_stem_is_taken_whole(monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 4 * 2 * 12 * 8 * 3)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 12, 8, 3), STEM)]
    text = jax.jit(lambda x, kernel: winograd(x, kernel, 2, 3)).lower(*arguments).as_text()
    assert text.count("stablehlo.convolution") == 6


def test_the_kernels_sums_are_not_kept_from_the_beginning():
    """Otherwise each further layer would need the memory of two kernels: 4.5 MiB, when its map has 1.1."""

    def layers(kernels, x):
        for kernel in kernels:
            x = jnp.tanh(winograd(x, kernel, 1, 1))
        return x

    few, many = (megabytes(layers, [(3, 3, 256, 256)] * number, (8, 12, 12, 256)) for number in (4, 8))
    assert many - few <= 1


@pytest.mark.parametrize(("taps", "times"), [(3, 4), (2, 2)])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_rounding_errs_a_few_times_as_much_as_in_a_plain_convolution(mean, taps, times):
    x, kernel = inputs((2, 24, 28, 128, 64), mean, taps)
    exact = numpy_conv(x, kernel, 1, 1)
    g = gradient_of(exact[0])

    def plain_conv(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=numbers)

    plain = value_and_gradients(plain_conv, x, kernel)
    got = winograd(x, kernel, 1, 1), winograd_input_grad(g, kernel, 1), winograd_kernel_grad(x, g, taps, 1)
    for y, plain_y, exact_y in zip(got, plain, exact, strict=True):
        error, plain_error = (np.sqrt(np.mean((np.asarray(a, np.float64) - exact_y) ** 2)) for a in (y, plain_y))
        assert error < times * plain_error


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_rounding_of_a_stem_errs_a_few_times_as_much_as_in_a_plain_convolution(mean):
    x, kernel = inputs((2, 96, 64, 3, 64), mean, taps=7)
    exact = numpy_conv(x, kernel, 2, 3)[0]
    numbers = ("NHWC", "HWIO", "NHWC")
    plain = jax.lax.conv_general_dilated(x, kernel, (2, 2), [(3, 3)] * 2, dimension_numbers=numbers)
    error, plain_error = (
        np.sqrt(np.mean((np.asarray(y, np.float64) - exact) ** 2)) for y in (winograd(x, kernel, 2, 3), plain)
    )
    assert error < 3 * plain_error


def test_a_filter_that_moves_each_channel_gives_back_the_map():
    """But for rounding: the first row of the kernel is multiplied by sixths and 24ths."""
    x = np.random.default_rng(3).integers(-9, 9, (2, 10, 8, 32)).astype(np.float32)
    kernel = np.zeros((3, 3, 32, 32), np.float32)
    kernel[0, 2] = np.eye(32)  # one up, one to the right
    expected = np.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0)))[:, :-1, 1:]
    np.testing.assert_allclose(winograd(x, kernel, 1, 1), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "kernel", "strides", "padding", "pays"),
    [
        ((4, 48, 56, 64), SMALL, 1, 1, (True, True)),
        ((4, 48, 56, 64), SMALL, 2, 1, (False, False)),
        ((4, 48, 56, 64), SMALL, 1, 0, (True, True)),
        ((4, 48, 56, 64), SMALL, 1, 3, (False, False)),
        ((4, 48, 56, 64), SMALL, 1, -1, (False, False)),
        ((4, 48, 56, 64), (3, 2, 64, 64), 1, 1, (False, False)),
        ((4, 48, 56, 64), (4, 4, 64, 64), 1, 1, (False, False)),
        ((4, 48, 56, 64), (2, 2, 64, 128), 1, 1, (True, True)),
        ((4, 96, 112, 32), (2, 2, 32, 64), 1, 1, (False, False)),  # few channels for two taps
        ((4, 48, 56, 64), (1, 1, 64, 64), 1, 1, (False, False)),
        ((4, 48, 56, 64), (3, 3, 64, 9), 1, 1, (False, False)),  # few features
        ((4, 48, 56, 3), (3, 3, 3, 64), 1, 1, (False, False)),  # few channels
        ((4, 6, 7, 512), (3, 3, 512, 512), 1, 1, (False, False)),  # more channels than pixels
        ((8, 11, 14, 512), (3, 3, 512, 512), 1, 1, (True, True)),
        ((4, 12, 14, 256), (3, 3, 256, 256), 1, 1, (True, True)),
        ((5, 12, 14, 256), (3, 3, 256, 256), 1, 1, (True, True)),
        ((64, 5, 14, 64), SMALL, 1, 1, (False, False)),  # two tiles for five rows
        ((8, 88, 112, 64), SMALL, 1, 1, (True, True)),  # four groups
        ((16, 88, 112, 64), SMALL, 1, 1, (False, False)),  # eight
        ((64, 8, 2, 256), (3, 3, 256, 256), 1, 1, (False, False)),  # narrower than the kernel
        ((1, 176, 224, 64), SMALL, 1, 1, (False, False)),  # an image does not fit into the cache
        ((1, 176, 224, 128), (3, 3, 128, 128), 1, 1, (True, False)),
        ((0, 48, 56, 64), SMALL, 1, 1, (False, False)),
        ((8, 352, 448, 3), STEM, 2, 3, (True, False)),
        ((1, 8, 7, 3), STEM, 2, 3, (True, False)),
        ((2, 1024, 1024, 3), STEM, 2, 3, (True, False)),
        ((2, 1024, 1026, 3), STEM, 2, 3, (False, False)),  # the products would take much memory
        ((1, 7, 8, 3), STEM, 2, 3, (False, False)),  # an odd height
        ((1, 8, 6, 3), STEM, 2, 3, (False, False)),  # narrower than the kernel
        ((1, 6, 8, 3), STEM, 2, 3, (False, False)),  # lower than it
        ((1, 8, 8, 3), STEM, 2, 2, (False, False)),
        ((1, 8, 8, 3), STEM, 1, 3, (False, False)),
        ((1, 9, 9, 3), STEM, 3, 3, (False, False)),
        ((1, 8, 8, 3), (7, 5, 3, 64), 2, 3, (False, False)),
        ((1, 8, 8, 4), (7, 7, 4, 64), 2, 3, (False, False)),
        ((1, 8, 8, 3), (7, 7, 3, 16), 2, 3, (False, False)),  # few features
        ((0, 8, 8, 3), STEM, 2, 3, (False, False)),
    ],
)
def test_where_it_pays(shape, kernel, strides, padding, pays):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert tuple(winograd_pays(x, kernel, strides, padding, kernel_grad) for kernel_grad in (False, True)) == pays


@pytest.mark.parametrize(
    ("kernel", "strides", "padding", "height", "ways"), [(SMALL, 1, 1, 48, (False, True)), (STEM, 2, 3, 64, (False,))]
)
def test_it_takes_float32_and_known_sizes_only(kernel, strides, padding, height, ways):
    for dtype, pays in ((jnp.float32, True), (jnp.bfloat16, False), (jnp.float16, False), (jnp.float64, False)):
        x = jax.eval_shape(lambda: 0.0).update(shape=(4, height, 56, kernel[2]), dtype=dtype)
        assert {winograd_pays(x, kernel, strides, padding, kernel_grad) for kernel_grad in ways} == {pays}
    for sizes in (f"n, h, w, {kernel[2]}", f"n, {height}, 56, {kernel[2]}"):
        unknown = jax.ShapeDtypeStruct(jax.export.symbolic_shape(sizes), jnp.float32)
        assert not winograd_pays(unknown, kernel, strides, padding)


@pytest.mark.parametrize(
    ("layer", "shape", "size", "cpu"),
    [
        (functools.partial(conv, strides=1, padding=1), (4, 12, 8, 32), (3, 3, 32, 32), (6, 6, 6)),
        (conv_transpose, (4, 24, 9, 128), (4, 4, 128, 64), (4, 4, 4)),
        (functools.partial(conv, strides=2, padding=3), (2, 32, 9, 3), STEM, (6, 0, 1)),
    ],
)
@pytest.mark.parametrize("result", range(3))  # the output, the gradients of x and the kernel
def test_a_cpu_takes_several_narrow_convolutions_and_a_gpu_one(result, layer, shape, size, cpu):
    function = jax.grad(lambda x, kernel: layer(x, kernel).sum(), result - 1) if result else layer
    traced = jax.jit(function).trace(jnp.zeros(shape), jnp.zeros(size))
    counts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution")
        for platform in ("cpu", "cuda")
    }
    assert counts == {"cpu": cpu[result], "cuda": 1}


@pytest.mark.parametrize(("number", "groups"), [(1, 1), (2, 1), (3, 3), (4, 2), (6, 3), (7, 7), (8, 4)])
def test_groups_are_equal_and_fit_at_once_unless_they_are_one_image(number, groups, monkeypatch):
    x = jax.ShapeDtypeStruct((number, 4, 4, 8), jnp.float32)
    monkeypatch.setattr(module, "_AT_ONCE", 2 * 4 * 4 * 4 * 8)
    assert module._groups(x) == groups


def test_copies_change_the_order():
    arrays = [jnp.arange(6.0).reshape(2, 3).at[0, 1].set(jnp.inf), jnp.ones((4, 0))]
    for got, array in zip(copies(jnp.transpose, arrays), arrays, strict=True):
        np.testing.assert_array_equal(got, array.T)


@pytest.mark.usefixtures("optimised")
def test_nothing_is_computed_in_the_order_of_a_copy():
    """`tanh` could be computed in the loop that pads and transposes."""

    def step(x):
        return copies(lambda x: jnp.pad(x, 1).T, [jnp.tanh(x)])[0]

    def is_mixed(program):
        return any("tanh(" in loop and "pad(" in loop for loop in program.split("\n\n"))

    x = jnp.ones((64, 32))
    program = jax.jit(step).lower(x).compile().as_text()
    assert "tanh(" in program and "pad(" in program and not is_mixed(program)
    assert is_mixed(jax.jit(lambda x: jnp.pad(jnp.tanh(x), 1).T).lower(x).compile().as_text())


@pytest.mark.usefixtures("optimised")
def test_layers_of_one_shape_have_the_same_loops():
    """XLA compiles equal loops once; what differs from layer to layer it would compile each time."""

    def loops(layers):
        def forward(x, kernels):
            for kernel in kernels:
                x = jax.nn.relu(conv(x, kernel, 1, 1))
            return x

        shapes = jax.ShapeDtypeStruct((2, 16, 16, 32), jnp.float32), jax.ShapeDtypeStruct((3, 3, 32, 32), jnp.float32)
        program = jax.jit(forward).lower(shapes[0], [shapes[1]] * layers).compile().as_text()
        bodies = re.findall(r"^%\S+ \(.*?^}", program, re.DOTALL | re.MULTILINE)
        return {re.sub(r"metadata=\{.*?\}|%[\w.-]+|param_[\d.]+", "", body) for body in bodies}

    assert winograd_pays(jnp.zeros((2, 16, 16, 32)), (3, 3, 32, 32), 1, 1)
    # Only what is done with a layer's output depends on whether another one follows.
    assert 12 < len(loops(1)) <= len(loops(4)) <= len(loops(1)) + 2

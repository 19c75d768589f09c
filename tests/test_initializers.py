"""Numbers drawn on the host: as many, and distributed, as if the model drew them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import stats

from experiments.prepare import make_improved
from jaxseg.initializers import constant, init, lecun_normal, normal
from jaxseg.resnet import ResNet
from jaxseg.segmenter import Segmenter

IMAGE = np.zeros((1, 32, 32, 3), np.uint8)


def segmenter():
    return Segmenter(ResNet("resnet18"), make_improved(5, 0.0))


def initialise(key):
    return init(segmenter(), key, IMAGE)


@pytest.fixture(scope="module")
def variables():
    return initialise(jax.random.key(0))


def kernels(variables):
    paths = jax.tree_util.tree_leaves_with_path(variables["params"])
    named = {"/".join(key.key for key in path): leaf for path, leaf in paths}
    return {name: leaf for name, leaf in named.items() if leaf.ndim == 4}


def expected_deviation(name, kernel):
    """He et al.: forward, of the four taps that an output sees; backward, of all. Of the head LeCun et al.'s."""
    height, width, channels, features = kernel.shape
    if "head" in name:
        return np.sqrt(1 / channels)
    return np.sqrt(2 / (4 * channels) if "transpose" in name else 2 / (height * width * features))


def test_it_is_what_the_model_asks_for(variables):
    shapes = jax.eval_shape(segmenter().init, jax.random.key(0), IMAGE)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    expected = {"scale": 1, "bias": 0, "mean": 0, "var": 1}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        if leaf.ndim == 1:
            assert (leaf == expected[path[-1].key]).all(), path


def test_each_kernel_has_its_own_deviation(variables):
    drawn = kernels(variables)
    assert len(drawn) == 20 + 5 + 1
    for name, kernel in drawn.items():
        expected = expected_deviation(name, kernel)
        # A deviation estimated from n numbers deviates itself by 1 / sqrt(2 n).
        assert kernel.std() / expected == pytest.approx(1, abs=5 / np.sqrt(2 * kernel.size)), name
        assert kernel.mean() == pytest.approx(0, abs=5 * expected / np.sqrt(kernel.size)), name
        sample = kernel.ravel()[:: max(1, kernel.size // 4000)] / expected
        assert stats.kstest(sample, "norm").pvalue > 1e-4, name


def test_no_numbers_come_twice(variables):
    """Rounded after each kernel's deviation is taken out, three numbers in a row hardly ever come again by chance."""
    drawn = kernels(variables).items()
    numbers = np.concatenate([kernel.ravel() / np.float32(expected_deviation(name, kernel)) for name, kernel in drawn])
    assert numbers.size > 10**7
    whole = np.round(1e4 * numbers).astype(np.int64) + 2**19
    rows = np.sort(whole[:-2] << 40 | whole[1:-1] << 20 | whole[2:])
    assert (np.diff(rows) == 0).sum() < 10


def test_the_key_decides(variables):
    jax.tree.map(np.testing.assert_array_equal, variables, initialise(jax.random.key(0)))
    for name, kernel in kernels(initialise(jax.random.key(1))).items():
        correlation = np.corrcoef(kernel.ravel(), kernels(variables)[name].ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(kernel.size), name


def test_nothing_is_compiled(caplog):
    """No generator for each of 26 kernels, and no model."""
    key = jax.random.key(0)
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        initialise(key)
        assert not [record.message for record in caplog.records if "XLA compilation" in record.message]
        jax.jit(lambda x: x + 1)(0.0)
    assert [record.message for record in caplog.records if "XLA compilation" in record.message]


def test_a_key_of_any_kind_will_do():
    def draw(key):
        return init(dense(normal(lambda shape: 1.0)), key, np.ones((1, 2)))["params"]["kernel"]

    key, longer = jax.random.key(7), jax.random.key(7, impl="rbg")
    np.testing.assert_array_equal(draw(key), draw(jax.random.key_data(key)))
    np.testing.assert_array_equal(draw(longer), draw(longer))
    assert (draw(longer) != draw(key)).any()


def test_by_itself_an_initializer_draws_from_its_key():
    draw = normal(lambda shape: 3.0)
    x, y = (np.asarray(draw(jax.random.key(seed), (100, 100), jnp.float32)) for seed in (0, 1))
    assert x.std() == pytest.approx(3, rel=0.05) and (x != y).any()
    np.testing.assert_array_equal(x, 3 * jax.random.normal(jax.random.key(0), (100, 100)))
    assert draw(jax.random.key(0), (2, 3), jnp.bfloat16).dtype == jnp.bfloat16
    assert lecun_normal()(jax.random.key(0), (8, 8, 4, 999)).std() == pytest.approx(1 / 16, rel=0.01)
    filled = constant(2.0)(None, (2, 3), jnp.bfloat16)
    assert filled.dtype == jnp.bfloat16 and filled.shape == (2, 3) and (filled == 2).all()
    # And again after a model was initialised at once.
    at_once = init(dense(normal(lambda shape: 1.0)), jax.random.key(0), np.ones((1, 2)))["params"]["kernel"]
    assert isinstance(at_once, np.ndarray) and at_once.shape == (2, 3)
    np.testing.assert_array_equal(x, draw(jax.random.key(0), (100, 100)))


def dense(kernel_init):
    return nn.Dense(3, kernel_init=kernel_init, bias_init=constant(0.0))


def test_arrays_of_their_own_dtype_and_models_without_random_numbers():
    model = dense(normal(lambda shape: 1.0)).clone(param_dtype=jnp.bfloat16)
    assert init(model, jax.random.key(0), np.ones((1, 2)))["params"]["kernel"].dtype == jnp.bfloat16
    params = init(dense(constant(0.5)), jax.random.key(0), np.ones((1, 2)))["params"]
    np.testing.assert_array_equal(params["kernel"], np.full((2, 3), 0.5, np.float32))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(lambda layer, x, _: (layer(x), None), {"params": 0}, split_rngs={"params": True}, length=2)
        return layers(nn.Dense(2, kernel_init=constant(1.0), bias_init=constant(0.0), name="dense"), x, None)[0]


class KeptAndDrawn(nn.Module):
    @nn.compact
    def __call__(self, x):
        return dense(normal(lambda shape: 1.0))(dense(KEPT_TRACE)(x))


KEPT_TRACE = jax.jit(normal(lambda shape: 1.0), static_argnums=(1, 2))


@pytest.mark.parametrize("model", [nn.Dense(2), dense(nn.initializers.ones), Scanned(), dense(KEPT_TRACE)])
def test_what_is_not_of_these_initializers_is_as_the_model_makes_it(model):
    key, x = jax.random.key(0), np.ones((1, 2))
    got = init(model, key, x)
    # Once more, of what is traced already.
    jax.tree.map(np.testing.assert_array_equal, init(model, key, x), got)
    expected = jax.tree.map(np.asarray, model.init(key, x))
    assert np.all(expected["params"].get("kernel", 1))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(got))


def test_what_is_noted_once_and_never_again_draws_no_numbers():
    drawn, again = (init(KeptAndDrawn(), jax.random.key(0), np.ones((1, 2))) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, drawn, again)


def test_no_tracer_is_kept():
    with jax.checking_leaks():
        init(dense(normal(lambda shape: 1.0)), jax.random.key(0), np.ones((1, 2)))


def test_a_model_that_fails_leaves_nothing_behind():
    def fail(key, shape, dtype):
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        init(dense(fail), jax.random.key(0), np.ones((1, 2)))
    draw = normal(lambda shape: 1.0)
    assert (np.asarray(draw(jax.random.key(0), (5,))) != 0).all()

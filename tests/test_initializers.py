"""Numbers drawn at once: as many, and distributed, as if each array drew its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import stats

from experiments.prepare import make_improved
from jaxseg.initializers import _Numbers, init, normal
from jaxseg.resnet import ResNet
from jaxseg.segmenter import Segmenter

IMAGE = np.zeros((1, 32, 32, 3), np.uint8)


def segmenter():
    return Segmenter(ResNet("resnet18"), make_improved(5, 0.0))


@jax.jit
def initialise(key):
    return init(segmenter(), key, IMAGE)


@pytest.fixture(scope="module")
def variables():
    return jax.tree.map(np.asarray, initialise(jax.random.key(0)))


def kernels(variables):
    """Those that `normal` draws: all but the head's."""
    paths = jax.tree_util.tree_leaves_with_path(variables["params"])
    named = {"/".join(key.key for key in path): leaf for path, leaf in paths}
    return {name: leaf for name, leaf in named.items() if leaf.ndim == 4 and "head" not in name}


def expected_deviation(name, kernel):
    """He et al.: forward, of the four taps that an output sees; backward, of all."""
    height, width, channels, features = kernel.shape
    return np.sqrt(2 / (4 * channels) if "transpose" in name else 2 / (height * width * features))


def test_it_is_what_the_model_asks_for(variables):
    shapes = jax.eval_shape(segmenter().init, jax.random.key(0), IMAGE)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert (variables["params"]["encoder"]["bn1"]["scale"] == 1).all()
    assert (variables["batch_stats"]["encoder"]["bn1"]["mean"] == 0).all()


def test_each_kernel_has_its_own_deviation(variables):
    drawn = kernels(variables)
    assert len(drawn) == 20 + 5
    for name, kernel in drawn.items():
        expected = expected_deviation(name, kernel)
        # A deviation estimated from n numbers deviates itself by 1 / sqrt(2 n).
        assert kernel.std() / expected == pytest.approx(1, abs=5 / np.sqrt(2 * kernel.size)), name
        assert kernel.mean() == pytest.approx(0, abs=5 * expected / np.sqrt(kernel.size)), name
        sample = kernel.ravel()[:: kernel.size // 4000] / expected
        assert stats.kstest(sample, "norm").pvalue > 1e-4, name


def test_numbers_are_handed_out_one_after_the_other():
    numbers = _Numbers(jnp.arange(10.0))
    np.testing.assert_array_equal(numbers.take((2, 3)), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(numbers.take(()), 6)
    np.testing.assert_array_equal(numbers.take((3, 1)), [[7], [8], [9]])
    assert numbers.taken == 10
    counted = _Numbers()
    assert counted.take((2, 3)).shape == (2, 3) and counted.take((4,)).shape == (4,) and counted.taken == 10


def test_no_block_is_another_one(variables):
    """Rounded after each kernel's deviation is taken out, three numbers in a row hardly ever come again by chance."""
    kernel = variables["params"]["encoder"]["layer4_0"]["conv2"]["kernel"]  # nine blocks
    whole = np.round(1e4 * kernel.ravel() / kernel.std()).astype(np.int64) + 2**19
    rows = np.sort(whole[:-2] << 40 | whole[1:-1] << 20 | whole[2:])
    assert (np.diff(rows) == 0).sum() < 10


def test_the_key_decides(variables):
    jax.tree.map(np.testing.assert_array_equal, variables, jax.tree.map(np.asarray, initialise(jax.random.key(0))))
    for name, kernel in kernels(initialise(jax.random.key(1))).items():
        assert abs(np.corrcoef(kernel.ravel(), kernels(variables)[name].ravel())[0, 1]) < 0.06, name


def test_the_generator_is_there_once():
    """For the long array, and for the head's own one: not for each of 25 kernels."""
    program = initialise.lower(jax.random.key(0)).as_text()
    assert program.count("erf_inv") == 2
    assert jax.jit(segmenter().init).lower(jax.random.key(0), IMAGE).as_text().count("erf_inv") > 15


def test_by_itself_an_initializer_draws_from_its_key():
    draw = normal(lambda shape: 3.0)
    x, y = (np.asarray(draw(jax.random.key(seed), (100, 100), jnp.float32)) for seed in (0, 1))
    assert x.std() == pytest.approx(3, rel=0.05) and (x != y).any()
    np.testing.assert_array_equal(x, 3 * jax.random.normal(jax.random.key(0), (100, 100)))
    assert draw(jax.random.key(0), (2, 3), jnp.bfloat16).dtype == jnp.bfloat16
    # And again after a model was initialised at once.
    layer = nn.Dense(3, kernel_init=normal(lambda shape: 1.0))
    at_once = init(layer, jax.random.key(0), np.ones((1, 2)))["params"]["kernel"]
    assert at_once.shape == (2, 3)
    np.testing.assert_array_equal(x, draw(jax.random.key(0), (100, 100)))


def test_a_model_that_fails_leaves_nothing_behind():
    def fail(key, shape, dtype):
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        init(nn.Dense(3, kernel_init=fail), jax.random.key(0), np.ones((1, 2)))
    draw = normal(lambda shape: 1.0)
    assert (np.asarray(draw(jax.random.key(0), (5,))) != 0).all()
